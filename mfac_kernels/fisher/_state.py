"""States of curvature objects: tensors in nested dicts and lists."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor


def check_entries(name: str, expected: Iterable[str], state: Mapping[str, Any]) -> None:
    """KeyError unless ``state`` has the ``expected`` entries."""
    missing = set(expected) - state.keys()
    if missing:
        raise KeyError(f"{name}: expected the entries {sorted(missing)}, which are missing")


def check_like(name: str, mine: Any, other: Any) -> None:
    """KeyError, TypeError or ValueError unless ``other`` nests tensors of the shapes and dtypes that ``mine`` has."""
    if isinstance(mine, dict):
        _check_type(name, dict, other)
        check_entries(name, mine, other)
        for key in mine:
            check_like(f"{name}[{key!r}]", mine[key], other[key])
    elif isinstance(mine, list):
        _check_type(name, list, other)
        if len(mine) != len(other):
            raise ValueError(f"{name}: expected {len(mine)}, got {len(other)}")
        for i, (a, b) in enumerate(zip(mine, other, strict=True)):
            check_like(f"{name}[{i}]", a, b)
    else:
        _check_type(name, Tensor, other)
        if mine.shape != other.shape or mine.dtype != other.dtype:
            expected, got = (f"{t.dtype} of shape {tuple(t.shape)}" for t in (mine, other))
            raise ValueError(f"{name}: expected {expected}, got {got}")


def _check_type(name: str, kind: type, value: object) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"{name}: expected a {kind.__name__.lower()}, got {type(value).__name__}")


@torch.no_grad()
def copy_into(mine: Any, other: Any) -> None:
    """Copy the tensors of ``other`` into those of ``mine``, as :func:`check_like` has compared them."""
    if isinstance(mine, dict):
        for key in mine:
            copy_into(mine[key], other[key])
    elif isinstance(mine, list):
        for a, b in zip(mine, other, strict=True):
            copy_into(a, b)
    else:
        mine.copy_(other)
