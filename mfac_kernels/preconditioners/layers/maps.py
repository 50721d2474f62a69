"""Layers as linear functions of their parameters, laid out as K-FAC's gradients are: (rows, columns), the bias last."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mfac_kernels.fisher.jacobian import LayerMap

__all__ = ["ConvolutionMap", "EmbeddingMap", "LinearMap", "SampleMap", "ScaleMap", "ShiftMap"]

# Elements of patches at a time: what a core's cache holds, or few launches.
_PATCHES = {"cpu": 1 << 18, "cuda": 1 << 25}


class SampleMap(LayerMap, Protocol):
    """A map that knows the gradients of single samples, too."""

    def sample_gradients(self, a: Tensor, g: Tensor) -> Tensor:
        """The terms of :meth:`weight_gradient`, one for each sample: (n, rows * columns)."""


@dataclass(frozen=True)
class LinearMap:
    """a (n, ..., inputs) -> a W^T + b (n, ..., outputs); block (outputs, inputs + bias)."""

    outputs: int
    inputs: int
    bias: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        return self.outputs, self.inputs + self.bias

    def forward(self, a: Tensor, block: Tensor) -> Tensor:
        self._check(a)
        block = _distinct_rows(block)
        return F.linear(a, block[:, : self.inputs], block[:, -1] if self.bias else None)

    def weight_gradient(self, a: Tensor, g: Tensor) -> Tensor:
        self._check(a)
        if (*a.shape[:-1], self.outputs) != tuple(g.shape):
            raise ValueError(f"g: expected shape {(*a.shape[:-1], self.outputs)}, got {tuple(g.shape)}")
        a, g = a.reshape(-1, self.inputs), g.reshape(-1, self.outputs)
        block = a.new_empty(self.shape)
        torch.mm(g.mT, a, out=block[:, : self.inputs])
        if self.bias:
            torch.sum(g, 0, out=block[:, -1])
        return block

    def sample_gradients(self, a: Tensor, g: Tensor) -> Tensor:
        a, g = positions_of(a), positions_of(g)
        return (g.mT @ (F.pad(a, (0, 1), value=1.0) if self.bias else a)).flatten(1)

    def _check(self, a: Tensor) -> None:
        if a.dim() < 2 or a.shape[-1] != self.inputs or not a.is_floating_point():
            raise ValueError(f"a: expected shape (n, .., {self.inputs}), got {a.dtype} of shape {tuple(a.shape)}")


@dataclass(frozen=True)
class ConvolutionMap:
    """a (n, channels, ...) -> its convolution; block (outputs, channels of a group * offsets + bias).

    ``transposed``: with the roles of outputs and channels exchanged, a (n, outputs, ...); without a bias.
    ``pad``: what is added around a beforehand, as :func:`torch.nn.functional.pad` takes it, with its ``mode``;
    ``padding``: zeros that the convolution itself adds.
    """

    outputs: int
    channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1
    bias: bool = False
    pad: tuple[int, ...] = ()
    mode: str = "constant"
    transposed: bool = False
    output_padding: tuple[int, ...] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.outputs, self.channels // self.groups * math.prod(self.kernel_size) + self.bias

    def forward(self, a: Tensor, block: Tensor) -> Tensor:
        if self.groups == 1 and not self.transposed:
            block = _distinct_rows(block)
        return torch.convolution(
            self._padded(a),
            self._weight(block),
            block[:, -1].contiguous() if self.bias else None,
            *self._geometry,
        )

    def weight_gradient(self, a: Tensor, g: Tensor) -> Tensor:
        _, weight, bias = torch.ops.aten.convolution_backward(
            g,
            self._padded(a),
            a.new_empty(1).expand(self.outputs, self.channels // self.groups, *self.kernel_size),  # not read
            [self.outputs] if self.bias else None,
            *self._geometry,
            (False, True, self.bias),
        )
        matrix = weight.reshape(self.outputs, -1)
        return torch.cat([matrix, bias[:, None]], 1) if self.bias else matrix

    def sample_gradients(self, a: Tensor, g: Tensor) -> Tensor:
        """Products of g with patches of a, those of a few samples at a time."""
        n, columns = len(a), self.channels // self.groups * math.prod(self.kernel_size)
        matrix = g.new_empty(n, self.outputs, columns + self.bias)
        if self.bias:
            torch.sum(g.flatten(2), 2, out=matrix[:, :, -1])
        a = self._padded(a)
        wide, narrow = (g, a) if self.transposed else (a, g)
        wide = F.pad(wide, [p for pad in reversed(self.padding) for p in (pad, pad)])
        positions = math.prod(narrow.shape[2:])
        step = max(1, _PATCHES.get(a.device.type, 1 << 18) // max(1, self.groups * columns * positions))
        dims = len(self.kernel_size)
        patches = windows(wide, self.kernel_size, self.stride, self.dilation)
        reached = (slice(None), slice(None), *map(slice, narrow.shape[2:]))  # output padding has windows of its own
        patches = patches[reached].permute(0, 1, *range(2 + dims, 2 + 2 * dims), *range(2, 2 + dims))
        for begin in range(0, n, step):
            part = slice(begin, begin + step)
            columns_first = patches[part].reshape(-1, self.groups, columns, positions)
            rows = narrow[part].reshape(-1, self.groups, self.outputs // self.groups, positions)
            matrix[part, :, :columns] = (rows @ columns_first.mT).flatten(1, 2)
        return matrix.flatten(1)

    @property
    def _geometry(self) -> tuple[Sequence[int], Sequence[int], Sequence[int], bool, Sequence[int], int]:
        """stride, padding, dilation, transposed, output padding, groups: what torch's convolutions end with."""
        output_padding = self.output_padding or (0,) * len(self.stride)
        return self.stride, self.padding, self.dilation, self.transposed, output_padding, self.groups

    def _padded(self, a: Tensor) -> Tensor:
        return F.pad(a, self.pad, mode=self.mode) if any(self.pad) else a

    def _weight(self, block: Tensor) -> Tensor:
        weight = block[:, :-1] if self.bias else block
        return weight.reshape(len(block), self.channels // self.groups, *self.kernel_size)


@dataclass(frozen=True)
class EmbeddingMap:
    """a (n, ...) indices -> their columns of the block (width, indices); ``padding_idx`` has a column of zeros."""

    width: int
    indices: int
    padding_idx: int | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.width, self.indices

    def forward(self, a: Tensor, block: Tensor) -> Tensor:
        block = _distinct_rows(block)
        rows = F.embedding(a, block.mT)
        return rows if self.padding_idx is None else rows.masked_fill((a == self.padding_idx)[..., None], 0)

    def weight_gradient(self, a: Tensor, g: Tensor) -> Tensor:
        rows = g.new_zeros(self.indices, self.width)
        rows.index_put_((a.reshape(-1),), g.reshape(-1, self.width), accumulate=True)
        if self.padding_idx is not None:
            rows[self.padding_idx].zero_()
        return rows.mT

    def sample_gradients(self, a: Tensor, g: Tensor) -> Tensor:
        chosen = one_hot(a, self.indices, self.padding_idx, g.dtype)
        return (positions_of(g).mT @ chosen).flatten(1)


@dataclass(frozen=True)
class ScaleMap:
    """a, normalized inputs -> a scale + shift; the units are dimension 1, or the last ``unit_dims`` dimensions.

    The block holds (units, parameters) in that order, in the shape that K-FAC's blocks have.
    """

    shape: tuple[int, int]
    units: int
    bias: bool = False
    unit_dims: int = 0

    def forward(self, a: Tensor, block: Tensor) -> Tensor:
        scale, *shift = (self._spread(column, a) for column in block.reshape(self.units, -1).unbind(1))
        return torch.addcmul(shift[0], a, scale) if shift else a * scale

    def weight_gradient(self, a: Tensor, g: Tensor) -> Tensor:
        return self.sample_gradients(a, g).sum(0).view(self.shape)

    def sample_gradients(self, a: Tensor, g: Tensor) -> Tensor:
        columns = [self._sum(g * a), self._sum(g)] if self.bias else [self._sum(g * a)]
        return torch.stack(columns, 2).flatten(1)

    def _spread(self, column: Tensor, a: Tensor) -> Tensor:
        if self.unit_dims:
            return column.view(a.shape[a.dim() - self.unit_dims :])
        return column.view(-1, *[1] * (a.dim() - 2))

    def _sum(self, x: Tensor) -> Tensor:
        """Over a sample's positions -> (n, units)."""
        if self.unit_dims:
            return x.reshape(len(x), math.prod(x.shape[1 : x.dim() - self.unit_dims]), self.units).sum(1)
        return x.reshape(len(x), self.units, math.prod(x.shape[2:])).sum(2)


@dataclass(frozen=True)
class ShiftMap:
    """a (n, ...) -> a shift of each channel (1, channels, 1, ...), whatever a is; block (1, channels)."""

    channels: int

    @property
    def shape(self) -> tuple[int, int]:
        return 1, self.channels

    def forward(self, a: Tensor, block: Tensor) -> Tensor:
        return block.view(1, -1, *[1] * (a.dim() - 2))

    def weight_gradient(self, a: Tensor, g: Tensor) -> Tensor:
        return self.sample_gradients(a, g).sum(0)[None]

    def sample_gradients(self, a: Tensor, g: Tensor) -> Tensor:
        return g.flatten(2).sum(2)


def windows(x: Tensor, kernel_size: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """x (n, channels, ...), padded, as a convolution's windows (n, channels, *positions, *kernel_size): a view."""
    for d, (size, step, apart) in enumerate(zip(kernel_size, stride, dilation, strict=True)):
        x = x.unfold(2 + d, apart * (size - 1) + 1, step)[..., ::apart]
    return x


def positions_of(x: Tensor) -> Tensor:
    """(n, ..., width) -> (n, positions, width)."""
    return x.reshape(len(x), math.prod(x.shape[1:-1]), x.shape[-1])


def one_hot(indices: Tensor, count: int, padding_idx: int | None, dtype: torch.dtype) -> Tensor:
    """(n, ...) -> (n, positions, count), zeros where an index is ``padding_idx``."""
    chosen = positions_of(F.one_hot(indices, count)).to(dtype)
    if padding_idx is not None:
        chosen[:, :, padding_idx] = 0
    return chosen


def _distinct_rows(block: Tensor) -> Tensor:
    """One row, where all are the same memory: outputs that are alike are computed once."""
    return block[:1] if block.stride(0) == 0 else block
