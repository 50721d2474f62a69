"""The modules of examples/, which is no package that pytest would find."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[2] / "examples"
NAMES = sorted(path.stem for path in FOLDER.glob("[!_]*.py"))
PEERS = {
    "curvlinops_factors": ["curvlinops"],
    "laplace_kronecker": ["curvlinops", "laplace"],
    "with_accelerate": ["accelerate"],
    "with_lightning": ["lightning.pytorch"],
    "with_transformers": ["transformers", "accelerate"],
}


def example(name: str, peers: list[str] | None = None) -> ModuleType:
    """The module; the test is skipped where a library that it shows is missing."""
    for peer in PEERS.get(name, []) if peers is None else peers:
        pytest.importorskip(peer)
    if "examples" not in sys.modules:
        spec = importlib.util.spec_from_file_location("examples", FOLDER / "__init__.py")
        assert spec is not None and spec.loader is not None
        sys.modules["examples"] = importlib.util.module_from_spec(spec)
    return importlib.import_module(f"examples.{name}")
