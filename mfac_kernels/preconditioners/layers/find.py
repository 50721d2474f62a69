"""Which modules of a model have a Fisher block, and why others have none."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from mfac_kernels.preconditioners.layers.base import Layer, Normalization, Options
from mfac_kernels.preconditioners.layers.convolution import ConvLayer
from mfac_kernels.preconditioners.layers.embedding import EmbeddingLayer
from mfac_kernels.preconditioners.layers.linear import LinearLayer
from mfac_kernels.preconditioners.layers.normalization import NORMALIZATIONS, NormalizationLayer

NOT_INCLUDED, SKIPPED, NO_NORMALIZATION = "not in include", "in skip_layers", 'normalization is "skip"'
ASKED = (NOT_INCLUDED, SKIPPED, NO_NORMALIZATION)  # reasons that need no warning

KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding, *NORMALIZATIONS)


@dataclass(frozen=True)
class Names:
    """Patterns of the names of modules: those to precondition, or None for all, and those to leave alone."""

    include: tuple[str, ...] | None
    skip: tuple[str, ...]

    def unwanted(self, name: str) -> str | None:
        """Why a module is to be left alone; None: it is not."""
        if self.include is not None and not any(fnmatch.fnmatchcase(name, pattern) for pattern in self.include):
            return NOT_INCLUDED
        return SKIPPED if any(fnmatch.fnmatchcase(name, pattern) for pattern in self.skip) else None


def find_layers(
    model: nn.Module, options: Options, normalization: Normalization, names: Names
) -> tuple[list[Layer], dict[str, str]]:
    """The layers of a model that have a Fisher block, and why others, that are trained, have none."""
    layers: list[Layer] = []
    skipped: dict[str, str] = {}
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for p in module.parameters(recurse=False):
            owners.setdefault(id(p), []).append(name)
    attention: list[str] = []
    for name, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if p.requires_grad]
        if isinstance(module, nn.MultiheadAttention):
            attention.append(f"{name}." if name else "")
        if not own:
            continue
        others = [other for p in own for other in owners[id(p)] if other != name]
        layer: Layer | str = names.unwanted(name) or ""
        if not layer and f"{name}.".startswith(tuple(attention)):
            layer = "the projections of nn.MultiheadAttention are not called as modules"
        if not layer and others:  # the gradient is the sum of several layers'
            layer = f"shares parameters with {others[0]}"
        if not layer:
            layer = _layer(name, module, options, normalization)
        if isinstance(layer, str):
            skipped[name] = layer
        else:
            layers.append(layer)
    return layers, skipped


def frozen_parameters(model: nn.Module, names: Names) -> dict[str, nn.Parameter]:
    """By name: those that are not trained, of modules that would have a block if they were."""
    return {
        f"{name}.{own}" if name else own: p
        for name, module in model.named_modules()
        if isinstance(module, KINDS) and names.unwanted(name) is None
        for own, p in module.named_parameters(recurse=False)
        if not p.requires_grad
    }


def _layer(name: str, module: nn.Module, options: Options, normalization: Normalization) -> Layer | str:
    """The layer, or why there is none."""
    if isinstance(module, torch.jit.ScriptModule):
        return "it is scripted"
    if not isinstance(module, KINDS):
        return f"{type(module).__name__} is of no kind that has Kronecker factors"
    weight = module.weight
    if isinstance(weight, UninitializedParameter):
        return "its weight has no shape yet: call the model once before"
    if not isinstance(weight, nn.Parameter):
        return "its weight is computed from other parameters"
    if not weight.requires_grad:
        return "its weight is not trained"
    if not weight.is_floating_point():
        return f"expected a real weight, got {weight.dtype}"
    if isinstance(module, nn.Linear):
        return LinearLayer(name, module, options)
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return ConvLayer(name, module, options)
    if isinstance(module, nn.Embedding):
        unlike = [n for n in ("sparse", "scale_grad_by_freq", "max_norm") if getattr(module, n)]
        return f"{unlike[0]} is set" if unlike else EmbeddingLayer(name, module, options)
    if normalization == "skip":
        return NO_NORMALIZATION
    return NormalizationLayer(name, module, normalization == "diagonal")
