"""The compressed form of a stride-1 convolution's factor (csrc/lags/form.h): its size, the fakes of its ops."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mfac_kernels.ops import _kronecker_fakes as kronecker
from mfac_kernels.ops._checks import check, check_dtype, check_state, shape_text, type_text
from mfac_kernels.ops._geometry import Axis, Geometry

_MOST_OFFSETS = 4096
"""Of a kernel: pairs of offsets are counted one by one."""


def check_offsets(op: str, geometry: Geometry) -> None:
    """What the ops of the compressed form ask beyond what all convolutions do."""
    check(
        geometry.offsets <= _MOST_OFFSETS,
        f"{op}: kernel_size: expected at most {_MOST_OFFSETS} offsets in the compressed form",
    )


def _regions(axis: Axis, lag: int) -> int:
    """How many distinct margins the pairs of offsets (o, o + lag) have."""
    before = (axis.dilation * o - axis.before for o in range(axis.kernel - lag))
    after = (axis.reach - axis.dilation * (o + lag) - axis.after for o in range(axis.kernel - lag))
    return len({(max(0, b), max(0, a)) for b, a in zip(before, after, strict=True)})


def slots(geometry: Geometry) -> int:
    """How many C x C sums a group's state holds."""
    whole, zero = 1, 1  # of all lags in the plane; of lag 0
    for axis in geometry.axes:
        regions = [_regions(axis, lag) for lag in range(axis.kernel)]
        whole *= regions[0] + 2 * sum(regions[1:])
        zero *= regions[0]
    return (whole + zero) // 2  # a lag and its opposite share theirs


def state_size(channels: int, geometry: Geometry, bias: bool) -> int:
    """Of one group of so many channels."""
    return slots(geometry) * channels**2 + (geometry.offsets * channels + 1 if bias else 0)


def state_channels(size: int, geometry: Geometry, bias: bool) -> int | None:
    """The inverse of :func:`state_size`, if there is one."""
    # There are at least as many slots as offsets, so that what a bias adds to slots C^2 is less than the next square.
    channels = math.isqrt(size // slots(geometry))
    return channels if state_size(channels, geometry, bias) == size else None


def _form(
    op: str,
    kernel_size: Sequence[int],
    padding_before: Sequence[int],
    padding_after: Sequence[int],
    dilation: Sequence[int],
) -> Geometry:
    """The geometry that an op of the compressed form is given, checked."""
    spatial = len(kernel_size)
    check(1 <= spatial <= 2, f"{op}: kernel_size: expected 1 or 2 numbers, got {spatial}")
    geometry = Geometry(kernel_size, [1] * spatial, padding_before, padding_after, dilation)
    kronecker.check_geometry(op, geometry, spatial)
    check_offsets(op, geometry)
    return geometry


@torch.library.register_fake("mfac_kernels::conv_lags_")
def _(
    state: Tensor, x: Tensor,
    kernel_size: Sequence[int], padding_before: Sequence[int], padding_after: Sequence[int], dilation: Sequence[int],
    groups: int, bias: bool, fft: bool, beta: float, alpha: float, refused: Tensor | None,
) -> None:  # fmt: skip
    op = "conv_lags_"
    kronecker.check_scales(op, beta, alpha)
    geometry = _form(op, kernel_size, padding_before, padding_after, dilation)
    kronecker.check_conv(op, x, geometry, groups)
    size = state_size(x.shape[1] // groups, geometry, bias)
    check_state(op, "state", state, kronecker.accumulator(x), (groups, size))
    kronecker.check_refused(op, refused)


@torch.library.register_fake("mfac_kernels::conv_expand_")
def _(
    factor: Tensor, state: Tensor,
    kernel_size: Sequence[int], padding_before: Sequence[int], padding_after: Sequence[int], dilation: Sequence[int],
    groups: int, bias: bool, beta: float, alpha: float,
) -> None:  # fmt: skip
    op = "conv_expand_"
    kronecker.check_scales(op, beta, alpha)
    geometry = _form(op, kernel_size, padding_before, padding_after, dilation)
    check_dtype(op, "state", state)
    check(
        state.dtype in (torch.float32, torch.float64),
        f"{op}: state: expected Float or Double, got {type_text(state.dtype)}",
    )
    check(groups > 0, f"{op}: groups: expected at least 1, got {groups}")
    check(state.dim() == 2, f"{op}: state: expected 2 dimensions, got shape {shape_text(state.shape)}")
    channels = state_channels(state.shape[1], geometry, bias)
    check(
        channels is not None,
        f"{op}: state: expected the sums of a kernel of {geometry.offsets} offsets, got shape "
        f"{shape_text(state.shape)}",
    )
    assert channels is not None
    check_state(op, "state", state, state.dtype, (groups, state.shape[1]))
    kronecker.check_factor(op, factor, state, groups, channels * geometry.offsets, bias)
