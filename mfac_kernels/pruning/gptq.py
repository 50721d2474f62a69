"""GPTQ: a layer's weight rounded column by column; the columns that are left answer for each rounding error.

With U upper triangular, U^T U = (H + damping mean(diag H) I)^-1, for i = 1 .. n:

    q = the grid's nearest to w_i,    w_j <- w_j - (w_i - q) / U_ii  U_ij  for j > i,    w_i <- q.

Grids are those of the given weights; with ``actorder`` columns with a larger H_ii come first and keep the grids of
their places.

Source: Frantar, Ashkboos, Hoefler, Alistarh, "GPTQ: accurate post-training quantization for generative pre-trained
transformers", ICLR 2023, algorithm 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mfac_kernels.fisher import _checks
from mfac_kernels.pruning import _layers
from mfac_kernels.pruning._columns import InverseFactor, change_columns, inverse_factor, matrix_and_hessian
from mfac_kernels.pruning.grid import Quantized, assign, encode, grid, spread

__all__ = ["gptq"]


@torch.no_grad()
def gptq(
    layer: _layers.Layer,
    hessian: Tensor,
    bits: int = 4,
    *,
    group_size: int | None = None,
    symmetric: bool = False,
    actorder: bool = False,
    damping: float = 0.01,
    block_size: int = 128,
    inverse_factor: InverseFactor = inverse_factor,
) -> Quantized:
    """Quantise the layer's weight, in place.

    Args:
        layer: Linear, Conv1d, Conv2d, Conv3d with any groups, or transformers' Conv1D; or a parameter (rows, columns),
            or that of several experts (experts, rows, columns).
        hessian: (columns, columns), or one for each group or expert (.., columns, columns), as :class:`LayerHessian`
            has it, in any scale. Columns whose diagonal is 0 become 0; one that is 0 altogether, as that of an expert
            without tokens, says nothing, and columns are rounded to nearest.
        bits: 2 to 16.
        group_size: columns that share a grid; None: all of a row.
        symmetric: see :mod:`mfac_kernels.pruning.grid`.
        actorder: begin with the columns whose inputs have the largest second moment.
        damping: relative to the mean of the diagonal.
        block_size: columns after which the rest of the weight is updated; the result is the same but for rounding.
        inverse_factor: (hessian (groups, n, n), damping) -> U, to compare with.

    Returns:
        the codes and the grids; the weight is (codes - zero) scale, rounded to its dtype.

    Raises:
        TypeError, ValueError: an argument outside these ranges; a weight that is not finite.
        torch.linalg.LinAlgError: the damped Hessian is not positive definite, or not finite. The layer is as it was,
            after any exception.
    """
    weights, h = matrix_and_hessian(layer, hessian)
    scale, zero = grid(weights, bits, group_size, symmetric)
    n = weights.shape[-1]
    order = torch.arange(n, device=h.device).expand(len(h), n)
    if actorder:
        order = h.diagonal(dim1=-2, dim2=-1).argsort(stable=True, descending=True)

    def ordered(columns: Tensor) -> Tensor:
        return columns.take_along_dim(order[:, None], 2)

    weights = ordered(weights)
    scales, zeros = (ordered(spread(t, group_size, n)) for t in (scale, zero))
    codes = torch.empty_like(weights)

    def nearest(i: int) -> Tensor:
        codes[..., i] = encode(weights[..., i], scales[..., i], zeros[..., i], bits)
        return (codes[..., i] - zeros[..., i]) * scales[..., i]

    factor = inverse_factor(ordered(h.take_along_dim(order[:, :, None], 1)), damping)
    change_columns(weights, factor, nearest, _checks.positive_int("block_size", block_size))
    order = order.argsort()
    return assign(layer, ordered(codes), scale, zero, group_size)
