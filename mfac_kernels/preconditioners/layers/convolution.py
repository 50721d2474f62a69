"""Convolutions over one, two and three dimensions, with any groups and padding."""

from __future__ import annotations

import math
from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor, nn

from mfac_kernels import ops
from mfac_kernels.fisher.kronecker import KroneckerShape, Lags
from mfac_kernels.ops import _conv_cost
from mfac_kernels.preconditioners.layers.base import Add, Layer, Options

CONVOLUTIONS = {nn.Conv1d: ops.conv1d_factor_, nn.Conv2d: ops.conv2d_factor_, nn.Conv3d: ops.conv3d_factor_}


class ConvLayer(Layer):
    """Rows: the patches; positions: the output pixels."""

    module: nn.Conv1d | nn.Conv2d | nn.Conv3d

    def __init__(self, name: str, module: nn.Conv1d | nn.Conv2d | nn.Conv3d, options: Options) -> None:
        super().__init__(name, module)
        self.options = options
        grouped = module.groups > 1
        self.shape = KroneckerShape(
            outputs=module.out_channels // module.groups,
            inputs=module.in_channels // module.groups,
            offsets=math.prod(module.kernel_size),
            groups=module.groups,
            bias=self.bias is not None,
            sua=options.spatial == "sua",
            input_block=None if grouped else options.input_block,
            output_block=None if grouped else options.output_block,
        )
        self.shape = replace(self.shape, lags=self._lags())
        self._accumulate = next(op for kind, op in CONVOLUTIONS.items() if isinstance(module, kind))

    def positions(self, output: Tensor) -> int:
        return math.prod(output.shape[2:])

    def add_inputs(self, total: Tensor, x: Tensor, how: Add) -> None:
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
        padding: str | tuple[int, ...] = self.module.padding
        if self.module.padding_mode != "zeros":
            x = F.pad(x, self.module._reversed_padding_repeated_twice, mode=self.module.padding_mode)
            padding = 0  # type: ignore[assignment]
        self._accumulate(
            total,
            x,
            self.module.kernel_size,
            stride=self.module.stride,
            padding=padding,
            dilation=self.module.dilation,
            groups=self.module.groups,
            bias=self.shape.bias,
            spatial=self.options.spatial,
            approximation=self.options.approximation,
            beta=how.beta,
            alpha=how.alpha,
            check_finite=how.refused,
        )

    def _lags(self) -> Lags | None:
        """The compressed form, where there is one and A is dense."""
        module, shape = self.module, self.shape
        plain = self.options.spatial == "full" and self.options.approximation == "expand"
        strided = any(s != 1 for s in module.stride) or module.padding_mode != "zeros"
        if (
            not plain
            or strided
            or not 1 < shape.offsets <= _conv_cost.MOST_OFFSETS
            or len(module.kernel_size) > 2
            or shape.input_factor[0] != shape.groups
        ):
            return None
        if isinstance(module, nn.Conv1d):  # over images of height 1
            padding = module.padding if isinstance(module.padding, str) else (0, *module.padding)
            return Lags((1, *module.kernel_size), padding, (1, *module.dilation))
        return Lags(module.kernel_size, module.padding, module.dilation)

    def add_outputs(self, total: Tensor, gradient: Tensor, how: Add) -> None:
        reduce = self.options.approximation == "reduce"  # of the mean over S: 1 / N of its square, 1 / (N S) asked for
        self._accumulate(
            total,
            gradient,
            1,
            groups=self.module.groups,
            approximation=self.options.approximation,
            beta=how.beta,
            alpha=how.alpha / self.positions(gradient) if reduce else how.alpha,
            check_finite=how.refused,
        )

    def rows(self, x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        module, dims = self.module, len(self.module.kernel_size)
        x = F.pad(x, module._reversed_padding_repeated_twice, mode=_pad_mode(module))
        for d in range(dims):
            span = module.dilation[d] * (module.kernel_size[d] - 1) + 1
            x = x.unfold(2 + d, span, module.stride[d])[..., :: module.dilation[d]]
        # (N, channels, *positions, *offsets)
        n, groups, s = len(x), module.groups, self.positions(gradient)
        a = x.reshape(n, groups, self.shape.inputs, s, -1).permute(1, 0, 3, 2, 4).flatten(3)
        g = gradient.reshape(n, groups, self.shape.outputs, s).permute(1, 0, 3, 2)
        if self.shape.bias:
            a = F.pad(a, (0, 1), value=1.0)
        if self.options.approximation == "reduce":
            a, g = a.sum(2, keepdim=True), g.mean(2, keepdim=True)
        return a.flatten(1, 2), g.flatten(1, 2)


def _pad_mode(module: nn.Module) -> str:
    mode = module.padding_mode
    return "constant" if mode == "zeros" else str(mode)
