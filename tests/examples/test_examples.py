"""The examples run, and what they print is true."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[2] / "examples"
EXAMPLES = sorted(path.stem for path in FOLDER.glob("[!_]*.py"))


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"examples.{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def printed(name: str, capsys: pytest.CaptureFixture[str]) -> dict[str, float]:
    """What it says of each thing, where that is a number."""
    example(name).main()
    lines = capsys.readouterr().out.splitlines()
    return {match[1]: float(match[2]) for line in lines if (match := re.fullmatch(r"(.*) error (\S+)", line))}


@pytest.mark.parametrize("name", EXAMPLES)
def test_it_runs(name, capsys):
    example(name).main()
    assert capsys.readouterr().out


def test_layer_hessians(capsys):
    """float32: 4096 products are summed, and U has cond(H) on top."""
    errors = printed("layer_hessians", capsys)
    assert errors.pop("H of 4096 tokens: relative") < 1e-6
    three = errors.pop("U by three calls: relative")
    assert len(errors) == 2 and all(error <= 2 * three for error in errors.values())


def test_mixture_of_experts(capsys):
    errors = printed("mixture_of_experts", capsys)
    assert errors["3 bits, GPTQ: relative squared"] < errors["3 bits, rounding to nearest: relative squared"]
