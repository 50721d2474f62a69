"""How far a step of two-level K-FAC is from the natural gradient, measured by products with the Fisher matrix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mfac_kernels import JacobianProduct

Blocks = Sequence[Tensor]


def dot(x: Blocks, y: Blocks) -> float:
    return sum(float((a.double() * b).sum()) for a, b in zip(x, y, strict=True))


def energy(jacobian: JacobianProduct, damping: float, gradient: Blocks, x: Blocks) -> float:
    """<x, F x> - 2 <g, x>: the squared F-norm of the error x - F^-1 g, less that of F^-1 g."""
    return dot(x, jacobian.fisher_product(x, damping)) - 2 * dot(gradient, x)


def natural_gradient(
    jacobian: JacobianProduct, damping: float, gradient: Blocks, iterations: int = 100, tolerance: float = 1e-3
) -> list[Tensor]:
    """F^-1 g by conjugate gradients, until the residual is less than tolerance |g|."""
    x = [torch.zeros_like(g) for g in gradient]
    residual = [g.clone() for g in gradient]
    direction = [g.clone() for g in gradient]
    left = first = dot(residual, residual)
    for _ in range(iterations):
        if left <= tolerance**2 * first:
            break
        product = jacobian.fisher_product(direction, damping)
        length = left / dot(direction, product)
        before = left
        for a, r, d, p in zip(x, residual, direction, product, strict=True):
            a.add_(d, alpha=length)
            r.sub_(p, alpha=length)
        left = dot(residual, residual)
        for r, d in zip(residual, direction, strict=True):
            d.mul_(left / before).add_(r)
    return x
