"""Inverses of triangular blocks: R^-1 of Cholesky-QR, for one.

Batches, dtypes and strides are those of :mod:`mfac_kernels.ops.cholesky`. ``info`` (...) int32 has a code per block: 0;
or k > 0, the order of the first leading minor that is 0 (the first trailing one of upper triangular blocks); or -1, the
triangle is not finite. A block that fails is NaN and touches no other.
"""

from __future__ import annotations

import torch
from torch import Tensor

import mfac_kernels.ops._cholesky_fake  # noqa: F401  (loads the ops)
from mfac_kernels.ops._cholesky_batch import Batch, raise_if_failed, refuse_gradients

__all__ = ["triangular_inverse", "triangular_inverse_ex"]

_ops = torch.ops.mfac_kernels


def triangular_inverse_ex(
    blocks: Tensor, *, upper: bool = False, out: Tensor | None = None, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """The inverse of each block's triangle, zero beyond it, and a code: never raises for values, never waits.

    Args:
        blocks: (..., n, n), any floating dtype and strides; the lower triangle, or the upper one, is read.
        out: where to write, (..., n, n) of any floating dtype; may be ``blocks`` itself.
        dtype: of the inverse. Default: float64 for float64 blocks, else float32.

    Returns:
        inverse (..., n, n), NaN where ``info`` is not 0; ``info`` (...) int32, as this module's head says.

    n^3 / 3 flops a block. Not differentiable.
    """
    return _inverses("triangular_inverse_ex", blocks, upper, out, dtype)


def triangular_inverse(
    blocks: Tensor, *, upper: bool = False, out: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """:func:`triangular_inverse_ex` that waits for the result and raises torch.linalg.LinAlgError if a block failed."""
    op = "triangular_inverse"
    inverse, info = _inverses(op, blocks, upper, out, dtype)
    raise_if_failed(op, info, None, f"the {'trailing' if upper else 'leading'} minor of order {{}} is zero")
    return inverse


def _inverses(
    op: str, blocks: Tensor, upper: bool, out: Tensor | None, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    batch = Batch(op, "blocks", blocks, 0.0, out, dtype)
    refuse_gradients(op, *batch.tensors)
    inverse = batch.buffer()
    info: Tensor = _ops.triangular_inverse_([inverse], [batch.blocks], upper)
    return batch.finish(inverse), batch.codes(info)
