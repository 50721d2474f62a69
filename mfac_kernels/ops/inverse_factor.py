"""Triangular factors of inverses: what quantisation and pruning of a layer take from its Hessian (GPTQ, SparseGPT).

    (A + damping I)^-1 = U^T U       U upper triangular, or lower

With J the reversal of indices and J (A + damping I) J = L L^T it is U = J L^-1 J: 2/3 n^3 flops, half of those of
``cholesky(cholesky_inverse(cholesky(H)), upper=True)``, which is the same U. Indices are reversed where blocks are read
and written. Beside ``out``, which may be ``blocks``, the memory is that of n^2 / 2 elements; on the CPU, where blocks
of ``out`` are contiguous, of 64 rows, or 128 with AVX-512.

Blocks, ``damping``, dtypes and ``info`` are those of :mod:`mfac_kernels.ops.cholesky`, but that elimination starts at
the last row: k > 0 is the order of the first *trailing* minor that is not positive (the leading one for
``upper=False``).

Sources: Frantar, Alistarh, "Optimal Brain Compression", NeurIPS 2022; Frantar et al., "GPTQ", ICLR 2023.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import mfac_kernels.ops._cholesky_fake  # noqa: F401  (loads the ops)
from mfac_kernels.ops._checks import check, shape_text, type_text
from mfac_kernels.ops._cholesky_batch import (
    Batch,
    Damping,
    broadcast,
    per_batch,
    prepare,
    raise_if_failed,
    refuse_gradients,
)

__all__ = ["cholesky_inverse_factor", "cholesky_inverse_factor_ex", "grouped_cholesky_inverse_factor_ex"]

_ops = torch.ops.mfac_kernels

Dead = bool | Tensor | None


def cholesky_inverse_factor_ex(
    blocks: Tensor,
    damping: Damping = 0.0,
    *,
    upper: bool = True,
    relative: bool = False,
    dead: Dead = None,
    out: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """U with ``(blocks + damping I)^-1 = U^T U``, and a code for each block: never raises for values, never waits.

    Args:
        blocks: (..., n, n), any floating dtype and strides; the lower triangle is read.
        damping: a number, or a tensor whose shape broadcasts with (...).
        upper: U is upper triangular with zeros below the diagonal; or lower triangular with zeros above.
        relative: the damping is ``damping`` times the mean of the block's diagonal.
        dead: True: rows whose diagonal is 0 get 1 there, as a layer's inputs that are never active need; or which rows
            do, bool, broadcasting with (..., n). The mean is taken afterwards.
        out, dtype: as for :func:`~mfac_kernels.ops.cholesky_inverse_ex`.

    Returns:
        U (..., n, n), NaN where ``info`` is not 0; ``info`` (...) int32, as this module's head says.

    The relative error of U is c n eps cond. Not differentiable.
    """
    op = "cholesky_inverse_factor_ex"
    batch = Batch(op, "blocks", blocks, damping, out, dtype)
    (factor,), info = _factors(op, [batch], upper, relative, [dead])
    return factor, batch.codes(info)


def cholesky_inverse_factor(
    blocks: Tensor,
    damping: Damping = 0.0,
    *,
    upper: bool = True,
    relative: bool = False,
    dead: Dead = None,
    out: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """:func:`cholesky_inverse_factor_ex` that waits for the result and raises if a block has failed.

    Raises:
        torch.linalg.LinAlgError: which block, which minor (or that it is not finite), at which damping.
    """
    op = "cholesky_inverse_factor"
    batch = Batch(op, "blocks", blocks, damping, out, dtype)
    (factor,), info = _factors(op, [batch], upper, relative, [dead])
    minor = "trailing" if upper else "leading"
    used = batch.damping.expand(batch.shape.numel()).view(batch.shape)
    raise_if_failed(op, batch.codes(info), used, f"the {minor} minor of order {{}} is not positive")
    return factor


def grouped_cholesky_inverse_factor_ex(
    batches: Sequence[Tensor],
    damping: Damping | Sequence[Damping] = 0.0,
    *,
    upper: bool = True,
    relative: bool = False,
    dead: Dead | Sequence[Dead] = None,
    dtype: torch.dtype | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """:func:`cholesky_inverse_factor_ex` of several batches, of mixed sizes and dtypes, as one op.

    Args:
        batches: tensors (..., n, n) on one device.
        damping, dead: one for all batches, or a list or tuple with one for each.

    Returns:
        the factors and the infos, in the order of ``batches``.
    """
    op = "grouped_cholesky_inverse_factor_ex"
    prepared = prepare(op, batches, damping, dtype)
    if not prepared:
        return [], []
    factors, info = _factors(op, prepared, upper, relative, each_dead(op, dead, len(prepared)))
    return factors, per_batch(info, prepared)


def each_dead(op: str, dead: Dead | Sequence[Dead], count: int) -> Sequence[Dead]:
    """One for each of ``count`` batches."""
    if not isinstance(dead, Sequence):
        return [dead] * count
    check(len(dead) == count, f"{op}: dead: expected {count}, one per batch, got {len(dead)}")
    return dead


def revive(op: str, batch: Batch, dead: Dead, buffer: Tensor) -> None:
    """The batch's blocks in ``buffer``, with 1 on the diagonal of dead rows, take the place of the batch's own."""
    if dead is None or dead is False:
        return
    blocks = batch.blocks
    square = blocks.shape[-1] == blocks.shape[-2]
    check(square, f"{op}: blocks: expected shape (..., n, n), got {shape_text(blocks.shape)}")
    rows = blocks.shape[:-1]
    if isinstance(dead, Tensor):
        check(dead.dtype == torch.bool, f"{op}: dead: expected bool, got {type_text(dead.dtype)}")
        fits = broadcast(op, "dead", dead.shape, rows) == rows
        check(fits, f"{op}: dead: expected a shape that expands to {shape_text(rows)}, got {shape_text(dead.shape)}")
    batch.blocks = buffer.copy_(blocks)
    diagonal = buffer.diagonal(dim1=-2, dim2=-1)
    diagonal.masked_fill_(dead if isinstance(dead, Tensor) else diagonal == 0, 1)


def _factors(
    op: str, batches: Sequence[Batch], upper: bool, relative: bool, dead: Sequence[Dead]
) -> tuple[list[Tensor], Tensor]:
    """The factors, and info of all blocks, batch after batch."""
    refuse_gradients(op, *(tensor for batch in batches for tensor in batch.tensors))
    results = [batch.buffer() for batch in batches]
    for batch, mask, result in zip(batches, dead, results, strict=True):
        revive(op, batch, mask, result)
        if relative:
            batch.damping = batch.relative_damping()
    blocks, dampings = [batch.blocks for batch in batches], [batch.damping for batch in batches]
    info: Tensor = _ops.cholesky_inverse_factor_(results, blocks, dampings, upper)
    return [batch.finish(result) for batch, result in zip(batches, results, strict=True)], info
