"""A step of two-level K-FAC beside one of K-FAC: the paper's autoencoder and a small convolutional network.

Factors every step, inverses every tenth, ten steps together; "ratio to" is their time over K-FAC's. Each contender's
last step is verified first: its correction lowers the error in the F-norm by its gain. MB: the most that is held at a
time, network, data, factors and ten steps together: resident memory of a process of its own (this file, with a problem
and a contender).

The last row is the reduction of a step's two passes through the layers to a dot for each sample, in torch's operations,
and how often it fits into the step; of layers whose inputs and output gradients are kept. A fused operation would save
a part of it: at less than a tenth of a step it does not pay.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from paper_problems import PROBLEMS, Categorical
from peak_memory import watch
from torch import Tensor, nn
from two_level_probe import energy

import mfac_kernels as mk
from mfac_kernels.fisher.jacobian import sample_dots
from mfac_kernels.preconditioners._gathered import GatheringPreconditioner
from mfac_kernels.preconditioners.coarse import COARSE_SPACES

DAMPING, STEPS = 0.1, 10
SHAPES = {"mnist": (512, 784), "cifar10": (100, 3, 32, 32)}
CONTENDERS = [*COARSE_SPACES, "tselepidis", "residual, a quarter of the batch"]


Make = Callable[[nn.Module, str], GatheringPreconditioner]


class Stepper:
    """``STEPS`` steps of a preconditioner, one of which inverts; of a problem's network, or of another."""

    def __init__(
        self, problem: str, contender: str, make: Make, net: nn.Module | None = None, samples: int | None = None
    ) -> None:
        torch.manual_seed(0)
        self.problem = PROBLEMS[problem]
        self.net = self.problem.network() if net is None else net
        self.x = torch.rand(SHAPES[problem])[:samples].clone()
        categorical = isinstance(self.problem.likelihood, Categorical)
        self.closures: tuple[Callable[[], None], ...] = ()
        self.y = torch.randint(10, (len(self.x),)) if categorical else self.x
        self.p = make(self.net, contender)
        if isinstance(self.p, mk.KBFGS):
            self.closures = (self.backward,)

    def backward(self) -> None:
        self.net.zero_grad()
        self.problem.loss_of(self.net(self.x), self.y).backward()

    def __call__(self) -> None:
        for _ in range(STEPS):
            self.backward()
            self.p.step(*self.closures)


def preconditioner(net: nn.Module, contender: str) -> mk.KFAC:
    options = {"inv_update_steps": STEPS, "kl_clip": None}
    if contender == "K-FAC":
        return mk.KFAC(net, DAMPING, **options)
    space, *part = contender.split(",")
    return mk.TwoLevelKFAC(net, DAMPING, coarse_space=space, fisher_batch=0.25 if part else 1.0, **options)


def verify(stepper: Stepper) -> None:
    """To 1%: differences of float32 sums."""
    p = stepper.p
    stepper()
    stepper.backward()
    gradient = [layer.gradient().clone() for layer in p._layers]
    jacobian = p._batch.jacobian(None, torch.float32, torch.device("cpu"))
    p.step()
    steps = [p.fisher.ihvp(gradient), [layer.gradient() for layer in p._layers]]
    before, after = (energy(jacobian, DAMPING, gradient, x) for x in steps)
    assert before - after == pytest.approx(float(p.coarse_gain), rel=1e-2, abs=1e-5 * abs(before))
    assert p.diagnostics()["coarse_fallbacks"] == 0


def megabytes(script: str, problem: str, contender: str) -> float:
    """Of a script that calls :func:`measure`; each tensor mapped by itself: what the allocator keeps would count."""
    command = [sys.executable, script, problem, contender]
    mapped = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    return float(subprocess.run(command, capture_output=True, check=True, env=mapped).stdout)


@pytest.mark.parametrize("problem", SHAPES)
def test_whole_step(race, problem):
    steppers = {name: Stepper(problem, name, preconditioner) for name in CONTENDERS}
    for stepper in steppers.values():
        verify(stepper)
    memory = {name: megabytes(__file__, problem, name) for name in ("K-FAC", *CONTENDERS)}
    kfac = Stepper(problem, "K-FAC", preconditioner)
    race(f"{STEPS} steps of K-FAC", PROBLEMS[problem].title, kfac, steppers, megabytes=memory)


@pytest.mark.parametrize("problem", SHAPES)
def test_share_of_the_dots(race, problem):
    stepper = Stepper(problem, "residual", preconditioner)
    verify(stepper)
    stepper.backward()
    calls = [call for call, _ in stepper.p._batch._calls]
    pairs = [(call.gradients, torch.randn_like(call.gradients)) for call in calls]
    for g, y in pairs:
        torch.testing.assert_close(sample_dots(g, y), (g * y).flatten(1).sum(1), rtol=1e-4, atol=1e-4)

    def dots() -> list[Tensor]:
        return [sample_dots(g, y) for _ in range(2 * STEPS) for g, y in pairs]

    race(f"dots of {STEPS} steps", PROBLEMS[problem].title, dots, {"steps, residual": stepper})


def small(problem: str) -> nn.Module:
    channels, *size = SHAPES[problem][1:]
    if size:
        return nn.Sequential(nn.Conv2d(channels, 2, 3, stride=2), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(450, 10))
    return nn.Sequential(nn.Linear(channels, 2), nn.Linear(2, channels))


def measure(make: Make, problem: str, contender: str) -> None:
    """Print the megabytes that ten steps take, in a process of their own."""
    Stepper(problem, contender, make, net=small(problem), samples=4)()  # what is loaded once
    taken = watch()
    measured = Stepper(problem, contender, make)
    measured()
    print(taken() / 1e6)


if __name__ == "__main__":
    measure(preconditioner, *sys.argv[1:])
