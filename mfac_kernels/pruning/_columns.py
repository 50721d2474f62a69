"""Columns of a weight matrix changed one after another, each time with the best answer of those that come later.

With H^-1 = U^T U, U upper triangular, changing column i from w to q costs (w - q)^2 / (2 U_ii^2) for each row if all
later columns j answer by

    w_j <- w_j - (w - q) / U_ii  U_ij,

which is the step of the optimal brain surgeon with the inverse of the Hessian of the columns that are left: its first
row is U_ii U_i. Columns of a block answer at once, all beyond it when the block is done, in one product.

Source: Frantar et al., "GPTQ", ICLR 2023, sections 3.2 and 3.3.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mfac_kernels import ops
from mfac_kernels.pruning import _layers

InverseFactor = Callable[[Tensor, float], Tensor]


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """U of H + damping mean(diag H) I, where diagonals that are 0 become 1 first -> (groups, n, n)."""
    return ops.cholesky_inverse_factor(hessian, damping, relative=True, dead=True)


def matrix_and_hessian(layer: _layers.Layer, hessian: Tensor) -> tuple[Tensor, Tensor]:
    """(groups, rows, n) and (groups, n, n), of one dtype and device.

    Columns that no token has reached, of groups that some have, are zero in the first.
    """
    weights = _layers.matrix(layer)
    expected = _layers.hessian_shape(layer)
    if not isinstance(hessian, Tensor) or not hessian.is_floating_point():
        raise TypeError(f"hessian: expected a floating tensor, got {getattr(hessian, 'dtype', type(hessian).__name__)}")
    if hessian.shape != expected:
        raise ValueError(f"hessian: expected shape {expected}, got {tuple(hessian.shape)}")
    dtype = torch.promote_types(weights.dtype, hessian.dtype)
    h = hessian.detach().to(weights.device, dtype).reshape(len(weights), *expected[-2:])
    alive = h.diagonal(dim1=-2, dim2=-1) != 0
    dead = alive.any(-1, keepdim=True) & ~alive
    return weights.to(dtype).masked_fill_(dead[:, None], 0), h


def change_columns(weights: Tensor, factor: Tensor, change: Callable[[int], Tensor], block_size: int) -> None:
    """weights (groups, rows, n)[..., i] <- change(i) for i = 0, 1, .., and later columns answer.

    factor: U (groups, n, n). change(i) -> (groups, rows) sees ``weights`` with the answers to all columns before i, as
    far as the block of i reaches; blocks begin at the multiples of ``block_size``.
    """
    n = weights.shape[2]
    for start in range(0, n, block_size):
        stop = min(start + block_size, n)
        errors = torch.empty_like(weights[..., start:stop])
        for i in range(start, stop):
            new = change(i)
            error = (weights[..., i] - new) / factor[:, None, i, i]
            weights[..., i] = new
            weights[..., i + 1 : stop] -= error[..., None] * factor[:, None, i, i + 1 : stop]
            errors[..., i - start] = error
        weights[..., stop:] -= errors @ factor[:, start:stop, stop:]
