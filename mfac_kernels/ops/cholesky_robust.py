"""Inverses, and factors of inverses, whatever the blocks are: what fails is repeated with more care, and told."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mfac_kernels.ops._checks import check
from mfac_kernels.ops._cholesky_batch import Batch, Damping, per_batch, prepare, refuse_gradients
from mfac_kernels.ops.inverse_factor import Dead, each_dead, revive

__all__ = ["RobustInverse", "RobustInverseFactor", "robust_cholesky_inverse", "robust_cholesky_inverse_factor"]

_ops = torch.ops.mfac_kernels

Run = Callable[[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor], Tensor | None], Tensor]
"""(out, blocks, damping, only) -> info: one of the library's ops."""


class RobustInverse(NamedTuple):
    """What :func:`robust_cholesky_inverse` returns: three lists with an entry per batch, in the order of the batches.

    Attributes:
        inverses: (..., n, n), NaN where ``attempts`` is negative.
        attempts: (...) int32: 0, as asked; 1, in float64; 1 + k, in float64 with the k-th larger damping; -1, the block
            is not finite; -2, failed up to the bound.
        dampings: (...) float64, of the inverse; for a block without one, the last that was tried.
    """

    inverses: list[Tensor]
    attempts: list[Tensor]
    dampings: list[Tensor]


class RobustInverseFactor(NamedTuple):
    """What :func:`robust_cholesky_inverse_factor` returns: :class:`RobustInverse` with factors (..., n, n)."""

    factors: list[Tensor]
    attempts: list[Tensor]
    dampings: list[Tensor]


def robust_cholesky_inverse(
    batches: Sequence[Tensor],
    damping: Damping | Sequence[Damping] = 0.0,
    *,
    growth: float = 10.0,
    bound: float = 1.0,
    dtype: torch.dtype | None = None,
) -> RobustInverse:
    """``(A + damping I)^-1`` of every block; those that fail, and no others, in float64 and then with larger dampings.

    With t the mean absolute value of a block's diagonal, the k-th larger damping is

        min(max(growth damping, eps t) growth^(k-1), max(bound t, damping)),      eps: of the batch's dtype

    up to the first that is certain to be ``bound`` t. For a positive semidefinite A that rounding has made indefinite
    the bound of 1 is never reached: eigenvalues are wrong by about eps t n.

    On CUDA nothing waits for the device: every attempt is launched and leaves alone the blocks that have succeeded; the
    repeats take memory for the inverses in float64. On the CPU what is not needed is not done.

    Args:
        batches, damping, dtype: as for :func:`~mfac_kernels.ops.grouped_cholesky_inverse_ex`.
        growth: above 1.
        bound: of the damping, relative to t; positive.
    """
    op = "robust_cholesky_inverse"
    _check_growth(op, growth, bound)
    return RobustInverse(*_robust(op, prepare(op, batches, damping, dtype), _ops.cholesky_inverse_, growth, bound))


def robust_cholesky_inverse_factor(
    batches: Sequence[Tensor],
    damping: Damping | Sequence[Damping] = 0.0,
    *,
    upper: bool = True,
    relative: bool = False,
    dead: Dead | Sequence[Dead] = None,
    growth: float = 10.0,
    bound: float = 1.0,
    dtype: torch.dtype | None = None,
) -> RobustInverseFactor:
    """U with ``(A + damping I)^-1 = U^T U`` of every block, by the attempts of :func:`robust_cholesky_inverse`.

    Args:
        batches, damping, upper, relative, dead, dtype: as for
            :func:`~mfac_kernels.ops.grouped_cholesky_inverse_factor_ex`. Batches with dead rows are copied.
        growth, bound: as for the inverse; t is the mean once dead rows have 1.
    """
    op = "robust_cholesky_inverse_factor"
    _check_growth(op, growth, bound)
    prepared = prepare(op, batches, damping, dtype)
    for batch, mask in zip(prepared, each_dead(op, dead, len(prepared)), strict=True):
        revive(op, batch, mask, torch.empty(batch.blocks.shape, dtype=batch.blocks.dtype, device=batch.blocks.device))
        if relative:
            batch.damping = batch.relative_damping()

    def run(
        out: Sequence[Tensor], blocks: Sequence[Tensor], shifts: Sequence[Tensor], only: Tensor | None = None
    ) -> Tensor:
        info: Tensor = _ops.cholesky_inverse_factor_(out, blocks, shifts, upper, only)
        return info

    return RobustInverseFactor(*_robust(op, prepared, run, growth, bound))


