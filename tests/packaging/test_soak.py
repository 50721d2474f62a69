"""The soak test itself, for a few steps; tools/soak.py runs it for 20,000."""

from __future__ import annotations

import pytest
import soak
import torch


@pytest.mark.parametrize("kind", soak.KINDS)
def test_a_disturbed_training_ends_as_an_undisturbed_one(kind):
    assert soak.soak(kind, 150, seed=1, say=False) == []


def test_a_difference_is_found():
    one, other = soak.Training("MFAC"), soak.Training("MFAC")
    with torch.no_grad():
        other.net[3].bias[0] += 1e-6
    assert soak.compare(one, other) == ["3.bias"]
