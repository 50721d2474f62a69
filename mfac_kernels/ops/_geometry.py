"""The geometry of a convolution: as users write it, as the ops take it, and dimension by dimension."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from mfac_kernels.ops._checks import check

Sizes = int | Sequence[int]
"""One number for all spatial dimensions, or one for each."""


class Axis(NamedTuple):
    """One spatial dimension."""

    kernel: int
    stride: int
    before: int
    after: int
    dilation: int

    @property
    def reach(self) -> int:
        """Pixels from the first offset of the kernel to the last."""
        return self.dilation * (self.kernel - 1)


class Geometry(NamedTuple):
    """In the order of the ops' arguments: an entry for each spatial dimension."""

    kernel_size: Sequence[int]
    stride: Sequence[int]
    padding_before: Sequence[int]
    padding_after: Sequence[int]
    dilation: Sequence[int]

    @property
    def axes(self) -> list[Axis]:
        return [Axis(*numbers) for numbers in zip(*self, strict=True)]

    @property
    def offsets(self) -> int:
        return math.prod(self.kernel_size)

    @property
    def form(self) -> tuple[Sequence[int], Sequence[int], Sequence[int], Sequence[int]]:
        """What the ops of the compressed form take: all but the stride, which is 1."""
        return self.kernel_size, self.padding_before, self.padding_after, self.dilation


def geometry_of(
    op: str, dims: int, kernel_size: Sizes, stride: Sizes, padding: Sizes | str, dilation: Sizes
) -> Geometry:
    """Of the arguments of ``torch.nn.Conv1d`` to ``Conv3d``; the op is named in errors."""

    def each(name: str, value: Sizes) -> list[int]:
        sizes = [value] * dims if isinstance(value, int) else list(value)
        if len(sizes) != dims:
            raise RuntimeError(f"{op}: {name}: expected 1 or {dims} numbers, got {value}")
        return sizes

    kernel, strides, dilations = each("kernel_size", kernel_size), each("stride", stride), each("dilation", dilation)
    if not isinstance(padding, str):
        before = each("padding", padding)
        return Geometry(kernel, strides, before, list(before), dilations)
    check(padding in ("same", "valid"), f'{op}: padding: expected numbers, "same" or "valid", got "{padding}"')
    if padding == "valid":
        return Geometry(kernel, strides, [0] * dims, [0] * dims, dilations)
    check(set(strides) == {1}, f'{op}: padding: expected numbers with a stride of {strides}, got "same"')
    total = [d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
    before = [t // 2 for t in total]  # torch's choice where the two differ
    return Geometry(kernel, strides, before, [t - b for t, b in zip(total, before, strict=True)], dilations)
