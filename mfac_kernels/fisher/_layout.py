"""How a layer's weight gradient and its two Kronecker factors lie in memory."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mfac_kernels import ops
from mfac_kernels.fisher._checks import positive_int


@dataclass(frozen=True)
class Lags:
    """The geometry, in 2 dimensions, of a convolution whose A is kept in the form of ``ops.conv2d_lags_``."""

    kernel_size: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]


@dataclass(frozen=True)
class KroneckerShape:
    """A layer: its gradient is (groups * outputs, inputs * offsets + bias), its Fisher block B (x) A for each group.

    Attributes:
        outputs, inputs: of one group.
        offsets: positions of a convolution's kernel; columns are ordered (input, offset), the bias last.
        groups: independent pairs of factors, those of a grouped convolution.
        bias: the last column is the bias's.
        sua: A is over inputs (and bias) alone and is used at every offset.
        input_block, output_block: keep the block diagonal of A, of B, in blocks of this size; the last one is ragged
            and padded with zeros. 1: the diagonal, as an embedding's A is; None: dense.
        lags: average A in compressed form, about a third of a 3 x 3 convolution's, and expand it to invert it.
        exchanged: A is of output gradients and B of inputs, as with a convolution's transpose.
        two_uses: the weight is used in both directions, each with factors A_u and B_u of its own. A sum is flat, (A's
            part, B's part): that of inputs has A of the first use and B of the second, that of gradients the others. B
            (x) A has the partial traces of the sum of both B_u (x) A_u, and A and B have the same mean eigenvalue.
        unit: B is the number 1 and A the whole block, damped as it is (the scale and shift of a normalisation layer).
    """

    outputs: int
    inputs: int
    offsets: int = 1
    groups: int = 1
    bias: bool = False
    sua: bool = False
    input_block: int | None = None
    output_block: int | None = None
    exchanged: bool = False
    two_uses: bool = False
    unit: bool = False
    lags: Lags | None = None

    def __post_init__(self) -> None:
        for name in ("outputs", "inputs", "offsets", "groups"):
            positive_int(name, getattr(self, name))
        for name in ("input_block", "output_block"):
            if getattr(self, name) is not None:
                positive_int(name, getattr(self, name))
                if self.groups > 1:
                    raise ValueError(f"{name}: expected None with groups = {self.groups}, got {getattr(self, name)}")

    @property
    def input_width(self) -> int:
        """Rows of A."""
        return self.inputs * (1 if self.sua else self.offsets) + self.bias

    @property
    def uses(self) -> int:
        """How often A is used in a row of the gradient."""
        return self.offsets if self.sua else 1

    @property
    def columns(self) -> int:
        return self.inputs * self.offsets + self.bias

    @property
    def input_factor(self) -> tuple[int, int, int]:
        """(blocks, size, size)."""
        return _factor(self.groups, self.input_width, self.input_block)

    @property
    def input_state(self) -> tuple[int, ...]:
        """What is averaged: A itself, or its compressed form (groups, size)."""
        if self.lags is None:
            return self.input_factor
        return ops.conv2d_lags_size(self.inputs * self.groups, groups=self.groups, bias=self.bias, **vars(self.lags))

    def expand(self, state: Tensor) -> Tensor:
        """(layers, *input_state) -> (layers, *input_factor)."""
        if self.lags is None:
            return state
        factors = state.new_empty(len(state), *self.input_factor)
        for factor, compressed in zip(factors, state, strict=True):
            ops.conv2d_expand_(factor, compressed, groups=self.groups, bias=self.bias, **vars(self.lags))
        return factors

    @property
    def sums(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What a batch adds up for A and for B."""
        if not self.two_uses:
            return self.input_state, self.output_factor
        both = (math.prod(self.input_factor) + math.prod(self.output_factor),)
        return both, both

    @property
    def output_factor(self) -> tuple[int, int, int]:
        """(blocks, size, size)."""
        return _factor(self.groups, self.outputs, self.output_block)


def _factor(groups: int, width: int, block: int | None) -> tuple[int, int, int]:
    if block is None or block >= width:
        return groups, width, width
    return -(-width // block), block, block


def spread(shape: KroneckerShape, gradient: Tensor) -> Tensor:
    """(layers, groups * outputs, columns) -> (layers, groups, outputs, uses, input_width), a view unless ``sua``.

    The bias of a layer with SUA is shared by the offsets: each gets 1 / sqrt(offsets) of it, so that the map keeps
    norms and :func:`gather`, its transpose, undoes it.
    """
    x = gradient.reshape(len(gradient), shape.groups, shape.outputs, shape.columns)
    if not shape.sua:
        return x[..., None, :]
    pixels = x[..., : shape.inputs * shape.offsets]
    weight = pixels.reshape(*x.shape[:-1], shape.inputs, shape.offsets).mT
    if not shape.bias:
        return weight
    share = x[..., -1:, None] / math.sqrt(shape.offsets)
    return torch.cat([weight, share.expand(*weight.shape[:-1], 1)], dim=-1)


def gather(shape: KroneckerShape, x: Tensor) -> Tensor:
    """The transpose of :func:`spread`."""
    if not shape.sua:
        return x.flatten(3).flatten(1, 2)
    weight = x[..., : shape.inputs].mT.flatten(-2)
    if shape.bias:
        bias = x[..., -1].sum(-1, keepdim=True) / math.sqrt(shape.offsets)
        weight = torch.cat([weight, bias], dim=-1)
    return weight.flatten(1, 2)


def multiply_inputs(x: Tensor, matrix: Tensor) -> Tensor:
    """``x @ matrix`` along the inputs: x (layers, groups, outputs, uses, a), matrix (layers, blocks, s, s)."""
    if matrix.shape[-1] == 1:  # blocks of one, or one for each group
        return x * matrix.reshape(len(x), x.shape[1], 1, 1, -1)
    rows = x.flatten(2, 3)
    if matrix.shape[1] == x.shape[1]:
        return (rows @ matrix).view_as(x)
    return _multiply_blocks(rows.mT[:, 0], matrix.mT).mT.reshape(x.shape)


def multiply_rows(rows: Tensor, matrix: Tensor) -> Tensor:
    """Rows (groups, n, width) times the factor (blocks, s, s) of one layer, in its dtype."""
    return multiply_inputs(rows.to(matrix.dtype)[None, :, :, None], matrix[None])[0, :, :, 0]


def multiply_outputs(matrix: Tensor, x: Tensor) -> Tensor:
    """``matrix @ x`` along the outputs: matrix (layers, blocks, s, s), x (layers, groups, outputs, uses, a)."""
    if matrix.shape[-1] == 1:
        return x * matrix.reshape(len(x), x.shape[1], -1, 1, 1)
    rows = x.flatten(3)
    if matrix.shape[1] == x.shape[1]:
        return (matrix @ rows).view_as(x)
    return _multiply_blocks(rows[:, 0], matrix).view_as(x)


def _multiply_blocks(x: Tensor, blocks: Tensor) -> Tensor:
    """Block-diagonal (layers, blocks, s, s) times x (layers, width, n); rows past the width are padding."""
    count, size = blocks.shape[1:3]
    padded = F.pad(x, (0, 0, 0, count * size - x.shape[1])).view(len(x), count, size, x.shape[2])
    return (blocks @ padded).flatten(1, 2)[:, : x.shape[1]]
