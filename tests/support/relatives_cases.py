"""Small networks trained for some steps by K-FAC's relatives, whatever these are."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from two_level_cases import build, loss_of

from mfac_kernels.preconditioners._kept import KeptPreconditioner


def closure_of(net: nn.Module, x: Tensor, scale: float = 1.0, shift: int = 0) -> Callable[[], None]:
    def closure() -> None:
        net.zero_grad()
        (scale * loss_of(net, x, shift=shift)).backward()

    return closure


def step(net: nn.Module, p: KeptPreconditioner, closure: Callable[[], None]) -> None:
    closure()
    if p._owner == "KBFGS":
        p.step(closure)  # type: ignore[call-arg]
    else:
        p.step()


def train(net: nn.Module, p: KeptPreconditioner, x: Tensor, steps: int, rate: float = 0.1) -> None:
    for _ in range(steps):
        step(net, p, closure_of(net, x))
        with torch.no_grad():
            for q in net.parameters():
                if q.grad is not None:
                    q -= rate * q.grad


__all__ = ["build", "closure_of", "loss_of", "step", "train"]
