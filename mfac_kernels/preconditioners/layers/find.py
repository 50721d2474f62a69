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
from mfac_kernels.preconditioners.layers.tied import TiedLayer

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
    modules = dict(model.named_modules())
    owners = _owners(modules)
    attention = {m.out_proj: m for m in modules.values() if isinstance(m, nn.MultiheadAttention)}
    for name, module in modules.items():
        own = {n: p for n, p in module.named_parameters(recurse=False) if p.requires_grad and name in owners[id(p)]}
        if not own:
            continue
        users = _users(name, modules, owners)
        found: Sequence[Layer] | str = names.unwanted(name) or ""
        if not found and len(users) > 1:
            found = _shared(name, {user: modules[user] for user in users}, options, names)
        elif not found and module in attention:
            found = AttentionProjection.of_output(name, module, options.named(name), attention[module])
        elif not found:
            found = _layers_of(name, module, options)
        if isinstance(found, str):
            skipped[name] = found
            continue
        layers += found
        covered = {id(p) for layer in layers for p in layer.parameters()}
        left = [n for n, p in own.items() if id(p) not in covered]
        if left:
            skipped[name] = f"{type(module).__name__} has no Kronecker factors of {', '.join(left)}"
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


def _owners(modules: dict[str, nn.Module]) -> dict[int, list[str]]:
    """Names of the modules that hold a parameter, by its id; not of those of no kind that a module within gave it."""
    owners: dict[int, list[str]] = {}
    for name, module in modules.items():
        for p in module.parameters(recurse=False):
            owners.setdefault(id(p), []).append(name)
    for held in owners.values():
        for name in list(held):
            stem = f"{name}." if name else ""
            if kind_of(modules[name]) is None and any(n != name and n.startswith(stem) for n in held):
                held.remove(name)
    return owners


def _users(name: str, modules: dict[str, nn.Module], owners: dict[int, list[str]]) -> list[str]:
    """The module and those that share trained parameters with it, or with one that does."""
    users, new = set[str](), {name}
    while new:
        users |= new
        held = [p for n in new for p in modules[n].parameters(recurse=False) if p.requires_grad]
        new = {user for p in held for user in owners[id(p)]} - users
    return [user for user in modules if user in users]


def _shared(name: str, users: dict[str, nn.Module], options: Options, names: Names) -> Sequence[Layer] | str:
    """The layer that modules which share parameters are, at the first of them; or why they are none."""
    other = next(user for user in users if user != name)
    if not any(isinstance(m, torch.jit.ScriptModule) or names.unwanted(user) for user, m in users.items()):
        tied = TiedLayer.of_uses(users, {kind_of(m) for m in users.values()}, options.named(*users))
        if tied is not None:
            return [tied] if name == next(iter(users)) else []
    return f"shares parameters with {other}"
