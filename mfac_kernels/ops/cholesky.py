"""Inverses, factors and solves of damped symmetric positive definite blocks, thousands in one call.

    A + damping I = L L^T        cholesky_factor, cholesky_factor_ex
    (A + damping I)^-1           cholesky_inverse, cholesky_inverse_ex, grouped_cholesky_inverse_ex
    (A + damping I)^-1 = U^T U   see mfac_kernels.ops.inverse_factor
    (L L^T)^-1 b                 cholesky_solve

A batch is a tensor (..., n, n) with any strides, of which the lower triangle alone is read. ``damping`` is a number, or
a tensor on the batch's device that broadcasts with (...); it may be zero. float32, bfloat16 and float16 are computed in
float32, float64 in float64.

``info`` (...) int32 has a code per block: 0; or k > 0, the order of the first leading minor of the damped block that is
not positive; or -1, the block or its damping is not finite. A block that fails is NaN and touches no other. The
functions that return ``info`` never wait for the device; the others do, to raise: no torch.compile(fullgraph=True).

The relative error of an inverse is c n eps cond. Results are the same bit for bit whatever the number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import mfac_kernels.ops._cholesky_fake  # noqa: F401  (loads the ops)
from mfac_kernels.ops._checks import check
from mfac_kernels.ops._cholesky_batch import (
    Batch,
    Damping,
    broadcast,
    per_batch,
    prepare,
    raise_if_failed,
    refuse_gradients,
)

__all__ = [
    "cholesky_factor",
    "cholesky_factor_ex",
    "cholesky_inverse",
    "cholesky_inverse_ex",
    "cholesky_solve",
    "grouped_cholesky_inverse_ex",
]

_ops = torch.ops.mfac_kernels


def cholesky_inverse_ex(
    blocks: Tensor, damping: Damping = 0.0, *, out: Tensor | None = None, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """``(blocks + damping I)^-1``, exactly symmetric, and a code for each block: never raises for values, never waits.

    Args:
        blocks: (..., n, n), any floating dtype and strides; the lower triangle is read.
        damping: a number, or a tensor whose shape broadcasts with (...): one matrix with many dampings is one call.
        out: where to write the inverse, (..., n, n) of any floating dtype; may be ``blocks`` itself.
        dtype: of the inverse; float64 is that of the arithmetic too. Default: float64 for float64 blocks, else float32.

    Returns:
        inverse (..., n, n), NaN where ``info`` is not 0; ``info`` (...) int32, as this module's head says.

    Differentiable twice, in blocks and damping: d inverse = -inverse dA inverse. As A is symmetric, so is its gradient.
    """
    if _is_plain(blocks, damping, out, dtype):
        return _ops.cholesky_inverse_ex(blocks, damping)  # type: ignore[no-any-return]
    batch = Batch("cholesky_inverse_ex", "blocks", blocks, damping, out, dtype)
    (inverse,), info = _inverses("cholesky_inverse_ex", [batch])
    return inverse, batch.codes(info)


def cholesky_inverse(
    blocks: Tensor, damping: Damping = 0.0, *, out: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """:func:`cholesky_inverse_ex` that waits for the result and raises if a block has failed.

    Raises:
        torch.linalg.LinAlgError: which block, which leading minor (or that it is not finite), at which damping.
    """
    inverse, info = cholesky_inverse_ex(blocks, damping, out=out, dtype=dtype)
    raise_if_failed("cholesky_inverse", info, damping)
    return inverse


def grouped_cholesky_inverse_ex(
    batches: Sequence[Tensor], damping: Damping | Sequence[Damping] = 0.0, *, dtype: torch.dtype | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """:func:`cholesky_inverse_ex` of several batches, of mixed sizes and dtypes, as one op: every layer of a network.

    Args:
        batches: tensors (..., n, n) on one device.
        damping: one for all batches, or a list or tuple with one for each.
        dtype: as for one batch.

    Returns:
        the inverses and the infos, in the order of ``batches``.
    """
    op = "grouped_cholesky_inverse_ex"
    prepared = prepare(op, batches, damping, dtype)
    if not prepared:
        return [], []
    inverses, info = _inverses(op, prepared)
    return inverses, per_batch(info, prepared)


def cholesky_factor_ex(
    blocks: Tensor,
    damping: Damping = 0.0,
    *,
    upper: bool = False,
    out: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """L, lower triangular with a zero upper triangle, of ``blocks + damping I = L L^T``, and a code for each block.

    With ``upper`` L^T, and ``out`` must be memory apart from ``blocks``. The other arguments, and the codes, are those
    of :func:`cholesky_inverse_ex`. Not differentiable.
    """
    op = "cholesky_factor_ex"
    if not upper and _is_plain(blocks, damping, out, dtype):
        return _ops.cholesky_factor_ex(blocks, damping)  # type: ignore[no-any-return]
    batch = Batch(op, "blocks", blocks, damping, out, dtype)
    refuse_gradients(op, *batch.tensors)
    factor = batch.buffer()
    info: Tensor = _ops.cholesky_factor_([factor.mT if upper else factor], [batch.blocks], [batch.damping])
    return batch.finish(factor), batch.codes(info)


def cholesky_factor(
    blocks: Tensor,
    damping: Damping = 0.0,
    *,
    upper: bool = False,
    out: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """:func:`cholesky_factor_ex` that raises as :func:`cholesky_inverse` does."""
    factor, info = cholesky_factor_ex(blocks, damping, upper=upper, out=out, dtype=dtype)
    raise_if_failed("cholesky_factor", info, damping)
    return factor


def cholesky_solve(factor: Tensor, b: Tensor) -> Tensor:
    """``(L L^T)^-1 b``: factor (..., n, n), of which the lower triangle is read, b (..., n, k) -> (..., n, k).

    The batches broadcast. The dtype is the wider of the two, float32 at least. NaN for a factor that has failed. Not
    differentiable.
    """
    op = "cholesky_solve"
    check(b.dim() >= 2, f"{op}: b: expected shape (..., n, k), got {tuple(b.shape)}")
    check(factor.dim() >= 2, f"{op}: factor: expected shape (..., n, n), got {tuple(factor.shape)}")
    refuse_gradients(op, factor, b)
    batch = broadcast(op, "b", b.shape[:-2], factor.shape[:-2])
    dtype = torch.promote_types(torch.promote_types(factor.dtype, b.dtype), torch.float32)
    x = b.expand(*batch, *b.shape[-2:]).to(dtype, copy=True, memory_format=torch.contiguous_format)
    _ops.cholesky_solve_([x], [factor.to(dtype).expand(*batch, *factor.shape[-2:])])
    return x


def _is_plain(blocks: Tensor, damping: Damping, out: Tensor | None, dtype: torch.dtype | None) -> bool:
    """Whether there is nothing to prepare: an op does all, which for a small block is most of the time."""
    return isinstance(damping, (float, int)) and out is None and dtype is None and not blocks.requires_grad


def _inverses(op: str, batches: Sequence[Batch]) -> tuple[list[Tensor], Tensor]:
    """The inverses, and info of all blocks, batch after batch."""
    blocks, dampings = [batch.blocks for batch in batches], [batch.damping for batch in batches]
    if torch.is_grad_enabled() and any(t.requires_grad for batch in batches for t in batch.tensors):
        check(all(batch.out is None for batch in batches), f"{op}: out: expected none where a gradient is required")
        dtypes = [batch.compute_dtype for batch in batches]
        info, *results = _Inverse.apply(dtypes, *blocks, *dampings)  # type: ignore[no-untyped-call]
    else:
        results = [batch.buffer() for batch in batches]
        info = _ops.cholesky_inverse_(results, blocks, dampings)
    return [batch.finish(result) for batch, result in zip(batches, results, strict=True)], info


class _Inverse(torch.autograd.Function):
    """The op with its derivative; (dtypes, *blocks, *dampings) -> (info, *inverses)."""

    @staticmethod
    def forward(ctx: Any, dtypes: Sequence[torch.dtype], *tensors: Tensor) -> tuple[Tensor, ...]:
        blocks, dampings = tensors[: len(dtypes)], tensors[len(dtypes) :]
        inverses = [torch.empty(b.shape, dtype=d, device=b.device) for b, d in zip(blocks, dtypes, strict=True)]
        info = _ops.cholesky_inverse_(inverses, blocks, dampings)
        ctx.save_for_backward(*inverses)
        ctx.mark_non_differentiable(info)
        ctx.set_materialize_grads(False)
        ctx.blocks = [(b.dtype, d.numel()) for b, d in zip(blocks, dampings, strict=True)]
        return info, *inverses

    @staticmethod
    def backward(ctx: Any, _: None, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """dA = -X sym(G) X and d damping = tr dA, in terms that can be differentiated again."""
        d_blocks: list[Tensor | None] = []
        d_dampings: list[Tensor | None] = []
        for x, g, (dtype, dampings) in zip(ctx.saved_tensors, gradients, ctx.blocks, strict=True):
            if g is None:
                d_blocks.append(None)
                d_dampings.append(None)
                continue
            d_block = -x @ ((g + g.mT) / 2) @ x
            d_damping = d_block.diagonal(dim1=-2, dim2=-1).sum(-1, dtype=torch.float64).reshape(-1)
            d_blocks.append(d_block.to(dtype))
            d_dampings.append(d_damping if dampings == len(d_damping) else d_damping.sum().view(1))
        return None, *d_blocks, *d_dampings
