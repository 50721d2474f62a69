"""Kronecker factors in float64, from explicit rows: what the fused ops compute.

A factor is sum_r w_r row_r row_r^T. Rows are the inputs of a linear layer, or the patches of a convolution: N samples,
C channels, any number of spatial dimensions, K = prod(kernel_size) offsets and S output positions.
Sources: Grosse and Martens 2016 (KFC), Laurent et al. 2018 (SUA, groups), Eschenhagen et al. 2023 (expand, reduce).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def second_moment(rows: Tensor, weights: Tensor | None = None, bias: bool = False) -> Tensor:
    """sum_r w_r row_r row_r^T of rows (..., R, D) -> (..., D + bias, D + bias). Bias: a last column of ones."""
    x = rows.double()
    if bias:
        x = F.pad(x, (0, 1), value=1.0)
    return x.mT @ (x if weights is None else x * weights.double()[..., None])


def linear_factor(x: Tensor, weights: Tensor | None = None, bias: bool = False) -> Tensor:
    """Of x (..., D), weights (...)."""
    return second_moment(_rows(x), None if weights is None else weights.reshape(-1), bias)


def cross_factor(x: Tensor, y: Tensor, weights: Tensor | None = None) -> Tensor:
    """sum_r w_r x_r y_r^T of x (..., D), y (..., E)."""
    left, right = _rows(x).double(), _rows(y).double()
    return left.mT @ (right if weights is None else right * weights.reshape(-1, 1).double())


def embedding_factor(indices: Tensor, num_embeddings: int, padding_idx: int | None = None) -> Tensor:
    """How often each index occurs: the diagonal of the factor of one-hot rows -> (num_embeddings,)."""
    flat = indices.reshape(-1)
    if padding_idx is not None:
        flat = flat[flat != padding_idx]
    return torch.bincount(flat, minlength=num_embeddings).double()


def patches(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
) -> Tensor:
    """im2col of x (N, C, *spatial) -> (N, C, K, S), K and S row-major; padding: (before, after) of each dimension."""
    dims = len(kernel_size)
    x = F.pad(x, [end for pair in reversed(padding) for end in pair])
    for d in range(dims):
        # Dimension 2 + d becomes (offset, position); those before it are split already.
        at = 2 + 2 * d
        span = dilation[d] * (kernel_size[d] - 1) + 1
        positions = (x.shape[at] - span) // stride[d] + 1
        index = torch.arange(kernel_size[d])[:, None] * dilation[d] + torch.arange(positions) * stride[d]
        picked = x.index_select(at, index.reshape(-1))
        x = picked.reshape(*x.shape[:at], kernel_size[d], positions, *x.shape[at + 1 :])
    n, c = x.shape[:2]
    order = [0, 1, *range(2, 2 + 2 * dims, 2), *range(3, 3 + 2 * dims, 2)]
    return x.permute(order).reshape(n, c, math.prod(kernel_size), math.prod(x.shape[3::2]))


def conv_factor(
    x: Tensor,
    kernel_size: Sequence[int],
    *,
    stride: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
    groups: int = 1,
    bias: bool = False,
    spatial: str = "full",
    approximation: str = "expand",
) -> Tensor:
    """(D, D), or (groups, D, D), columns (channel, offset, bias): D = C / groups K + bias; C / groups + bias if "sua".

    expand: a row per position. reduce: a row per sample, the sum over positions.
    """
    columns = patches(x.double(), kernel_size, stride, padding, dilation)
    n, c, k, s = columns.shape
    columns = columns.reshape(n, groups, c // groups * k, s)
    if bias:
        columns = F.pad(columns, (0, 0, 0, 1), value=1.0)
    if approximation == "reduce":
        columns = columns.sum(-1, keepdim=True)
    rows = columns.permute(1, 0, 3, 2).flatten(1, 2)
    factor = second_moment(rows)
    if spatial == "sua":
        factor = sua_projection(factor, c // groups, k, bias)
    return factor if groups > 1 else factor[0]


def sua_projection(factor: Tensor, channels: int, offsets: int, bias: bool = False) -> Tensor:
    """The C that brings I (x) C nearest to a factor (..., C K + bias, C K + bias): the mean of its K diagonal blocks.

    A block has the C columns of one offset and, with a bias, the bias column, which all offsets share.
    """
    total = torch.zeros(*factor.shape[:-2], channels + bias, channels + bias, dtype=factor.dtype)
    for offset in range(offsets):
        index = torch.arange(channels) * offsets + offset
        if bias:
            index = torch.cat([index, torch.tensor([channels * offsets])])
        total += factor[..., index[:, None], index]
    return total / offsets


def block_diagonal(factor: Tensor, size: int) -> list[Tensor]:
    """The diagonal blocks of factor (D, D), the last one ragged."""
    return [factor[k : k + size, k : k + size] for k in range(0, len(factor), size)]


def _rows(x: Tensor) -> Tensor:
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
