"""tools/fuzz.py reaches all that is public, finds what it is made for, and finds nothing in a few examples."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

pytest.importorskip("hypothesis")
sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import fuzz
from fuzzing import SURFACES, missing, outcome


def test_every_public_name_is_called():
    assert missing() == set()


@pytest.mark.parametrize("name", sorted(SURFACES))
def test_a_few_examples(name):
    error = fuzz.examine(name, seed=0, examples=5, known=set(), done=Counter())
    assert error is None, error


@pytest.mark.parametrize(
    ("error", "allowed"),
    [
        (ValueError("damping: expected a positive number, got 0"), True),
        (RuntimeError("gram: g: expected 2 dimensions, got shape (3,)"), True),
        (KeyError("state_dict: expected an entry 'window'"), True),
        (RuntimeError("expected m1 and m2 to have the same dtype, but got: double != float"), False),
        (ValueError("zip() argument 2 is shorter than argument 1"), False),
        (IndexError("index 0 is out of bounds for dimension 1 with size 0"), False),
        (AssertionError(), False),
        (ZeroDivisionError("division by zero"), False),
    ],
)
def test_which_errors_may_be_raised(error, allowed):
    assert (outcome.judged(error) is None) == allowed


def test_what_an_error_changes_is_found():
    state = torch.zeros(3)

    def refuse() -> None:
        state[1] = 1
        raise ValueError("x: expected another, got this")

    with pytest.raises(outcome.Fault, match="expected an error to change nothing"):
        outcome.attempt(refuse, state)
    with pytest.raises(outcome.Fault, match="expected finite values"):
        outcome.expect_finite("x", torch.tensor(float("nan")))