def _check_growth(op: str, growth: float, bound: float) -> None:
    check(1 < growth < math.inf, f"{op}: growth: expected a finite number above 1, got {growth:g}")
    check(0 < bound < math.inf, f"{op}: bound: expected a positive finite number, got {bound:g}")


def _robust(
    op: str, prepared: Sequence[Batch], run: Run, growth: float, bound: float
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Results, attempts and dampings of every batch."""
    if not prepared:
        return [], [], []
    refuse_gradients(op, *(tensor for batch in prepared for tensor in batch.tensors))
    blocks, shifts = [batch.blocks for batch in prepared], [batch.damping for batch in prepared]
    results = [batch.buffer() for batch in prepared]
    info = run(results, blocks, shifts, None)
    used = torch.cat([batch.damping.expand(batch.shape.numel()) for batch in prepared])
    attempts = torch.zeros_like(info)
    if not _settled(info):
        attempts, used = _repeat(run, blocks, results, info, used, growth, bound)
    return (
        [batch.finish(result) for batch, result in zip(prepared, results, strict=True)],
        per_batch(attempts, prepared),
        per_batch(used, prepared),
    )


def _settled(info: Tensor) -> bool:
    """Whether no block has failed, where to look is free: neither on another device nor in a compiled graph."""
    return info.device.type == "cpu" and not torch.compiler.is_compiling() and not bool(info.any())


def _repeat(
    run: Run,
    blocks: Sequence[Tensor],
    results: Sequence[Tensor],
    info: Tensor,
    damping: Tensor,
    growth: float,
    bound: float,
) -> tuple[Tensor, Tensor]:
    """Writes the results of blocks whose ``info`` is not 0 to ``results``; attempts and dampings of all blocks."""
    counts = [b.shape[:-2].numel() for b in blocks]
    exact = [r if r.dtype == torch.float64 else torch.empty_like(r, dtype=torch.float64) for r in results]
    eps = [torch.finfo(b.dtype).eps for b in blocks]
    diagonals = [b.diagonal(dim1=-2, dim2=-1).abs().mean(-1, dtype=torch.float64).reshape(-1) for b in blocks]
    smallest = torch.cat([e * d for e, d in zip(eps, diagonals, strict=True)]).maximum(growth * damping)
    largest = (bound * torch.cat(diagonals)).maximum(damping)
    steps = 1 + max(0, math.ceil((math.log(bound) - math.log(min(eps))) / math.log(growth)))

    attempts, used, trial, failed = torch.zeros_like(info), damping, damping, info
    for attempt in range(1, steps + 2):
        attempts = torch.where(failed != 0, attempt, attempts)
        used = torch.where(failed != 0, trial, used)
        failed = run(exact, blocks, trial.split_with_sizes(counts), failed)
        if _settled(failed):
            break
        trial = torch.minimum(smallest, largest)
        smallest = smallest * growth
    attempts = torch.where(failed == 0, attempts, torch.where(failed < 0, -1, -2))
    for result, wide, codes in zip(results, exact, info.split_with_sizes(counts), strict=True):
        if result is not wide:
            repeated = codes.view(result.shape[:-2])[..., None, None] != 0
            result.copy_(torch.where(repeated, wide, result))
    return attempts, used
