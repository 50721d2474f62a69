"""Columns of a weight changed one after another, in float64: what :mod:`mfac_kernels.pruning` does with a layer's
Hessian.

weights (rows, n), hessian (n, n).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mfac_kernels.reference import cholesky


def damped(hessian: Tensor, damping: float) -> Tensor:
    """H + damping mean(diag H) I, where diagonals that are 0 become 1 first -> (..., n, n)."""
    h = cholesky.revived(hessian, True)
    return cholesky.damped(h, damping * h.diagonal(dim1=-2, dim2=-1).mean(-1))


def three_calls(hessian: Tensor, damping: float) -> Tensor:
    """U of the damped Hessian as it is usually computed, in the dtype of ``hessian`` -> (..., n, n)."""
    h = damped(hessian, damping).to(hessian.dtype)
    result: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    return result


def change_columns(weights: Tensor, hessian: Tensor, change: Callable[[int, Tensor], Tensor]) -> Tensor:
    """w_i <- change(i, w) for i = 0, 1, ..; by the step of the optimal brain surgeon, with the explicit inverse of the
    Hessian of the columns that are left, these move: w_j <- w_j - (w_i - q) [H^-1]_ij / [H^-1]_ii.
    """
    w = weights.double().clone()
    for i in range(w.shape[1]):
        inverse = torch.linalg.inv(hessian.double()[i:, i:])
        new = change(i, w)
        error = w[:, i] - new
        w[:, i:] -= error[:, None] * inverse[0] / inverse[0, 0]
        w[:, i] = new
    return w


def costs(hessian: Tensor) -> Tensor:
    """[H^-1]_ii, with the inverse of the Hessian of columns i and later -> (n,): w_i = 0 costs w_i^2 / (2 of it)."""
    h = hessian.double()
    return torch.stack([torch.linalg.inv(h[i:, i:])[0, 0] for i in range(len(h))])
