"""Convolutions over one, two and three dimensions, with any groups and padding."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mfac_kernels import ops
from mfac_kernels.fisher._convolution import factor_op, input_factor_
from mfac_kernels.fisher.kronecker import KroneckerShape, Lags, Pairs
from mfac_kernels.ops import _conv_cost
from mfac_kernels.preconditioners.layers.base import Add, Layer, Options, valid_mean
from mfac_kernels.preconditioners.layers.maps import ConvolutionMap, windows
from mfac_kernels.preconditioners.layers.rows import add_rows


class ConvLayer(Layer):
    """Rows: the patches; positions: the output pixels."""

    module: nn.Conv1d | nn.Conv2d | nn.Conv3d

    def __init__(self, name: str, module: nn.Module, options: Options) -> None:
        super().__init__(name, module, options)
        self.shape = self._shape()
        self.least_dims = self.most_dims = 2 + len(self.module.kernel_size)
        self._accumulate = factor_op(self.module)

    def _shape(self) -> KroneckerShape:
        module, options = self.module, self.options
        grouped = module.groups > 1
        shape = KroneckerShape(
            outputs=module.out_channels // module.groups,
            inputs=module.in_channels // module.groups,
            offsets=math.prod(module.kernel_size),
            groups=module.groups,
            bias=self.bias is not None,
            sua=options.spatial == "sua",
            input_block=None if grouped else options.input_block,
            output_block=None if grouped else options.output_block,
        )
        return replace(shape, lags=self._lags(shape))

    def expected_for_masks(self) -> str | None:
        return None if self.shape.lags is None else f"KFAC(..., masked=True), as of the convolution {self.title}"

    def position_shape(self, output: Tensor) -> tuple[int, ...]:
        return tuple(output.shape[2:])

    def add_inputs(self, total: Tensor, x: Tensor, how: Add) -> None:
        if how.valid is not None:
            self._add_valid_inputs(total, x, how)
            return
        if self.shape.lags is not None:
            ops.conv2d_lags_(
                total,
                x if x.dim() == 4 else x[:, :, None],
                **vars(self.shape.lags),
                groups=self.module.groups,
                bias=self.shape.bias,
                beta=how.beta,
                alpha=how.alpha,
                check_finite=how.refused,
            )
            return
        self._add_patches(total, x, how)

    def _add_patches(self, total: Tensor, images: Tensor, how: Add) -> None:
        """Of all, or the summed ones of a sample."""
        input_factor_(
            self.module,
            total,
            images,
            bias=self.shape.bias,
            spatial=self.options.spatial,
            approximation=self.options.approximation,
            beta=how.beta,
            alpha=how.alpha,
            check_finite=how.refused,
        )

    def _lags(self, shape: KroneckerShape) -> Lags | None:
        """The compressed form, where there is one and A is dense."""
        module = self.module
        plain = self.options.spatial == "full" and self.options.approximation == "expand"
        strided = any(s != 1 for s in module.stride) or module.padding_mode != "zeros"
        if (
            not plain
            or strided
            or not 1 < shape.offsets <= _conv_cost.MOST_OFFSETS
            or len(module.kernel_size) > 2
            or shape.input_factor[0] != shape.groups
            or self.options.masked
        ):
            return None
        if isinstance(module, nn.Conv1d):  # over images of height 1
            padding = module.padding if isinstance(module.padding, str) else (0, *module.padding)
            return Lags((1, *module.kernel_size), padding, (1, *module.dilation))
        return Lags(module.kernel_size, module.padding, module.dilation)

    def add_outputs(self, total: Tensor, gradient: Tensor, how: Add) -> None:
        self._add_pixels(total, gradient, how, "mean")

    def _add_pixels(self, total: Tensor, images: Tensor, how: Add, way: Literal["sum", "mean"]) -> None:
        """Of all, or for a sample their sum, or S times the outer product of their mean: 1 / (N S) is in alpha."""
        positions = self.positions(images) if self._reduces and way == "mean" else 1
        if how.valid is not None or self.shape.output_block == 1:
            rows, weights = self._reduced(self._pixels(images), how, way)
            _add_rows(total, rows, weights, Add(how.beta, how.alpha * positions, how.refused))
            return
        self._accumulate(
            total,
            images,
            1,
            groups=self.module.groups,
            approximation=self.options.approximation,
            beta=how.beta,
            alpha=how.alpha / positions,
            check_finite=how.refused,
        )

    def pairs(self, x: Tensor, gradient: Tensor, how: Add) -> Pairs:
        a, _ = self._reduced(self._patches(x).flatten(3), how, "sum")
        g, weights = self._reduced(self._pixels(gradient), how, "mean")
        return Pairs(a, g, how.alpha, None if weights is None else weights[:, None])

    def linear_map(self) -> ConvolutionMap:
        module = self.module
        pad = tuple(module._reversed_padding_repeated_twice)
        inside = module.padding_mode == "zeros" and not isinstance(module.padding, str)
        return ConvolutionMap(
            outputs=module.out_channels,
            channels=module.in_channels,
            kernel_size=module.kernel_size,
            stride=module.stride,
            padding=cast(tuple[int, ...], module.padding) if inside else (0,) * len(module.kernel_size),
            dilation=module.dilation,
            groups=module.groups,
            bias=self.shape.bias,
            pad=() if inside else pad,
            mode=_pad_mode(module),
        )

    @property
    def _reduces(self) -> bool:
        return self.options.approximation == "reduce"

    def _add_valid_inputs(self, total: Tensor, x: Tensor, how: Add) -> None:
        """From explicit patches: their kernels have no weights of rows."""
        patches = self._patches(x)  # (groups, N, S, channels, offsets)
        if self.options.spatial == "full":
            _add_rows(total, *self._reduced(patches.flatten(3), how, "sum"), how)
            return
        # The mean over offsets of their own factors
        for pixels in patches.unbind(4):
            rows, weights = self._reduced(pixels, how, "sum")
            _add_rows(total, rows, weights, Add(how.beta, how.alpha / self.shape.offsets, how.refused))
            how = replace(how, beta=1.0)

    def _patches(self, x: Tensor) -> Tensor:
        """(groups, samples, positions, channels of a group, offsets), the bias not among them."""
        module = self.module
        x = F.pad(x, module._reversed_padding_repeated_twice, mode=_pad_mode(module))
        x = windows(x, module.kernel_size, module.stride, module.dilation)
        positions = math.prod(x.shape[2 : 2 + len(module.kernel_size)])
        x = x.reshape(len(x), module.groups, self.shape.inputs, positions, self.shape.offsets)
        return x.permute(1, 0, 3, 2, 4)

    def _pixels(self, images: Tensor) -> Tensor:
        """(groups, samples, positions, channels of a group)."""
        rows = images.reshape(len(images), self.module.groups, self.shape.outputs, self.positions(images))
        return rows.permute(1, 0, 3, 2)

    def _reduced(self, rows: Tensor, how: Add, way: Literal["sum", "mean"]) -> tuple[Tensor, Tensor | None]:
        """Rows (groups, samples, positions, columns) -> (groups, n, columns), weights (n,); sums are of inputs."""
        if way == "sum" and self.shape.bias:
            rows = F.pad(rows, (0, 1), value=1.0)
        if not self._reduces:
            weights = how.weights(rows[0])
            return rows.flatten(1, 2), None if weights is None else weights.flatten()
        if how.valid is None:
            return (rows.sum(2) if way == "sum" else rows.mean(2)), None
        parts = []
        for part in rows:
            mean, count = valid_mean(part, how)
            parts.append(mean * count[:, None] if way == "sum" else mean)
        weights = torch.ones_like(count) if how.factor is None else how.factor.to(count).expand_as(count)
        return torch.stack(parts), weights.contiguous()


def _add_rows(total: Tensor, rows: Tensor, weights: Tensor | None, how: Add) -> None:
    """rows (groups, n, columns): to a factor of each group."""
    for factor, own in zip([total] if len(rows) == 1 else total, rows, strict=True):
        add_rows(factor, own, how, weights)


def _pad_mode(module: nn.Module) -> str:
    mode = module.padding_mode
    return "constant" if mode == "zeros" else str(mode)
