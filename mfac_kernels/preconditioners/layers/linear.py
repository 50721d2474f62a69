"""Linear layers, their weights stored either way round."""

from __future__ import annotations

from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor, nn

from mfac_kernels.fisher.kronecker import KroneckerShape, Pairs
from mfac_kernels.preconditioners.layers.base import Add, Layer, Options, valid_mean
from mfac_kernels.preconditioners.layers.maps import LinearMap
from mfac_kernels.preconditioners.layers.rows import add_rows


class LinearLayer(Layer):
    """Rows: the last dimension; positions: those between it and the samples."""

    def __init__(self, name: str, module: nn.Module, options: Options) -> None:
        super().__init__(name, module, options)
        outputs, inputs = self.part(self.weight).shape
        self.shape = KroneckerShape(
            outputs=outputs,
            inputs=inputs,
            bias=self.bias is not None,
            input_block=options.input_block,
            output_block=options.output_block,
        )

    def position_shape(self, output: Tensor) -> tuple[int, ...]:
        return tuple(output.shape[1:-1])

    def samples_first(self, x: Tensor, dim: int) -> Tensor:
        return x.movedim(dim, 0) if dim < x.dim() - 1 else x

    def add_inputs(self, total: Tensor, x: Tensor, how: Add) -> None:
        alpha, weights = how.alpha, None
        if self._reduces(x):
            positions, x = self.positions(x), x.flatten(1, -2)
            if how.valid is None:  # the sum over S positions, 1s too, is S times their mean
                alpha, x = alpha * positions**2, x.mean(1)
            else:
                x, count = valid_mean(x, how)
                weights = count.square() if how.factor is None else count.square() * how.factor
        else:
            weights = how.weights(x)
        add_rows(total, x, replace(how, alpha=alpha), weights, bias=self.shape.bias)

    def add_outputs(self, total: Tensor, gradient: Tensor, how: Add) -> None:
        alpha, weights = how.alpha, None
        if self._reduces(gradient):
            alpha *= self.positions(gradient)  # 1 / (N S) is asked for, 1 / N is due
            gradient = gradient.flatten(1, -2)
            if how.valid is None:
                gradient = gradient.mean(1)
            else:
                gradient, count = valid_mean(gradient, how)
                weights = None if how.factor is None else how.factor.to(count).expand_as(count).contiguous()
        else:
            weights = how.weights(gradient)
        add_rows(total, gradient, replace(how, alpha=alpha), weights)

    def pairs(self, x: Tensor, gradient: Tensor, how: Add) -> Pairs:
        a = F.pad(x, (0, 1), value=1.0) if self.shape.bias else x
        weights = how.factor
        if self._reduces(x):
            a, gradient = a.flatten(1, -2), gradient.flatten(1, -2)
            if how.valid is None:
                a, gradient = a.sum(1), gradient.mean(1)
            else:
                (mean, count), (gradient, _) = valid_mean(a, how), valid_mean(gradient, how)
                a = mean * count[:, None]
        elif (each := how.weights(gradient)) is not None:
            weights = each.reshape(-1, 1)
        return Pairs(a.reshape(1, -1, a.shape[-1]), gradient.reshape(1, -1, gradient.shape[-1]), how.alpha, weights)

    def linear_map(self) -> LinearMap:
        return LinearMap(self.shape.outputs, self.shape.inputs, self.shape.bias)

    def _reduces(self, x: Tensor) -> bool:
        return self.options.approximation == "reduce" and x.dim() > 2


class TransposedLinearLayer(LinearLayer):
    """A linear layer whose weight is stored (inputs, outputs), as that of the transformers library's Conv1D."""

    def part(self, p: Tensor) -> Tensor:
        return p.movedim(-1, 0)
