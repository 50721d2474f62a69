"""How far to go: a line search on the loss, and the minimum of the quadratic model over step and momentum."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mfac_kernels.pinn.conditions import Linearisation, Term, linear_layers, loss_of

__all__ = ["SMALLEST_RATE", "line_search", "move", "quadratic_minimum"]

SMALLEST_RATE = 2.0**-30


@torch.no_grad()
def move(net: nn.Sequential, step: Sequence[Tensor], rate: float | Tensor = 1.0) -> None:
    """Add rate times ``step``, a block (outputs, inputs + bias) for each linear layer, to the parameters."""
    layers = linear_layers(net)
    shapes = [(m.out_features, m.in_features + (m.bias is not None)) for m in layers]
    if [tuple(b.shape) for b in step] != shapes or not all(b.is_floating_point() for b in step):
        raise ValueError(f"step: expected blocks of shapes {shapes}, got {[(tuple(b.shape), b.dtype) for b in step]}")
    for module, block in zip(layers, step, strict=True):
        module.weight.add_(rate * block[:, : module.in_features])
        if module.bias is not None:
            module.bias.add_(rate * block[:, -1])


@torch.no_grad()
def line_search(net: nn.Sequential, terms: Sequence[Term], step: Sequence[Tensor], loss: Tensor) -> float:
    """Move the parameters by the best of the rates 1, 1/2, ... 2^-30 times ``step``, and return it.

    The search ends where the loss, once below ``loss``, that of no step, rises again: a few of the 31 losses, while
    the published grid search computes all. If no rate lowers the loss, the parameters stay as they are: 0. Waits for
    the device.

    Source: Mueller, Zeinhofer, "Achieving high accuracy with PINNs via energy natural gradients", ICML 2023.
    """
    before = [p.clone() for p in net.parameters()]

    def go(rate: float) -> None:
        for p, old in zip(net.parameters(), before, strict=True):
            p.copy_(old)
        if rate:
            move(net, step, rate)

    best, least, rate = 0.0, float(loss), 1.0
    while rate >= SMALLEST_RATE:
        go(rate)
        found = float(loss_of(net, terms))
        if found < least:
            best, least = rate, found
        elif best:
            break
        rate /= 2
    go(best)
    return best


def quadratic_minimum(
    at: Linearisation, directions: Sequence[Sequence[Tensor]], gradient: Sequence[Tensor], damping: float
) -> Tensor:
    """The coefficients c (k,) of the directions D that minimise g^T D c + c^T D^T (J^T W J + damping I) D c / 2.

    By products with the exact Gauss-Newton matrix. Directions of zero, or that depend on each other, are no trouble.
    """
    dots = torch.stack([at.product.jvp(d) for d in directions])
    flat = torch.stack([torch.cat([block.flatten() for block in d]) for d in directions])
    model = (dots * at.weights) @ dots.mT + damping * flat @ flat.mT
    slope = flat @ torch.cat([block.flatten() for block in gradient])
    size = model.diagonal()
    scale = torch.where(size > 0, size, torch.inf).rsqrt()  # to a diagonal of 1: directions differ much in length
    inverse: Tensor = torch.linalg.pinv(scale[:, None] * model * scale, hermitian=True)
    return -scale * (inverse @ (scale * slope))
