"""Which way to the factor of a stride-1 convolution is the fastest on a CPU: tiles, lags or frequencies.

A cost is a number of flops at the rate of the product kernels; a byte of state or factor that is read or written counts
as a dozen. n samples, c channels of a group rounded up to vectors of 16, K offsets, L lags, in each group:

    tiles   n outputs (K c)^2                                   half of the patch matrix's product
    lags    n (sum over lags of the pixels that have it) c^2
    fft     8 n frequencies c (c + min(c, 32)) / 2, their sums over the frequencies for each row of lags, the
            transforms, the border pixel by pixel as for lags

Sums over the frequencies run at a sixth of that rate, transforms at a tenth, thin border strips at a quarter; packing
an element for the lags counts as 150.
``benchmarks/bench_lags.py`` measures whether the way chosen is the fastest.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from mfac_kernels._library import build_info
from mfac_kernels.ops._geometry import Geometry
from mfac_kernels.ops._lags_form import slots

P = ParamSpec("P")
R = TypeVar("R")

_FLOPS_PER_BYTE, _FLOPS_PER_PACKED = 12, 150
# Of a kernel that is compressed: what a lag costs beside its sums grows with the square of their number.
MOST_OFFSETS = 128
_VECTOR, _PANEL = 16, 32  # channels
_CHUNK = 32  # samples that are transformed at a time
_SIMT = build_info()["simt"]  # ops on the CPU are then those of the GPU


def _smooth(n: int) -> int:
    """The next product of 2, 3 and 5 from n >= 1 on."""
    while True:
        rest = n
        for p in (2, 3, 5):
            while rest % p == 0:
                rest //= p
        if rest == 1:
            return n
        n += 1


def runs_on(x: Tensor) -> bool:
    """Whether all three ways exist where x is."""
    return x.device.type == "cpu" and not _SIMT


def cached(
    choose: Callable[Concatenate[tuple[int, ...], Geometry, P], R],
) -> Callable[Concatenate[Tensor, Geometry, P], R]:
    """``choose(x.shape, geometry, ...)`` of x, once for the same; anew in a graph, whose sizes may be symbols."""
    once = functools.lru_cache(1024)(choose)

    def chosen(x: Tensor, geometry: Geometry, /, *args: P.args, **kwargs: P.kwargs) -> R:
        shape, fixed = tuple(x.shape), Geometry(*map(tuple, geometry))
        if torch.compiler.is_compiling() or not all(type(size) is int for size in shape):
            return choose(shape, fixed, *args, **kwargs)
        return once(shape, fixed, *args, **kwargs)  # type: ignore[arg-type]  # of hashable arguments

    return chosen


def of(shape: tuple[int, ...], geometry: Geometry, groups: int, *, expanded: bool) -> dict[str, float]:
    """The cost of each way for a group of x of this shape (N, C, spatial...); expanded: compressed forms become factors
    at once."""
    samples, channels, image = shape[0], shape[1] // groups, shape[2:]
    c = -(-channels // _VECTOR) * _VECTOR
    pairs = c * (c + min(c, _PANEL)) / 2
    offsets, positions, lagged, inner, frequencies = geometry.offsets, 1, 1, 1, 1
    for size, axis in zip(image, geometry.axes, strict=True):
        positions *= max(0, size + axis.before + axis.after - axis.reach)
        shifts = [axis.dilation * abs(lag) for lag in range(1 - axis.kernel, axis.kernel)]
        pixels = [max(0, size - shift) for shift in shifts]
        lagged *= sum(pixels)
        # Every offset's margins cut the border off; what is left is the core.
        inner *= sum(
            max(0, p - max(0, axis.reach - shift - axis.before) - max(0, axis.reach - shift - axis.after))
            for p, shift in zip(pixels, shifts, strict=True)
        )
        frequencies *= _smooth(max(1, size + axis.reach))
    factor = offsets**2 * channels**2 * 8 * _FLOPS_PER_BYTE
    state = slots(geometry) * channels**2 * 8 * _FLOPS_PER_BYTE
    chunks = -(-samples // _CHUNK)
    products = 8 * samples * frequencies / 2 * pairs
    sums = 8 * geometry.kernel_size[0] * chunks * frequencies / 2 * pairs
    transforms = 10 * 2.5 * samples * c * frequencies * math.log2(max(2, frequencies))
    border = samples * (lagged - inner) * c**2
    compressed = factor if expanded else 0
    return {
        "tiles": samples * positions * (-(-offsets * channels // _PANEL) * _PANEL) ** 2 + factor,
        "lags": samples * (lagged * c**2 + math.prod(image) * c * _FLOPS_PER_PACKED) + state + compressed,
        "fft": products + 6 * sums + transforms + 4 * border + compressed,
    }
