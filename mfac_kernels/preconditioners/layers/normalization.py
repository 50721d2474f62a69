"""Normalization layers: the whole block of each unit in place of two factors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mfac_kernels.fisher.kronecker import KroneckerShape
from mfac_kernels.preconditioners.layers.base import Add, Layer, Options, gradient_of
from mfac_kernels.preconditioners.layers.maps import ScaleMap
from mfac_kernels.preconditioners.layers.rows import add_sums, sum_of_products

NO_NORMALIZATION = 'normalization is "skip"'

NORMALIZATIONS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
)


class NormalizationLayer(Layer):
    """Scale and shift of each unit: 2 x 2 blocks of the empirical Fisher, or their diagonal.

    A holds the whole block, from the gradients of each sample; B is 1.
    """

    def __init__(self, name: str, module: nn.Module, options: Options) -> None:
        super().__init__(name, module, options)
        parameters = 1 + (self.bias is not None)
        self.units = self.weight.numel()
        # Of an input, the last ones that are units, or 0 where the second dimension alone is
        self._unit_dims = self.weight.dim() if isinstance(module, (nn.LayerNorm, nn.RMSNorm)) else 0
        self.least_dims = 1 + max(1, self._unit_dims)
        self.per_unit = 1 if options.normalization == "diagonal" else parameters
        self.shape = KroneckerShape(
            outputs=1, inputs=self.per_unit, groups=self.units * parameters // self.per_unit, unit=True
        )

    @classmethod
    def of(cls, name: str, module: nn.Module, options: Options) -> Sequence[Layer] | str:
        return NO_NORMALIZATION if options.normalization == "skip" else super().of(name, module, options)

    def position_shape(self, output: Tensor) -> tuple[int, ...]:
        return tuple(output.shape[1 : output.dim() - self._unit_dims] if self._unit_dims else output.shape[2:])

    def samples_first(self, x: Tensor, dim: int) -> Tensor:
        return x.movedim(dim, 0) if dim < x.dim() - self._unit_dims and self._unit_dims else x

    def add_block(self, total: Tensor, x: Tensor, gradient: Tensor, by_position: bool, how: Add) -> None:
        """From products of input and output gradient."""
        parts = [gradient * x]
        if self.bias is not None:
            parts.append(gradient)
        each = [self._per_unit(part, by_position, how.valid) for part in parts]
        entries = [sum_of_products(one, one) for one in each]
        if self.per_unit == 2:
            cross = sum_of_products(*each)
            entries = [entries[0], cross, cross, entries[1]]
        sums = torch.stack(entries, -1)
        add_sums(total, sums if how.factor is None else sums * how.factor.to(sums.dtype), how)

    def linear_map(self) -> ScaleMap:
        shape = self.shape.groups, self.per_unit
        return ScaleMap(shape, self.units, self.bias is not None, self._unit_dims)

    def gradient(self) -> Tensor:
        parts = [gradient_of(p).flatten() for p in (self.weight, self.bias) if p is not None]
        return torch.stack(parts, 1).view(self.shape.groups, self.per_unit)

    def assign(self, matrix: Tensor) -> None:
        columns = matrix.reshape(self.units, -1).unbind(1)
        for parameter, column in zip((self.weight, self.bias), columns, strict=False):
            if parameter is not None and parameter.grad is not None:
                parameter.grad.copy_(column.view_as(parameter))

    def features(self, x: Tensor) -> Tensor:
        """Normalized inputs."""
        module = self.module
        if isinstance(module, nn.GroupNorm):
            return F.group_norm(x, module.num_groups, eps=module.eps)
        if isinstance(module, nn.LayerNorm):
            return F.layer_norm(x, module.normalized_shape, eps=module.eps)
        if isinstance(module, nn.RMSNorm):
            return F.rms_norm(x, module.normalized_shape, eps=module.eps)
        assert isinstance(module, nn.modules.batchnorm._BatchNorm)
        running = not module.training and module.running_mean is not None
        return F.batch_norm(
            x,
            module.running_mean if running else None,
            module.running_var if running else None,
            training=not running,
            eps=module.eps,
        )

    def _per_unit(self, x: Tensor, by_position: bool, valid: Tensor | None) -> Tensor:
        """(N, units), sums over positions; or (N * positions, units)."""
        each = x.reshape(len(x), -1, self.units) if self._unit_dims else x.reshape(len(x), self.units, -1).mT
        if valid is not None:
            each = each * valid.reshape(*each.shape[:2], 1).to(each.dtype)
        return each.flatten(0, 1) if by_position else each.sum(1)
