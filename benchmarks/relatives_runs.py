"""K-FAC's relatives as contenders, by the names that tables have."""

from __future__ import annotations

from typing import Any

from paper_problems import Problem
from paper_runs import KFAC, PLAIN, Method, Run, plain
from torch import nn

import mfac_kernels as mk

MOMENTUM, KL_CLIP = 0.9, 0.01
RATES, DAMPINGS = (0.003, 0.03, 0.3), (0.1, 1.0)
KFACS: dict[str, dict[str, Any]] = {
    KFAC: {},
    "EKFAC": {"damping_style": "exact", "eigen_correction": True},
    "TKFAC": {"approximate": "tkfac"},
    "KPSVD": {"approximate": "kpsvd"},
}
CONTENDERS = [*KFACS, *PLAIN]


def method(run: Run, net: nn.Module, problem: Problem) -> Method:
    optimizer = plain(run, net, MOMENTUM)
    return Method(optimizer) if run.contender in PLAIN else Method(optimizer, preconditioner(run, net, problem))


def preconditioner(run: Run, net: nn.Module, problem: Problem) -> mk.KFAC:
    assert run.damping is not None
    common = {"kl_clip": KL_CLIP, "lr": run.lr, "inv_update_steps": problem.inv_update_steps, "fisher_type": "mc"}
    return mk.KFAC(net, run.damping, **common, **KFACS[run.contender])
