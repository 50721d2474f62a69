"""Biases that have a block of their own."""

from __future__ import annotations

from torch import Tensor, nn

from mfac_kernels.fisher.kronecker import KroneckerShape
from mfac_kernels.preconditioners.layers.base import Add, Layer, Options
from mfac_kernels.preconditioners.layers.maps import ShiftMap
from mfac_kernels.preconditioners.layers.rows import add_rows


class BiasLayer(Layer):
    """What a module adds to all its outputs (n, channels, ...): the Fisher block of the gradients of each sample.

    A holds the block, as with normalization layers; B is 1.
    """

    weight_name, bias_name = "bias", None

    def __init__(self, name: str, module: nn.Module, options: Options) -> None:
        super().__init__(name, module, options)
        self.shape = KroneckerShape(outputs=1, inputs=len(self.weight), input_block=options.output_block, unit=True)

    def part(self, p: Tensor) -> Tensor:
        return p[None]

    def position_shape(self, output: Tensor) -> tuple[int, ...]:
        return tuple(output.shape[2:])

    def add_block(self, total: Tensor, x: Tensor, gradient: Tensor, by_position: bool, how: Add) -> None:
        pixels = gradient.flatten(2)
        add_rows(total, pixels.mT.flatten(0, 1) if by_position else pixels.sum(2), how)

    def linear_map(self) -> ShiftMap:
        return ShiftMap(self.shape.inputs)
