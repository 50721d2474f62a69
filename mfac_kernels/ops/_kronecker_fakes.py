"""The checks of csrc/kronecker/checks.h, in the same words, as fake implementations of the ops of Kronecker factors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

import mfac_kernels._library  # noqa: F401  (the ops must exist)
from mfac_kernels.ops._checks import check, check_dtype, check_state, shape_text, type_text
from mfac_kernels.ops._geometry import Geometry

_MOST = 2**31 - 1  # of a number of a geometry, and of the offsets of a kernel


def accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def check_scale(op: str, name: str, number: float, values: Tensor | None = None, count: int = 1) -> None:
    check(math.isfinite(number), f"{op}: {name}: expected a finite number, got {number:g}")
    if values is not None:
        check(values.dtype == torch.float64, f"{op}: {name}: expected Double, got {type_text(values.dtype)}")
        check(values.numel() in (1, count), f"{op}: {name}: expected 1 or {count} values, got {values.numel()}")
        check(values.is_contiguous(), f"{op}: {name}: expected a contiguous tensor")


def check_scales(op: str, beta: float, alpha: float) -> None:
    check_scale(op, "beta", beta)
    check_scale(op, "alpha", alpha)


def check_refused(op: str, refused: Tensor | None, count: int = 1) -> None:
    if refused is not None:
        check_state(op, "refused", refused, torch.int32, (count,))


def _check_factors(op: str, factor: Tensor, x: Tensor, groups: int, columns: int, bias: bool) -> None:
    check_state(op, "factor", factor, accumulator(x), (groups, columns + bias, columns + bias))


def check_factor(
    op: str, factor: Tensor, x: Tensor, groups: int, columns: int, bias: bool, name: str = "factor"
) -> None:
    dtype, features = accumulator(x), columns + bias
    if groups > 1:
        _check_factors(op, factor, x, groups, columns, bias)
    elif factor.dim() == 3:
        size = factor.shape[1]
        check(size > 0, f"{op}: {name}: expected blocks of at least one row, got shape {shape_text(factor.shape)}")
        check_state(op, name, factor, dtype, (-(-features // size), size, size))
    else:
        check_state(op, name, factor, dtype, (features, features))


def _check_matrix(op: str, name: str, x: Tensor) -> None:
    check(x.dim() > 0, f"{op}: {name}: expected at least 1 dimension, got shape {shape_text(x.shape)}")
    check_dtype(op, name, x)


def _check_weights(op: str, weights: Tensor | None, x: Tensor, name: str = "weights") -> None:
    if weights is None:
        return
    expected = accumulator(x)
    check(weights.dtype == expected, f"{op}: {name}: expected {type_text(expected)}, got {type_text(weights.dtype)}")
    check(
        weights.shape == x.shape[:-1],
        f"{op}: {name}: expected the leading shape of x, got {shape_text(weights.shape)} for x of shape "
        f"{shape_text(x.shape)}",
    )


def _check_offsets(op: str, offsets: Tensor, x: Tensor) -> None:
    check(
        offsets.dtype in (torch.int32, torch.int64),
        f"{op}: offsets: expected int32 or int64, got {type_text(offsets.dtype)}",
    )
    check(
        offsets.dim() == 1 and offsets.shape[0] > 0,
        f"{op}: offsets: expected shape (groups + 1,), got {shape_text(offsets.shape)}",
    )
    check(x.dim() == 2, f"{op}: x: expected 2 dimensions, as there are offsets, got shape {shape_text(x.shape)}")


def check_geometry(op: str, geometry: Geometry, dims: int) -> None:
    for (name, values), least in zip(geometry._asdict().items(), (1, 1, 0, 0, 1), strict=True):
        check(len(values) == dims, f"{op}: {name}: expected {dims} numbers, got {len(values)}")
        for value in values:
            check(value >= least, f"{op}: {name}: expected at least {least}, got {value}")
            check(value <= _MOST, f"{op}: {name}: expected at most {_MOST}, got {value}")


def check_conv(op: str, x: Tensor, geometry: Geometry, groups: int) -> None:
    check(3 <= x.dim() <= 5, f"{op}: x: expected 3 to 5 dimensions, got shape {shape_text(x.shape)}")
    check_dtype(op, "x", x)
    check_geometry(op, geometry, x.dim() - 2)
    channels = x.shape[1]
    check(
        groups > 0 and channels % groups == 0,
        f"{op}: groups: expected a divisor of {channels} channels, got {groups}",
    )
    patches = x.shape[0] or 1
    for dimension, axis in enumerate(geometry.axes, 2):
        padded = x.shape[dimension] + axis.before + axis.after
        check(
            padded > axis.reach,
            f"{op}: kernel_size: expected a kernel that fits into the padded input, got one of extent "
            f"{axis.reach + 1} for {padded} in dimension {dimension}",
        )
        patches *= (padded - axis.reach - 1) // axis.stride + 1
    check(geometry.offsets <= _MOST, f"{op}: kernel_size: expected at most {_MOST} offsets")
    check(patches < 2**63, f"{op}: padding_before: expected at most {2**63 - 1} patches")


@torch.library.register_fake("mfac_kernels::linear_factor_")
def _(
    factor: Tensor,
    x: Tensor,
    weights: Tensor | None,
    bias: bool,
    beta: float,
    alpha: float,
    refused: Tensor | None,
    allow_tf32: bool = False,
    offsets: Tensor | None = None,
    betas: Tensor | None = None,
    alphas: Tensor | None = None,
) -> None:
    op = "linear_factor_"
    _check_matrix(op, "x", x)
    _check_weights(op, weights, x)
    count = 1
    if offsets is None:
        check_factor(op, factor, x, 1, x.shape[-1], bias)
    else:
        _check_offsets(op, offsets, x)
        count = offsets.shape[0] - 1
        _check_factors(op, factor, x, count, x.shape[-1], bias)
    check_scale(op, "beta", beta, betas, count)
    check_scale(op, "alpha", alpha, alphas, count)
    check_refused(op, refused, count)


@torch.library.register_fake("mfac_kernels::grouped_linear_factor_")
def _(
    factors: Sequence[Tensor],
    x: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    bias: Sequence[bool],
    beta: float,
    alpha: float,
    refused: Tensor | None,
    allow_tf32: bool = False,
    betas: Tensor | None = None,
    alphas: Tensor | None = None,
) -> None:
    op, count = "grouped_linear_factor_", len(factors)
    for name, given in (("x", x), ("weights", weights), ("bias", bias)):
        check(len(given) == count, f"{op}: {name}: expected {count}, as factors has, got {len(given)}")
    for i, (factor, rows, each, one) in enumerate(zip(factors, x, weights, bias, strict=True)):
        _check_matrix(op, f"x[{i}]", rows)
        _check_weights(op, each, rows, f"weights[{i}]")
        check_factor(op, factor, rows, 1, rows.shape[-1], one, f"factors[{i}]")
    check_scale(op, "beta", beta, betas, count)
    check_scale(op, "alpha", alpha, alphas, count)
    check_refused(op, refused, count)


@torch.library.register_fake("mfac_kernels::conv_factor_")
def _(
    factor: Tensor, x: Tensor,
    kernel_size: Sequence[int], stride: Sequence[int],
    padding_before: Sequence[int], padding_after: Sequence[int], dilation: Sequence[int],
    groups: int, bias: bool, sua: bool, reduce: bool, beta: float, alpha: float,
    refused: Tensor | None, allow_tf32: bool = False,
) -> None:  # fmt: skip
    op = "conv_factor_"
    geometry = Geometry(kernel_size, stride, padding_before, padding_after, dilation)
    check_conv(op, x, geometry, groups)
    check_factor(op, factor, x, groups, x.shape[1] // groups * (1 if sua else geometry.offsets), bias)
    check_scales(op, beta, alpha)
    check_refused(op, refused)


@torch.library.register_fake("mfac_kernels::embedding_factor_")
def _(counts: Tensor, indices: Tensor, padding_idx: int | None, beta: float, alpha: float) -> None:
    op = "embedding_factor_"
    check(
        counts.dtype in (torch.float32, torch.float64),
        f"{op}: counts: expected float32 or float64, got {type_text(counts.dtype)}",
    )
    check(counts.dim() == 1, f"{op}: counts: expected 1 dimension, got shape {shape_text(counts.shape)}")
    check(counts.is_contiguous(), f"{op}: counts: expected a contiguous tensor")
    check(
        indices.dtype in (torch.int32, torch.int64),
        f"{op}: indices: expected int32 or int64, got {type_text(indices.dtype)}",
    )
    check_scales(op, beta, alpha)


@torch.library.register_fake("mfac_kernels::cross_factor")
def _(x: Tensor, y: Tensor, weights: Tensor | None) -> Tensor:
    op = "cross_factor"
    _check_matrix(op, "x", x)
    _check_matrix(op, "y", y)
    check(y.dtype == x.dtype, f"{op}: y: expected {type_text(x.dtype)}, as x has, got {type_text(y.dtype)}")
    check(
        y.shape[:-1] == x.shape[:-1],
        f"{op}: y: expected the leading shape of x, got {shape_text(y.shape)} for x of shape {shape_text(x.shape)}",
    )
    _check_weights(op, weights, x)
    return x.new_empty(x.shape[-1], y.shape[-1], dtype=accumulator(x))
