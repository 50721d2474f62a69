"""Rows of inputs or output gradients, into a factor of any form."""

from __future__ import annotations

import torch
from torch import Tensor

from mfac_kernels import ops
from mfac_kernels.preconditioners.layers.base import Add, accumulated

_AT_A_TIME = 1 << 20  # elements that are squared


def add_rows(total: Tensor, rows: Tensor, how: Add, weights: Tensor | None = None, *, bias: bool = False) -> None:
    """total <- beta total + alpha sum_r w_r r r^T, rows (..., columns) with 1s appended for a bias.

    total: (size, size), or the block diagonal (blocks, s, s); blocks of one take sums of squares, without a product.
    """
    if total.dim() == 2 or total.shape[-1] > 1:
        ops.linear_factor_(
            total, rows, weights=weights, bias=bias, beta=how.beta, alpha=how.alpha, check_finite=how.refused
        )
        return
    squares = _sum_of_squares(rows, weights).to(total.dtype)
    if bias:
        ones = rows[..., 0].numel() if weights is None else weights.sum()
        squares = torch.cat([squares, squares.new_ones(1) * ones])
    if how.beta == 0:
        total.zero_()
    total.mul_(how.beta).add_(squares.view_as(total), alpha=how.alpha)
    how.refused.logical_or_(~total.isfinite().all())


def _sum_of_squares(rows: Tensor, weights: Tensor | None) -> Tensor:
    """(columns,); of a part of the rows at a time, without a copy of them all."""
    dtype = accumulated(rows.dtype)
    found = rows.new_zeros(rows.shape[-1], dtype=dtype)
    step = max(1, _AT_A_TIME * len(rows) // max(1, rows.numel()))
    for i, part in enumerate(torch.split(rows, step)):
        squares = part.to(dtype).square()
        if weights is not None:
            squares = squares * weights[i * step : i * step + len(part), ..., None]
        found += squares.flatten(0, -2).sum(0)
    return found
