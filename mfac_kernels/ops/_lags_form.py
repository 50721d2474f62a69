"""The compressed form of a stride-1 convolution's factor (csrc/kronecker/lags.h): its size, the fakes of its ops."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mfac_kernels.ops import _kronecker_fakes as kronecker
from mfac_kernels.ops._checks import check, check_dtype, check_state, shape_text, type_text


def _regions(kernel: int, before: int, after: int, dilation: int, lag: int) -> int:
    """How many distinct margins the pairs of offsets (o, o + lag) of one axis have."""
    return len(
        {
            (max(0, dilation * o - before), max(0, dilation * (kernel - 1 - o - lag) - after))
            for o in range(kernel - lag)
        }
    )


def slots(
    kernel_size: Sequence[int], padding_before: Sequence[int], padding_after: Sequence[int], dilation: Sequence[int]
) -> int:
    """How many C x C sums a group's state holds."""
    whole, zero = 1, 1  # of all lags in the plane; of lag 0
    for axis in zip(kernel_size, padding_before, padding_after, dilation, strict=True):
        regions = [_regions(*axis, lag) for lag in range(axis[0])]
        whole *= regions[0] + 2 * sum(regions[1:])
        zero *= regions[0]
    return (whole + zero) // 2  # a lag and its opposite share theirs


def state_size(
    channels: int,
    kernel_size: Sequence[int],
    padding_before: Sequence[int],
    padding_after: Sequence[int],
    dilation: Sequence[int],
    bias: bool,
) -> int:
    """Of one group of so many channels."""
    sums = slots(kernel_size, padding_before, padding_after, dilation) * channels**2
    return sums + (math.prod(kernel_size) * channels + 1 if bias else 0)


def _check_form(
    op: str,
    kernel_size: Sequence[int],
    padding_before: Sequence[int],
    padding_after: Sequence[int],
    dilation: Sequence[int],
) -> None:
    spatial = len(kernel_size)
    check(1 <= spatial <= 2, f"{op}: kernel_size: expected 1 or 2 numbers, got {spatial}")
    kronecker.check_list(op, "kernel_size", kernel_size, spatial, 1)
    kronecker.check_list(op, "padding_before", padding_before, spatial, 0)
    kronecker.check_list(op, "padding_after", padding_after, spatial, 0)
    kronecker.check_list(op, "dilation", dilation, spatial, 1)


@torch.library.register_fake("mfac_kernels::conv_lags_")
def _(
    state: Tensor,
    x: Tensor,
    kernel_size: Sequence[int],
    padding_before: Sequence[int],
    padding_after: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    bias: bool,
    fft: bool,
    beta: float,
    alpha: float,
    refused: Tensor | None,
) -> None:
    op = "conv_lags_"
    kronecker.check_scales(op, beta, alpha)
    form = (kernel_size, padding_before, padding_after, dilation)
    _check_form(op, *form)
    kronecker.check_conv(op, x, kernel_size, [1] * len(kernel_size), *form[1:], groups)
    size = state_size(x.shape[1] // groups, *form, bias)
    check_state(op, "state", state, kronecker.accumulator(x), (groups, size))
    kronecker.check_refused(op, refused)


@torch.library.register_fake("mfac_kernels::conv_expand_")
def _(
    factor: Tensor,
    state: Tensor,
    kernel_size: Sequence[int],
    padding_before: Sequence[int],
    padding_after: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    bias: bool,
    beta: float,
    alpha: float,
) -> None:
    op = "conv_expand_"
    kronecker.check_scales(op, beta, alpha)
    form = (kernel_size, padding_before, padding_after, dilation)
    _check_form(op, *form)
    check_dtype(op, "state", state)
    check(
        state.dtype in (torch.float32, torch.float64),
        f"{op}: state: expected Float or Double, got {type_text(state.dtype)}",
    )
    check(groups > 0, f"{op}: groups: expected at least 1, got {groups}")
    check(state.dim() == 2, f"{op}: state: expected 2 dimensions, got shape {shape_text(state.shape)}")
    channels = state_channels(state.shape[1], *form, bias)
    offsets = math.prod(kernel_size)
    check(
        channels is not None,
        f"{op}: state: expected the sums of a kernel of {offsets} offsets, got shape {shape_text(state.shape)}",
    )
    assert channels is not None
    check_state(op, "state", state, state.dtype, (groups, state.shape[1]))
    kronecker.check_factor(op, factor, state, groups, channels * offsets, bias)


def state_channels(
    size: int,
    kernel_size: Sequence[int],
    padding_before: Sequence[int],
    padding_after: Sequence[int],
    dilation: Sequence[int],
    bias: bool,
) -> int | None:
    """The inverse of :func:`state_size`, if there is one."""
    form = (kernel_size, padding_before, padding_after, dilation, bias)
    # There are at least as many slots as offsets, so that what a bias adds to slots C^2 is less than the next square.
    channels = math.isqrt(size // slots(*form[:4]))
    return channels if state_size(channels, *form) == size else None
