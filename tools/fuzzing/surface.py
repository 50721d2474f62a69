"""The surfaces: one for each public name, or for several that go together."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import mfac_kernels as mk
from fuzzing.draw import Draw

Surface = Callable[[Draw], None]

SURFACES: dict[str, Surface] = {}
COVERS: dict[str, tuple[str, ...]] = {}

RESULTS = {"ops.RobustInverse", "ops.RobustInverseFactor", "pruning.Gradients", "pruning.Pruned", "pruning.Quantized"}
RESULTS |= {"pruning.Step", "pruning.Held", "pinn.Linearisation"}
"""Made by functions, which are called; methods are called with them."""
BUILD = {"build_info", "cpu_capability", "get_include", "get_library"}


def surface(*names: str) -> Callable[[Surface], Surface]:
    """Registers what calls the public ``names``, under the first of them."""

    def register(call: Surface) -> Surface:
        SURFACES[names[0]], COVERS[names[0]] = call, names
        return call

    return register


def public_names() -> set[str]:
    """What can be called, as ``gram`` of ``mk.ops`` is ``"ops.gram"``."""
    modules = {"": mk, "ops.": mk.ops, "pruning.": mk.pruning, "pinn.": mk.pinn}
    return {
        prefix + name
        for prefix, module in modules.items()
        for name in module.__all__
        if callable(value := getattr(module, name)) and not inspect.ismodule(value) and not _is_alias(value)
    }


def _is_alias(value: object) -> bool:
    """A type such as Callable[..] or Literal[..]"""
    return not inspect.isclass(value) and not inspect.isroutine(value)


def missing() -> set[str]:
    """Public names that nothing calls."""
    covered = {name for names in COVERS.values() for name in names}
    return public_names() - covered - RESULTS - BUILD
