"""K-FAC and its coarse corrections as contenders; what the corrections do to the error of K-FAC's step."""

from __future__ import annotations

import time

from paper_problems import Problem
from paper_runs import KFAC, PLAIN, Method, Run, kfac_options, plain
from torch import Tensor, nn
from two_level_probe import energy, natural_gradient

import mfac_kernels as mk
from mfac_kernels.preconditioners.coarse import COARSE_SPACES

TSELEPIDIS = "tselepidis"
CORRECTED = [*COARSE_SPACES, TSELEPIDIS]
CONTENDERS = [KFAC, *CORRECTED, *PLAIN]
PROBES = 3  # of a run on the first seed


class TwoLevel(Method):
    """Stands in for its preconditioner's update: measures, in some steps, what the correction does to the error."""

    def __init__(self, run: Run, net: nn.Module, p: mk.TwoLevelKFAC) -> None:
        super().__init__(plain(run, net), p)
        self._p, self._inner = p, p._updates
        self._due = False
        probes = 0 if run.searching or run.seed else PROBES
        self._probed = {run.steps * (2 * i + 1) // (2 * probes) for i in range(probes)}
        self._shares: list[float] = []
        p._updates = self._updates  # type: ignore[method-assign]

    def begin(self, step: int) -> None:
        self._due, self.aside = step in self._probed, 0.0

    def end(self, run: Run) -> None:
        run.gains.append(float(self._p.coarse_gain))
        run.shares = self._shares

    def _updates(self, gradients: list[Tensor], refreshed: bool) -> list[Tensor]:
        p = self._p
        if not self._due:
            return self._inner(gradients, refreshed)
        jacobian = p._batch.jacobian(None, p.fisher.dtype, p.fisher.refused.device)
        updates = self._inner(gradients, refreshed)
        start = time.process_time()
        damping = p.fisher.damping
        best = energy(jacobian, damping, gradients, natural_gradient(jacobian, damping, gradients))
        before, after = (energy(jacobian, damping, gradients, x) for x in (p.fisher.ihvp(gradients), updates))
        self._shares.append((before - after) / (before - best))
        self.aside = time.process_time() - start
        return updates


def method(run: Run, net: nn.Module, problem: Problem) -> Method:
    if run.contender in PLAIN:
        return Method(plain(run, net))
    assert run.damping is not None
    options = kfac_options(run, problem)
    if run.contender == KFAC:
        return Method(plain(run, net), mk.KFAC(net, run.damping, **options))
    return TwoLevel(run, net, mk.TwoLevelKFAC(net, run.damping, coarse_space=run.contender, **options))
