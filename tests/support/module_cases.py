"""One computation written with different modules: the same factors and the same updates are due, in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from gathering_cases import assert_same, kfac, loss_of
from torch import Tensor, nn

import mfac_kernels as mk

WAYS = [(1, 1, "expand"), (2, 1, "expand"), (1, 3, "expand"), (2, 2, "reduce")]
"""(calls of a layer in a pass, accumulated passes, approximation)."""


class Repeated(nn.Module):
    """A module that is called ``calls`` times, its output of the shape of its input."""

    def __init__(self, module: nn.Module, calls: int) -> None:
        super().__init__()
        self.module, self.calls = module, calls

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.calls):
            x = torch.tanh(self.module(x))
        return x


def stepped(
    net: nn.Module, batches: Sequence[Any], loss: Callable[[Tensor], Tensor] = loss_of, **options: Any
) -> mk.KFAC:
    """After two steps over all the batches, each a pass: gradients are preconditioned, averages are of two."""
    p = kfac(net, **{"accumulation_steps": len(batches), "factor_decay": 0.5, **options})
    for _ in range(2):
        net.zero_grad()
        for x in batches:
            (loss(net(x)) / len(batches)).backward()
        p.step()
    return p


def blocks(p: mk.KFAC) -> list[Tensor]:
    """B (x) A of each layer."""
    found = []
    for i in range(len(p._layers)):
        a, b = p.fisher.factors(i)
        a = a.diag()[None] if a.dim() == 1 else a
        if p.fisher.shapes[i].groups == 1:  # blocks of one factor each
            a, b = (torch.block_diag(*factor)[None] for factor in (a, b))
        found.append(torch.block_diag(*(torch.kron(y, x) for x, y in zip(a, b, strict=True))))
    return found


def assert_same_layers(got: mk.KFAC, want: mk.KFAC) -> None:
    """The same blocks and, in the layers' order of parameters, the same updates: 1e4 eps of the largest entry."""
    assert len(got._layers) == len(want._layers) > 0
    assert_same(blocks(got), blocks(want))
    for a, b in zip(got._layers, want._layers, strict=True):
        torch.testing.assert_close(a.gradient(), b.gradient(), rtol=1e-9, atol=1e-11 * float(b.gradient().abs().max()))
