"""Biases that have a block of their own."""

from __future__ import annotations

from torch import Tensor, nn

from mfac_kernels.fisher.kronecker import KroneckerFisher, KroneckerShape
from mfac_kernels.preconditioners.layers.base import Add, Layer, Options, Together
from mfac_kernels.preconditioners.layers.maps import ShiftMap
from mfac_kernels.preconditioners.layers.rows import add_rows


class BiasLayer(Layer):
    """What a module adds to all its outputs (n, channels, ...): the Fisher block of the gradients of each sample.

    A holds the block, as with normalization layers; B is 1.
    """

    joint = True
    weight_name, bias_name = "bias", None

    def __init__(self, name: str, module: nn.Module, options: Options) -> None:
        super().__init__(name, module, options)
        self.shape = KroneckerShape(outputs=1, inputs=len(self.weight), input_block=options.output_block, unit=True)

    def part(self, p: Tensor) -> Tensor:
        return p[None]

    def position_shape(self, output: Tensor) -> tuple[int, ...]:
        return tuple(output.shape[2:])

    def add_inputs(self, total: Tensor, x: Tensor, how: Add) -> None:
        raise NotImplementedError("the block is of gradients alone")

    def add_outputs(self, total: Tensor, gradient: Tensor, how: Add) -> None:
        raise NotImplementedError("the block is of gradients alone")

    def add_moments(self, fisher: KroneckerFisher, layer: int, x: Tensor, gradient: Tensor, how: Add) -> None:
        raise NotImplementedError("the block is dense: there is nothing to correct")

    def add_together(self, fisher: KroneckerFisher, layer: int, x: Tensor, gradient: Tensor, how: Together) -> None:
        pixels = gradient.flatten(2)
        rows = pixels.mT.flatten(0, 1) if how.by_position else pixels.sum(2)
        both = how.both
        fisher.add_inputs(layer, lambda total, beta: add_rows(total, rows, Add(beta, both.alpha, both.refused)))
        fisher.add_outputs(layer, lambda total, beta: total.fill_(1.0))

    def linear_map(self) -> ShiftMap:
        return ShiftMap(self.shape.inputs)
