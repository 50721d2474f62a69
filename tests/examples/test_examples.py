"""The examples run, and what they print is true."""

from __future__ import annotations

import re

import pytest
from example_files import NAMES, example


def printed(name: str, capsys: pytest.CaptureFixture[str]) -> dict[str, float]:
    """What it says of each thing, where that is a number."""
    example(name).main()
    lines = capsys.readouterr().out.splitlines()
    return {match[1]: float(match[2]) for line in lines if (match := re.fullmatch(r"(.*) error (\S+)", line))}


@pytest.mark.parametrize("name", NAMES)
def test_it_runs(name, capsys):
    """float32: two ways to one thing differ by rounding, times the condition of H; influence predicts, GPTQ rounds."""
    allowed = {"mixture_of_experts": 1.0, "influence": 0.1, "layer_hessians": 1e-3}.get(name, 1e-4)
    errors = printed(name, capsys)
    assert all(error <= allowed for error in errors.values()), errors


def test_layer_hessians(capsys):
    """float32: 4096 products are summed, and U has cond(H) on top."""
    errors = printed("layer_hessians", capsys)
    assert errors.pop("H of 4096 tokens: relative") < 1e-6
    three = errors.pop("U by three calls: relative")
    assert len(errors) == 2 and all(error <= 2 * three for error in errors.values())


def test_mixture_of_experts(capsys):
    errors = printed("mixture_of_experts", capsys)
    assert errors["3 bits, GPTQ: relative squared"] < errors["3 bits, rounding to nearest: relative squared"]
