"""A fixed set of gradients as level-3 ops: what :class:`mfac_kernels.StaticFisher` is made of.

For gradients G (m, d), damping and n, F = damping I + G^T G / n. By Woodbury, with K = n damping I + G G^T = L L^T,

    F^-1 = (I - G^T K^-1 G) / damping                        gram, block_gram
    [F^-1]_jj = (1 - sum_i (L^-1 G)_ij^2) / damping          inverse_diagonal
    F_b^-1 = (damping I + G_b^T G_b / n)^-1                  block_inverse, for a block of b <= m coordinates

The rows of ``g`` are contiguous and any distance apart. float32 and narrower gradients are multiplied in float32
(unless asked otherwise), float64 ones in float64. Results are the same bit for bit whatever the number of threads,
and on a GPU from run to run; nothing synchronises with it.

Source: Frantar, Kurtic, Alistarh, "M-FAC: Efficient Matrix-Free Approximations of Second-Order Information",
NeurIPS 2021.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

import mfac_kernels._library  # noqa: F401  (loads the ops)
from mfac_kernels.ops._blocks import block_count
from mfac_kernels.ops._checks import check, check_rows, check_state

__all__ = ["block_gram", "block_inverse", "gram", "inverse_diagonal"]

_ops = torch.ops.mfac_kernels


def gram(g: Tensor, *, double_precision: bool = False) -> Tensor:
    """``g @ g.T``: g (m, d), any floating dtype -> (m, m) float64, exactly symmetric.

    Short sums in the type of the products are added up in float64: for float32 and narrower the error is about 1e-8 in
    norm and a few 1e-8 of ``|g| @ |g|.T`` in the worst entry, however large d is. With ``double_precision`` the
    products are in float64 whatever g's dtype: the error is then d times float64's eps at most.
    """
    s: Tensor = _ops.gram(g, double_precision)
    return s


def block_gram(g: Tensor, block_size: int, *, double_precision: bool = False) -> Tensor:
    """:func:`gram` of each block of ``block_size`` columns, the last one ragged: (m, d) -> (blocks, m, m) float64."""
    s: Tensor = _ops.block_gram(g, block_size, double_precision)
    return s


def inverse_diagonal(g: Tensor, transform: Tensor, damping: float) -> Tensor:
    """``(1 - (transform @ g).square().sum(0)) / damping`` without forming the product: the diagonal of F^-1.

    g (m, d), any floating dtype; transform (m, m) float64, lower triangular (the rest is not read): L^-1 with
    L L^T = n damping I + g g^T -> (d,) in float32, or float64 for float64 gradients.

    The sum is at most 1 and, as long as ``transform @ g`` cancels no more than the sum does, accurate to c m eps: the
    relative error of an entry is c m eps / (damping * entry), small unless the entry is far below 1 / damping.
    """
    diagonal: Tensor = _ops.inverse_diagonal(g, transform, damping)
    return diagonal


def block_inverse(g: Tensor, block_size: int, damping: float, count: float) -> tuple[Tensor, Tensor]:
    """``(damping I + g_b.T @ g_b / count)^-1`` for each block g_b of ``block_size`` columns, the last one ragged.

    g (m, d), any floating dtype -> inverse (blocks, block_size, block_size), exactly symmetric, float32, or float64
    for float64 gradients; rows and columns past the ragged end are zero. info (blocks,) int32: 0; or the order of the
    leading minor that is not positive; or -1 for a block that is not finite. A block that fails is NaN and touches no
    other.

    A blocked Cholesky inverse: the error of a block is c b eps cond(F_b), relative to its norm.
    """
    inverse, info = _ops.block_inverse(g, block_size, damping, count)
    return inverse, info


def _accumulator(g: Tensor) -> torch.dtype:
    return torch.float64 if g.dtype == torch.float64 else torch.float32


@torch.library.register_fake("mfac_kernels::gram")
def _(g: Tensor, double_precision: bool) -> Tensor:
    check_rows("gram", "g", g)
    return g.new_empty(g.shape[0], g.shape[0], dtype=torch.float64)


@torch.library.register_fake("mfac_kernels::block_gram")
def _(g: Tensor, block_size: int, double_precision: bool) -> Tensor:
    op = "block_gram"
    check_rows(op, "g", g)
    return g.new_empty(block_count(op, g, block_size), g.shape[0], g.shape[0], dtype=torch.float64)


@torch.library.register_fake("mfac_kernels::inverse_diagonal")
def _(g: Tensor, transform: Tensor, damping: float) -> Tensor:
    op = "inverse_diagonal"
    check_rows(op, "g", g)
    check_state(op, "transform", transform, torch.float64, (g.shape[0], g.shape[0]))
    check(
        0 < damping < math.inf,
        f"{op}: damping: expected a positive finite number, got {damping:g}",
    )
    return g.new_empty(g.shape[1], dtype=_accumulator(g))


@torch.library.register_fake("mfac_kernels::block_inverse")
def _(g: Tensor, block_size: int, damping: float, count: float) -> tuple[Tensor, Tensor]:
    op = "block_inverse"
    check_rows(op, "g", g)
    blocks = block_count(op, g, block_size)
    check(0 < count < math.inf, f"{op}: count: expected a positive finite number, got {count:g}")
    inverse = g.new_empty(blocks, block_size, block_size, dtype=_accumulator(g))
    return inverse, g.new_empty(blocks, dtype=torch.int32)
