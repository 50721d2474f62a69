"""One run of one contender on one problem: losses, seconds, gains; what corrections do to the error of K-FAC's step."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from paper_problems import Data, Problem
from torch import Tensor, nn
from two_level_probe import energy, natural_gradient

import mfac_kernels as mk
from mfac_kernels.preconditioners.coarse import COARSE_SPACES

KFAC = "K-FAC"
TSELEPIDIS = "tselepidis"
CORRECTED = [*COARSE_SPACES, TSELEPIDIS]
PLAIN = {"Adam": torch.optim.Adam, "SGD": torch.optim.SGD}
CONTENDERS = [KFAC, *CORRECTED, *PLAIN]
RATES, DAMPINGS = (0.003, 0.03, 0.3), (0.1, 1.0)
MOMENTUM, KL_CLIP = 0.9, 0.01
PROBES = 3  # of a run on the first seed
LONGEST = 6  # times the steps, however fast they are


@dataclass
class Run:
    """One contender on one problem: an entry for each step in ``losses``, ``seconds`` (of the processor), ``gains``.

    ``shares``: at a few steps, the part of K-FAC's squared error in the F-norm that the correction takes away.
    """

    problem: str
    contender: str
    lr: float
    damping: float | None
    seed: int
    steps: int  # asked for
    searching: bool
    source: str = ""  # of the data
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    gains: list[float] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)

    @property
    def key(self) -> tuple[object, ...]:
        return self.problem, self.contender, self.lr, self.damping, self.seed, self.steps, self.searching

    @property
    def final_loss(self) -> float:
        """Mean of the last quarter; infinite if the run diverged."""
        tail = self.losses[-max(1, self.steps // 4) :]
        return math.fsum(tail) / len(tail) if len(self.losses) >= self.steps else math.inf


class Probe:
    """Stands in for the update of a preconditioner: measures, in some steps, what the correction does to the error."""

    def __init__(self, p: mk.TwoLevelKFAC) -> None:
        self._p, self._inner = p, p._updates
        self.due, self.seconds, self.shares = False, 0.0, list[float]()
        p._updates = self  # type: ignore[method-assign]

    def __call__(self, gradients: list[Tensor], refreshed: bool) -> list[Tensor]:
        p = self._p
        if not self.due:
            return self._inner(gradients, refreshed)
        jacobian = p._batch.jacobian(None, p.fisher.dtype, p.fisher.refused.device)
        updates = self._inner(gradients, refreshed)
        start = time.process_time()
        damping = p.fisher.damping
        best = energy(jacobian, damping, gradients, natural_gradient(jacobian, damping, gradients))
        before, after = (energy(jacobian, damping, gradients, x) for x in (p.fisher.ihvp(gradients), updates))
        self.shares.append((before - after) / (before - best))
        self.due = False
        self.seconds += time.process_time() - start
        return updates


def batches(data: Data, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        for index in torch.randperm(len(data.inputs), generator=generator).split(size):
            if len(index) == size:
                yield data.inputs[index], data.targets[index]


def optimizer(run: Run, net: nn.Module, inv_update_steps: int) -> tuple[torch.optim.Optimizer, mk.KFAC | None]:
    if run.contender == "Adam":
        return torch.optim.Adam(net.parameters(), lr=run.lr), None
    sgd = torch.optim.SGD(net.parameters(), lr=run.lr, momentum=MOMENTUM)
    if run.contender == "SGD":
        return sgd, None
    assert run.damping is not None
    options = {"inv_update_steps": inv_update_steps, "kl_clip": KL_CLIP, "lr": run.lr, "fisher_type": "mc"}
    if run.contender == KFAC:
        return sgd, mk.KFAC(net, run.damping, **options)
    return sgd, mk.TwoLevelKFAC(net, run.damping, coarse_space=run.contender, **options)


def train(run: Run, problem: Problem, data: Data, seconds: float = 0.0, probes: int = 0) -> None:
    """``run.steps`` steps, and more until so many seconds have passed."""
    torch.manual_seed(run.seed)
    run.source = data.source
    net = problem.network()
    optimizer_, p = optimizer(run, net, problem.inv_update_steps)
    probe = Probe(p) if isinstance(p, mk.TwoLevelKFAC) and probes else None
    probed = {run.steps * (2 * i + 1) // (2 * probes) for i in range(probes)}
    elapsed = 0.0
    for step, (x, y) in enumerate(batches(data, problem.batch, run.seed)):
        if step >= run.steps * LONGEST or (step >= run.steps and elapsed >= seconds):
            break
        if probe is not None:
            probe.due, probe.seconds = step in probed, 0.0
        start = time.process_time()
        optimizer_.zero_grad()
        output = net(x)
        loss = problem.loss_of(output, y)
        if p is not None:
            with p.sampling():
                problem.drawn(output).backward(retain_graph=True)
        loss.backward()
        if p is not None:
            p.step()
        optimizer_.step()
        value = loss.item()
        if not math.isfinite(value):
            break
        run.losses.append(value)
        spent = time.process_time() - start - (0.0 if probe is None else probe.seconds)
        elapsed += spent
        run.seconds.append(spent)
        if isinstance(p, mk.TwoLevelKFAC):
            run.gains.append(float(p.coarse_gain))
    if probe is not None:
        run.shares = probe.shares
