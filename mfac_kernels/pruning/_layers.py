"""Layers that have a layer Hessian: the weight as a matrix, and back."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mfac_kernels.fisher import _checks

KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def is_layer(module: nn.Module) -> bool:
    """Linear, convolutional, or the transposed linear layer of transformers, which is known by its name."""
    return isinstance(module, KINDS) or _is_transposed(module)


def width(layer: nn.Module) -> tuple[int, int]:
    """(groups, columns): one Hessian for each group, of so many columns of ``weight.flatten(1)``."""
    if isinstance(layer, nn.Linear):
        return 1, layer.in_features
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return layer.groups, layer.in_channels // layer.groups * math.prod(layer.kernel_size)
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return 1, len(weight)


def matrix(layer: nn.Module) -> Tensor:
    """A copy of the weight in float32, or float64 if it has that: (groups, rows of a group, columns)."""
    if not is_layer(layer):
        raise TypeError(f"layer: expected a linear or convolutional layer, got {type(layer).__name__}")
    weight = layer.weight
    if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
        got = f"one of {weight.dtype}" if isinstance(weight, nn.Parameter) else type(weight).__name__
        raise TypeError(f"layer: expected its weight to be a parameter in floating point, got {got}")
    groups, columns = width(layer)
    rows = weight.detach().mT if _is_transposed(layer) else weight.detach()
    _checks.finite("layer: its weight", rows)
    return rows.reshape(groups, -1, columns).to(torch.promote_types(weight.dtype, torch.float32), copy=True)


def shaped(layer: nn.Module, values: Tensor) -> Tensor:
    """values (groups, rows of a group, columns) in the shape of the layer's weight."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return (values[0].mT if _is_transposed(layer) else values).reshape(weight.shape)


def assign(layer: nn.Module, values: Tensor) -> None:
    """The layer's weight <- ``values``, as :func:`shaped` takes them."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    with torch.no_grad():
        weight.copy_(shaped(layer, values))


def _is_transposed(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"
