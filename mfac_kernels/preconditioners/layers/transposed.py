"""Transposed convolutions over one, two and three dimensions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

from torch import Tensor, nn

from mfac_kernels.fisher._convolution import TransposedConvolution
from mfac_kernels.fisher.kronecker import KroneckerShape, Pairs
from mfac_kernels.preconditioners.layers.base import Add, Layer, Options
from mfac_kernels.preconditioners.layers.bias import BiasLayer
from mfac_kernels.preconditioners.layers.convolution import ConvLayer
from mfac_kernels.preconditioners.layers.maps import ConvolutionMap


class ConvTransposeLayer(ConvLayer):
    """A convolution from its outputs to its inputs with the same weight: gradients are inputs to it, inputs gradients.

    With P_s(g) the patch of the output gradient that input pixel a_s has a part in, the gradient of a sample is
    sum_s a_s P_s(g)^T, in the shape of the weight. So positions are the input pixels, B is of these, (channels of the
    input)^2, and A of the patches, (channels of the output * offsets)^2, or with ``spatial="sua"`` without the offsets.
    The bias, that of all outputs and not of patches, is a layer of its own.
    """

    module: TransposedConvolution  # type: ignore[assignment]
    bias_name = None

    @classmethod
    def of(cls, name: str, module: nn.Module, options: Options) -> Sequence[Layer] | str:
        assert isinstance(module, TransposedConvolution)
        if any(p >= s for p, s in zip(module.output_padding, module.stride, strict=True)):
            return "its output_padding is not below its stride"  # a convolution of the output has further pixels then
        found = super().of(name, module, options)
        if isinstance(found, str) or BiasLayer.unusable(module, BiasLayer.weight_name):
            return found
        return [*found, BiasLayer(f"{name}.bias" if name else "bias", module, options)]

    def _shape(self) -> KroneckerShape:
        module, options = self.module, self.options
        grouped = module.groups > 1
        return KroneckerShape(
            outputs=module.in_channels // module.groups,
            inputs=module.out_channels // module.groups,
            offsets=math.prod(module.kernel_size),
            groups=module.groups,
            sua=options.spatial == "sua",
            input_block=None if grouped else options.output_block,
            output_block=None if grouped else options.input_block,
            exchanged=True,
        )

    def positions_of(self, x: Tensor, output: Tensor) -> int:
        return self.positions(x)

    def expected_for_masks(self) -> str | None:
        return f"no transposed convolutions, got {self.title}"

    def add_inputs(self, total: Tensor, x: Tensor, how: Add) -> None:
        self._add_pixels(total, x, how, "sum")

    def add_outputs(self, total: Tensor, gradient: Tensor, how: Add) -> None:
        if self._reduces:  # S times the outer product of the mean patch
            how = replace(how, alpha=how.alpha / self._patches(gradient[:1]).shape[2])
        self._add_patches(total, gradient, how)

    def pairs(self, x: Tensor, gradient: Tensor, how: Add) -> Pairs:
        a, _ = self._reduced(self._patches(gradient).flatten(3), how, "mean")
        g, _ = self._reduced(self._pixels(x), how, "sum")
        return Pairs(a, g, how.alpha)

    def linear_map(self) -> ConvolutionMap:
        module = self.module
        return ConvolutionMap(
            outputs=module.in_channels,
            channels=module.out_channels,
            kernel_size=module.kernel_size,
            stride=module.stride,
            padding=cast(tuple[int, ...], module.padding),
            dilation=module.dilation,
            groups=module.groups,
            transposed=True,
            output_padding=module.output_padding,
        )
