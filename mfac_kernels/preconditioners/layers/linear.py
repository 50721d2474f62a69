"""Linear layers."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from mfac_kernels import ops
from mfac_kernels.fisher.kronecker import KroneckerShape
from mfac_kernels.preconditioners.layers.base import Add, Layer, Options


class LinearLayer(Layer):
    """Rows: the last dimension; positions: those between it and the samples."""

    def __init__(self, name: str, module: nn.Linear, options: Options) -> None:
        super().__init__(name, module)
        self.approximation = options.approximation
        self.shape = KroneckerShape(
            outputs=module.out_features,
            inputs=module.in_features,
            bias=self.bias is not None,
            input_block=options.input_block,
            output_block=options.output_block,
        )

    def positions(self, output: Tensor) -> int:
        return math.prod(output.shape[1:-1])

    def add_inputs(self, total: Tensor, x: Tensor, how: Add) -> None:
        alpha = how.alpha
        if self.approximation == "reduce" and x.dim() > 2:  # the sum over S positions, 1s too, is S times their mean
            alpha *= self.positions(x) ** 2
            x = x.flatten(1, -2).mean(1)
        ops.linear_factor_(total, x, bias=self.shape.bias, beta=how.beta, alpha=alpha, check_finite=how.refused)

    def add_outputs(self, total: Tensor, gradient: Tensor, how: Add) -> None:
        alpha = how.alpha
        if self.approximation == "reduce" and gradient.dim() > 2:
            alpha *= self.positions(gradient)  # 1 / (N S) is asked for, 1 / N is due
            gradient = gradient.flatten(1, -2).mean(1)
        ops.linear_factor_(total, gradient, beta=how.beta, alpha=alpha, check_finite=how.refused)

    def rows(self, x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        a = F.pad(x, (0, 1), value=1.0) if self.shape.bias else x
        if self.approximation == "reduce" and x.dim() > 2:
            a, gradient = a.flatten(1, -2).sum(1), gradient.flatten(1, -2).mean(1)
        return a.reshape(1, -1, a.shape[-1]), gradient.reshape(1, -1, gradient.shape[-1])
