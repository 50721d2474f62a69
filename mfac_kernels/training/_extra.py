"""The packages of the ``demo`` extra, imported where they are needed and missed with a word on how to get them."""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["MissingDependency", "require"]


class MissingDependency(RuntimeError):
    """A package of the ``demo`` extra is not installed; the message says how to install it."""


def require(module: str, package: str, purpose: str) -> Any:
    """Import a module of the ``demo`` extra, or raise MissingDependency with ``purpose``."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingDependency(
            f'{package} is needed {purpose} and cannot be imported ({error}): pip install "mfac_kernels[demo]"'
        ) from error
