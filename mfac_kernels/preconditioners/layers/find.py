"""Which modules of a model have a Fisher block, and why others have none."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from mfac_kernels.preconditioners.layers.attention import AttentionProjection
from mfac_kernels.preconditioners.layers.base import Layer, Options
from mfac_kernels.preconditioners.layers.kinds import kind_of
from mfac_kernels.preconditioners.layers.normalization import NO_NORMALIZATION

NOT_INCLUDED, SKIPPED = "not in include", "in skip_layers"
ASKED = (NOT_INCLUDED, SKIPPED, NO_NORMALIZATION)  # reasons that need no warning


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


def find_layers(model: nn.Module, options: Options, names: Names) -> tuple[list[Layer], dict[str, str]]:
    """The layers of a model that have a Fisher block, and why others, that are trained, have none."""
    layers: list[Layer] = []
    skipped: dict[str, str] = {}
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for p in module.parameters(recurse=False):
            owners.setdefault(id(p), []).append(name)
    attention = {m.out_proj: m for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    for name, module in model.named_modules():
        own = {n: p for n, p in module.named_parameters(recurse=False) if p.requires_grad}
        if not own:
            continue
        others = [other for p in own.values() for other in owners[id(p)] if other != name]
        found: Sequence[Layer] | str = names.unwanted(name) or ""
        if not found and others:  # the gradient is the sum of several layers'
            found = f"shares parameters with {others[0]}"
        if not found and module in attention:
            found = AttentionProjection.of_output(name, module, options, attention[module])
        if not found:
            found = _layers_of(name, module, options)
        if isinstance(found, str):
            skipped[name] = found
            continue
        layers += found
        covered = {id(p) for layer in found for p in layer.parameters()}
        for n, p in own.items():
            if id(p) not in covered:
                skipped[f"{name}.{n}" if name else n] = f"{type(module).__name__} has no Kronecker factors of it"
    return layers, skipped


def frozen_parameters(model: nn.Module, names: Names) -> dict[str, nn.Parameter]:
    """By name: those that are not trained, of modules that would have a block if they were."""
    return {
        f"{name}.{own}" if name else own: p
        for name, module in model.named_modules()
        if kind_of(module) is not None and names.unwanted(name) is None
        for own, p in module.named_parameters(recurse=False)
        if not p.requires_grad
    }


def _layers_of(name: str, module: nn.Module, options: Options) -> Sequence[Layer] | str:
    """The layers that a module is, or why it is none."""
    if isinstance(module, torch.jit.ScriptModule):
        return "it is scripted"
    kind = kind_of(module)
    if kind is None:
        return f"{type(module).__name__} is of no kind that has Kronecker factors"
    return kind.of(name, module, options.named(name))
