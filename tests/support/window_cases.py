"""What the tests of FisherWindow share."""

from __future__ import annotations

import torch
from torch import Tensor

import mfac_kernels as mk
from mfac_kernels.reference import window as reference

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
EPS = torch.finfo(torch.float64).eps
NORMALIZE = ["ngrads", "seen"]


def fill(window: mk.FisherWindow, grads: Tensor) -> mk.FisherWindow:
    for g in grads:
        window.update(g.to(window.device))
    return window


def divisor(window: mk.FisherWindow) -> int:
    held = min(window.seen, window.ngrads)
    return window.ngrads if window.normalize == "ngrads" else max(1, held)


def newest_slot(window: mk.FisherWindow) -> int:
    return (window.seen - 1) % window.ngrads


def dense_inverse(window: mk.FisherWindow) -> Tensor:
    return torch.linalg.inv(reference.fisher(window.window.cpu(), window.damping, divisor(window)))


def error(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want|."""
    return float((got.cpu().double() - want).norm() / want.norm())


def tensors(window: mk.FisherWindow) -> list[Tensor]:
    return [window.window, window.gram, window.factor, window.state]


def assert_same_bits(a: mk.FisherWindow, b: mk.FisherWindow) -> None:
    assert all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))
    assert a.damping == b.damping
