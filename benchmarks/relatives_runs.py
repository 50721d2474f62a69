"""K-FAC's relatives as contenders, by the names that tables have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from paper_problems import Problem
from paper_runs import KFAC, PLAIN, Method, Run, kfac_options, plain
from torch import Tensor, nn

import mfac_kernels as mk
from mfac_kernels.preconditioners._gathered import GatheringPreconditioner

KFACS: dict[str, dict[str, Any]] = {
    KFAC: {},
    "EKFAC": {"damping_style": "exact", "eigen_correction": True},
    "TKFAC": {"approximate": "tkfac"},
    "KPSVD": {"approximate": "kpsvd"},
    "deflation": {"approximate": "deflation"},
}
MINI_BLOCK, KBFGS = "mini-block", "K-BFGS"
CONTENDERS = [*KFACS, MINI_BLOCK, KBFGS, *PLAIN]


class QuasiNewton(Method):
    """Its steps take a second forward and backward pass."""

    def precondition(self, closure: Callable[[], Tensor]) -> None:
        assert isinstance(self.preconditioner, mk.KBFGS)
        self.preconditioner.step(closure)


def method(run: Run, net: nn.Module, problem: Problem) -> Method:
    optimizer = plain(run, net)
    if run.contender in PLAIN:
        return Method(optimizer)
    assert run.damping is not None
    kind = QuasiNewton if run.contender == KBFGS else Method
    return kind(optimizer, preconditioner(run.contender, net, run.damping, **kfac_options(run, problem)))


def preconditioner(contender: str, net: nn.Module, damping: float, **options: Any) -> GatheringPreconditioner:
    """``linear="mean"``: a block of each neuron of the autoencoder would take 5 GB for its first layer alone."""
    if contender == KBFGS:
        return mk.KBFGS(net, damping, **{key: options[key] for key in ("kl_clip", "lr") if key in options})
    if contender == MINI_BLOCK:
        return mk.MiniBlockFisher(net, damping, linear="mean", **options)
    return mk.KFAC(net, damping, **options, **KFACS[contender])
