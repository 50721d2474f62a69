"""Layers that have a layer Hessian: the weight as a matrix, and back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from mfac_kernels.fisher import _checks

Layer = nn.Module | nn.Parameter
"""A linear or convolutional module; or a weight (rows, columns), or of several experts (experts, rows, columns)."""

KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)

_TRANSPOSED = "transformers.pytorch_utils.Conv1D"


def is_layer(module: nn.Module) -> bool:
    """Linear, convolutional, or the transposed linear layer of transformers, which is known by its name."""
    return isinstance(module, KINDS) or _is_transposed(module)


def find(
    model: nn.Module, include: Sequence[str] | None, exclude: Sequence[str], experts: Sequence[str]
) -> dict[str, list[Layer]]:
    """By name, in the order of the model: modules, with others that share their weight; parameters of experts.

    include, exclude, experts: patterns of names; each fits something.
    """
    modules = {name: m for name, m in model.named_modules() if is_layer(m)}
    known = {name: p for name, p in model.named_parameters() if not isinstance(p, UninitializedParameter)}
    stacked = {name: p for name, p in known.items() if p.dim() == 3}
    for argument, patterns, named in (
        ("include", include, modules),
        ("exclude", exclude, modules),
        ("experts", experts, stacked),
    ):
        if isinstance(patterns, str):
            raise TypeError(f"{argument}: expected a sequence of names, got the string {patterns!r}")
        for pattern in patterns or ():
            if not any(fnmatchcase(name, pattern) for name in named):
                kind = "layers" if named is modules else "parameters of 3 dimensions"
                raise ValueError(f"{argument}: expected patterns that fit {kind}, got {pattern!r}")
    first: dict[int, str] = {}
    found: dict[str, list[Layer]] = {}
    for name, module in model.named_modules():
        if name in modules and (include is None or _fits(name, include)) and not _fits(name, exclude):
            if isinstance(module.weight, UninitializedParameter):
                raise ValueError(f"model: expected layers with a shape, got {name}: call the model once before")
            found.setdefault(first.setdefault(id(module.weight), name), []).append(module)
        for own, p in module.named_parameters(name, recurse=False):
            if own in stacked and _fits(own, experts):
                found[own] = [p]
    if not found:
        raise ValueError("model: expected linear or convolutional layers, got none")
    return found


def _fits(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def weight_of(layer: Layer) -> Tensor:
    weight = layer if isinstance(layer, nn.Parameter) else layer.weight
    assert isinstance(weight, Tensor)
    return weight


def experts_shape(layer: Layer) -> tuple[int, ...]:
    """(experts,), or () for a layer that is none of stacked experts."""
    return tuple(layer.shape[:-2]) if isinstance(layer, nn.Parameter) else ()


def hessian_shape(layer: Layer) -> tuple[int, ...]:
    """(n, n) for the n columns of ``weight.flatten(1)``, or (groups, n, n): one Hessian for each group or expert."""
    if isinstance(layer, nn.Parameter):
        return *experts_shape(layer), layer.shape[-1], layer.shape[-1]
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        n = layer.in_channels // layer.groups * math.prod(layer.kernel_size)
        return (n, n) if layer.groups == 1 else (layer.groups, n, n)
    n = layer.in_features if isinstance(layer, nn.Linear) else len(weight_of(layer))
    return n, n


def matrix(layer: Layer) -> Tensor:
    """A copy of the weight in float32, or float64 if it has that: (groups, rows of a group, columns)."""
    known = layer.dim() in (2, 3) if isinstance(layer, nn.Parameter) else is_layer(layer)
    if not known:
        got = f"of {layer.dim()}" if isinstance(layer, nn.Parameter) else type(layer).__name__
        kinds = "a linear or convolutional layer, or a parameter of 2 or 3 dimensions"
        raise TypeError(f"layer: expected {kinds}, got {got}")
    weight = weight_of(layer)
    if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
        got = f"one of {weight.dtype}" if isinstance(weight, nn.Parameter) else type(weight).__name__
        raise TypeError(f"layer: expected its weight to be a parameter in floating point, got {got}")
    *groups, n, _ = hessian_shape(layer)
    rows = weight.detach().mT if _is_transposed(layer) else weight.detach()
    _checks.finite("layer: its weight", rows)
    return rows.reshape(math.prod(groups), -1, n).to(torch.promote_types(weight.dtype, torch.float32), copy=True)


def shaped(layer: Layer, values: Tensor) -> Tensor:
    """values (groups, rows of a group, columns) in the shape of the layer's weight."""
    return (values[0].mT if _is_transposed(layer) else values).reshape(weight_of(layer).shape)


def assign(layer: Layer, values: Tensor) -> None:
    """The layer's weight <- ``values``, as :func:`shaped` takes them."""
    with torch.no_grad():
        weight_of(layer).copy_(shaped(layer, values))


def _is_transposed(layer: Layer) -> bool:
    return any(f"{base.__module__}.{base.__qualname__}" == _TRANSPOSED for base in type(layer).__mro__)
