"""A step of each of K-FAC's relatives beside one of K-FAC: the paper's autoencoder and a small convolutional network.

Factors every step, inverses every tenth (K-BFGS has none, and a second pass in every step), ten steps together; "ratio
to" is their time over K-FAC's. What each contender's state makes of a gradient is verified first. MB: the most that is
held at a time, network, data, state and ten steps together: resident memory of a process of its own (this file, with a
problem and a contender).
"""

from __future__ import annotations

import sys

import pytest
import relatives_runs
import torch
from bench_two_level import DAMPING, SHAPES, STEPS, Stepper, measure, megabytes
from paper_problems import PROBLEMS
from paper_runs import KFAC, PLAIN
from torch import nn

import mfac_kernels as mk
from mfac_kernels.preconditioners._gathered import GatheringPreconditioner

CONTENDERS = [name for name in relatives_runs.CONTENDERS if name not in (KFAC, *PLAIN)]


def preconditioner(net: nn.Module, contender: str) -> GatheringPreconditioner:
    return relatives_runs.preconditioner(contender, net, DAMPING, kl_clip=None, inv_update_steps=STEPS)


def verify(stepper: Stepper) -> None:
    """A step is its state's product with the gradient; that of mini-blocks solves their equations, to 1%."""
    p = stepper.p
    stepper.backward()
    p.step(*stepper.closures)
    stepper.backward()
    gradients = [layer.gradient().clone() for layer in p._layers]
    product = p.factors.apply if isinstance(p, mk.KBFGS) else None
    before = product(gradients) if product else []
    p.step(*stepper.closures)
    found = [layer.gradient() for layer in p._layers]
    if isinstance(p, mk.MiniBlockFisher):  # inverses are those of the first step
        p.blocks.refresh(DAMPING)
        found = p.blocks.ihvp(gradients)
        for i, shape in enumerate(p.blocks.shapes):
            for blocks, x, g in zip(p.blocks.blocks(i), shape.cut(found[i]), shape.cut(gradients[i]), strict=True):
                back = (x[:, None] @ blocks)[:, 0] if len(blocks) == len(x) else x @ blocks[0]
                torch.testing.assert_close(back + DAMPING * x, g, rtol=1e-2, atol=1e-2 * float(g.abs().max()))
        return
    for x, y in zip(found, before or p.fisher.ihvp(gradients), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-2, atol=1e-4 * float(y.abs().max()))


@pytest.mark.parametrize("problem", SHAPES)
def test_whole_step(race, problem):
    steppers = {name: Stepper(problem, name, preconditioner) for name in CONTENDERS}
    for stepper in steppers.values():
        verify(stepper)
    memory = {name: megabytes(__file__, problem, name) for name in (KFAC, *CONTENDERS)}
    kfac = Stepper(problem, KFAC, preconditioner)
    race(f"{STEPS} steps of K-FAC", PROBLEMS[problem].title, kfac, steppers, megabytes=memory)


if __name__ == "__main__":
    measure(preconditioner, *sys.argv[1:])
