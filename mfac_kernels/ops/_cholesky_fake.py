"""Fake implementations of the Cholesky ops: the checks of csrc/cholesky/checks.h in the same words."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import mfac_kernels._library  # noqa: F401  (loads the ops)
from mfac_kernels.ops._checks import check, check_dtype, check_shape, check_state, shape_text, type_text


def _check_lengths(op: str, name: str, tensors: Sequence[Tensor], other: str, expected: Sequence[Tensor]) -> None:
    count = len(expected)
    check(len(tensors) == count, f"{op}: {name}: expected {count} tensors, as {other} has, got {len(tensors)}")


def _check_is(op: str, name: str, t: Tensor, dtype: torch.dtype) -> None:
    check(t.dtype == dtype, f"{op}: {name}: expected {type_text(dtype)}, got {type_text(t.dtype)}")


def _check_computed(op: str, name: str, t: Tensor) -> None:
    good = t.dtype in (torch.float32, torch.float64)
    check(good, f"{op}: {name}: expected float32 or float64, got {type_text(t.dtype)}")


def _check_square(op: str, name: str, t: Tensor) -> None:
    square = t.dim() >= 2 and t.shape[-1] == t.shape[-2]
    check(square, f"{op}: {name}: expected shape (..., n, n), got {shape_text(t.shape)}")


def _check_distinct(op: str, name: str, t: Tensor) -> None:
    for dim, (size, stride) in enumerate(zip(t.shape, t.stride(), strict=True)):
        distinct = size <= 1 or stride != 0 or t.numel() == 0
        check(distinct, f"{op}: {name}: expected distinct elements, got stride 0 in dimension {dim}")


def _check_batch(op: str, i: int, out: Tensor, blocks: Tensor) -> int:
    """csrc/cholesky/checks.h, add_batch; the number of blocks."""
    _check_square(op, f"blocks[{i}]", blocks)
    check_dtype(op, "blocks", blocks)
    _check_computed(op, f"out[{i}]", out)
    check(
        blocks.dtype != torch.float64 or out.dtype == torch.float64,
        f"{op}: out[{i}]: expected Double, as blocks[{i}] is, got Float",
    )
    check_shape(op, f"out[{i}]", out, blocks.shape)
    _check_distinct(op, f"out[{i}]", out)
    return blocks.shape[:-2].numel()


def _check_damped(
    op: str, out: Sequence[Tensor], blocks: Sequence[Tensor], damping: Sequence[Tensor], only: Tensor | None
) -> Tensor:
    """csrc/cholesky/checks.h, check_damped_batches."""
    _check_lengths(op, "out", out, "blocks", blocks)
    _check_lengths(op, "damping", damping, "blocks", blocks)
    total = 0
    for i, (o, b, d) in enumerate(zip(out, blocks, damping, strict=True)):
        count = _check_batch(op, i, o, b)
        _check_is(op, f"damping[{i}]", d, torch.float64)
        check(
            d.numel() == 1 or d.numel() == count,
            f"{op}: damping[{i}]: expected 1 or {count} values, got {d.numel()}",
        )
        check(d.is_contiguous(), f"{op}: damping[{i}]: expected a contiguous tensor")
        total += count
    if only is not None:
        check_state(op, "only", only, torch.int32, (total,))
    return blocks[0].new_empty(total, dtype=torch.int32)


def _new_result(op: str, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """csrc/cholesky/checks.h, new_result; and info."""
    _check_square(op, "blocks", blocks)
    check_dtype(op, "blocks", blocks)
    dtype = torch.float64 if blocks.dtype == torch.float64 else torch.float32
    return blocks.new_empty(blocks.shape, dtype=dtype), blocks.new_empty(blocks.shape[:-2], dtype=torch.int32)


@torch.library.register_fake("mfac_kernels::cholesky_inverse_ex")
def _(blocks: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    return _new_result("cholesky_inverse_ex", blocks)


@torch.library.register_fake("mfac_kernels::cholesky_factor_ex")
def _(blocks: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    return _new_result("cholesky_factor_ex", blocks)


@torch.library.register_fake("mfac_kernels::cholesky_inverse_")
def _(out: Sequence[Tensor], blocks: Sequence[Tensor], damping: Sequence[Tensor], only: Tensor | None = None) -> Tensor:
    return _check_damped("cholesky_inverse_", out, blocks, damping, only)


@torch.library.register_fake("mfac_kernels::cholesky_factor_")
def _(out: Sequence[Tensor], blocks: Sequence[Tensor], damping: Sequence[Tensor], only: Tensor | None = None) -> Tensor:
    return _check_damped("cholesky_factor_", out, blocks, damping, only)


@torch.library.register_fake("mfac_kernels::cholesky_inverse_factor_")
def _(
    out: Sequence[Tensor],
    blocks: Sequence[Tensor],
    damping: Sequence[Tensor],
    upper: bool,
    only: Tensor | None = None,
) -> Tensor:
    return _check_damped("cholesky_inverse_factor_", out, blocks, damping, only)


@torch.library.register_fake("mfac_kernels::triangular_inverse_")
def _(out: Sequence[Tensor], blocks: Sequence[Tensor], upper: bool) -> Tensor:
    op = "triangular_inverse_"
    _check_lengths(op, "out", out, "blocks", blocks)
    total = sum(_check_batch(op, i, o, b) for i, (o, b) in enumerate(zip(out, blocks, strict=True)))
    return blocks[0].new_empty(total, dtype=torch.int32)


@torch.library.register_fake("mfac_kernels::cholesky_solve_")
def _(x: Sequence[Tensor], factors: Sequence[Tensor]) -> None:
    op = "cholesky_solve_"
    _check_lengths(op, "x", x, "factors", factors)
    for i, (b, f) in enumerate(zip(x, factors, strict=True)):
        _check_square(op, f"factors[{i}]", f)
        _check_computed(op, f"factors[{i}]", f)
        _check_is(op, f"x[{i}]", b, f.dtype)
        fits = b.dim() == f.dim() and b.shape[:-1] == f.shape[:-1]
        check(
            fits,
            f"{op}: x[{i}]: expected right-hand sides (..., n, k) of factors of shape {shape_text(f.shape)}, "
            f"got {shape_text(b.shape)}",
        )
        _check_distinct(op, f"x[{i}]", b)
