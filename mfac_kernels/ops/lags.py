"""The input factor of a stride-1 convolution in compressed form: accumulate cheaply, expand when it is inverted.

Two entries of the factor whose kernel offsets lie the same lag apart are sums over the same products but for the
image's border. The compressed form keeps one C x C sum for each lag and border: 29 C^2 numbers in place of 81 C^2 for
3 x 3 kernels with padding 1, and never more than half. It is linear in the sum of outer products, so an exponential
average of it is that of the factor:

    state = torch.zeros(conv2d_lags_size(C, 3, padding=1))
    conv2d_lags_(state, x, 3, padding=1, beta=0.95, alpha=0.05 / N)      # every batch
    conv2d_expand_(factor, state, 3, padding=1)                          # before an inversion

Batches may have images of different sizes. State and factor are float32, or float64 for float64 x; 16-bit x is
multiplied in float32. A convolution over one dimension is one over images of height 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mfac_kernels.ops import _conv_cost, _kronecker_fakes, _lags_form
from mfac_kernels.ops._checks import check
from mfac_kernels.ops._geometry import Geometry, Sizes, geometry_of
from mfac_kernels.ops.kronecker import _flag

__all__ = ["conv2d_expand_", "conv2d_lags_", "conv2d_lags_size"]

_ops = torch.ops.mfac_kernels


def conv2d_lags_size(
    channels: int, kernel_size: Sizes, *,
    padding: Sizes | str = 0, dilation: Sizes = 1, groups: int = 1, bias: bool = False,
) -> tuple[int, int]:  # fmt: skip
    """The shape (groups, size) of the state of a convolution with so many input channels."""
    geometry = geometry_of("conv2d_lags_size", 2, kernel_size, 1, padding, dilation)
    _kronecker_fakes.check_geometry("conv2d_lags_size", geometry, 2)
    _lags_form.check_offsets("conv2d_lags_size", geometry)
    check(
        groups > 0 and channels % groups == 0,
        f"conv2d_lags_size: groups: expected a divisor of {channels} channels, got {groups}",
    )
    return groups, _lags_form.state_size(channels // groups, geometry, bias)


def conv2d_lags_(
    state: Tensor, x: Tensor, kernel_size: Sizes, *,
    padding: Sizes | str = 0, dilation: Sizes = 1, groups: int = 1, bias: bool = False,
    beta: float = 1.0, alpha: float = 1.0, check_finite: bool | Tensor = False, algorithm: str = "auto",
) -> Tensor | None:  # fmt: skip
    """``state <- beta * state + alpha * (the sums of x)``, x (N, C, H, W) of any strides.

    Of what :func:`~mfac_kernels.ops.conv2d_factor_` accumulates with ``spatial="full"``, ``approximation="expand"`` and
    a stride of 1; the arguments are the same. state: of :func:`conv2d_lags_size`, contiguous; not read if ``beta=0``.

    Args:
        algorithm: ``"lags"``, sums over pixels, each entry as accurate as if it had been computed alone; ``"fft"``, on
            the CPU, by way of the frequencies, accurate to a few 1e-7 in norm; ``"auto"``, the one that should be
            faster. At most 16 samples at a time, the frequencies give way to sums over pixels where the pixels that all
            kernel offsets meet have less than 1/16 of the sum of squares of a channel: their error is relative to the
            whole plane.
    """
    geometry = geometry_of("conv2d_lags_", 2, kernel_size, 1, padding, dilation)
    check(
        algorithm in ("auto", "lags", "fft"),
        f'conv2d_lags_: algorithm: expected "auto", "lags" or "fft", got "{algorithm}"',
    )
    flag = _flag(state, check_finite)
    fft = algorithm == "fft"
    if algorithm == "auto" and _conv_cost.runs_on(x):
        fft = _frequencies_are_faster(x, geometry, x.dtype, groups)
    _ops.conv_lags_(state, x, *geometry.form, groups, bias, fft, beta, alpha, flag)
    return flag


@_conv_cost.cached
def _frequencies_are_faster(shape: tuple[int, ...], geometry: Geometry, dtype: torch.dtype, groups: int) -> bool:
    """Of an input's shape and dtype; what the op refuses is refused in its words, before the costs see it."""
    x = torch.empty(shape, dtype=dtype, device="meta")
    _kronecker_fakes.check_conv("conv_lags_", x, geometry, groups)
    _lags_form.check_offsets("conv_lags_", geometry)
    cost = _conv_cost.of(shape, geometry, groups, expanded=False)
    return cost["fft"] < cost["lags"]


def conv2d_expand_(
    factor: Tensor, state: Tensor, kernel_size: Sizes, *,
    padding: Sizes | str = 0, dilation: Sizes = 1, groups: int = 1, bias: bool = False,
    beta: float = 0.0, alpha: float = 1.0,
) -> None:  # fmt: skip
    """``factor <- beta * factor + alpha * (what the state stands for)``; not read if ``beta=0``.

    factor: as for :func:`~mfac_kernels.ops.conv2d_factor_`, (C k + bias)^2 with k offsets; its block diagonal
    (g, s, s); or with ``groups`` (groups, C / groups k + bias, ...). Nothing is added up: an entry is one of the state.
    """
    geometry = geometry_of("conv2d_expand_", 2, kernel_size, 1, padding, dilation)
    _ops.conv_expand_(factor, state, *geometry.form, groups, bias, beta, alpha)
