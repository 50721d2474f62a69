"""Rows of inputs or output gradients, into a factor of any form."""

from __future__ import annotations

import torch
from torch import Tensor

from mfac_kernels import ops
from mfac_kernels.preconditioners.layers.base import Add, accumulated

_AT_A_TIME = 1 << 18  # elements that are multiplied


def add_rows(total: Tensor, rows: Tensor, how: Add, weights: Tensor | None = None, *, bias: bool = False) -> None:
    """total <- beta total + alpha sum_r w_r r r^T, rows (..., columns) with 1s appended for a bias.

    total: (size, size), or the block diagonal (blocks, s, s); blocks of one take sums of squares, without a product.
    """
    if total.dim() == 2 or total.shape[-1] > 1:
        ops.linear_factor_(
            total, rows, weights=weights, bias=bias, beta=how.beta, alpha=how.alpha, check_finite=how.refused
        )
        return
    squares = sum_of_products(rows, rows, weights)
    if bias:
        ones = rows[..., 0].numel() if weights is None else weights.sum()
        squares = torch.cat([squares, squares.new_ones(1) * ones])
    add_sums(total, squares, how)


def add_sums(total: Tensor, sums: Tensor, how: Add) -> None:
    """total <- beta total + alpha sums, of as many elements, not read if beta is 0; as it is if that is not finite."""
    result = how.alpha * sums.view_as(total)
    if how.beta != 0:
        result += how.beta * total
    finite = result.isfinite().all()
    how.refused.logical_or_(~finite)
    total.copy_(torch.where(finite, result, total))


def sum_of_products(x: Tensor, y: Tensor, weights: Tensor | None = None) -> Tensor:
    """sum_r w_r x_r y_r of rows (..., columns), element by element -> (columns,).

    Of a part of the rows at a time: products of all would be as large as these.
    """
    dtype = accumulated(x.dtype)
    found = x.new_zeros(x.shape[-1], dtype=dtype)
    step = max(1, _AT_A_TIME * len(x) // max(1, x.numel()))
    for i, (a, b) in enumerate(zip(torch.split(x, step), torch.split(y, step), strict=True)):
        products = a.to(dtype) * b.to(dtype)
        if weights is not None:
            products = products * weights[i * step : i * step + len(a), ..., None]
        found += products.flatten(0, -2).sum(0)
    return found
