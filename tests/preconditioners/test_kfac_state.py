"""The state of KFAC, and what it refuses."""

from __future__ import annotations

import copy

import pytest
import torch
from kfac_cases import kfac, network, run, seeded
from torch import nn

import mfac_kernels as mk

RESUMED = [
    {},
    {"damping_style": "exact", "eigen_correction": True, "inv_update_steps": 3},
    {"approximate": "deflation"},
    {"approximate": "deflation", "inv_update_steps": 3},
]


@pytest.mark.parametrize("options", RESUMED)
def test_state_resumes_bit_for_bit(options):
    def make() -> tuple[nn.Module, mk.KFAC]:
        net = network(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(27, 2))
        return net, kfac(net, **options)

    net, p = make()
    for step in range(4):
        run(net, p, seeded(5, 2, 5, 5, seed=step))
    other, q = make()
    other.load_state_dict(net.state_dict())
    q.load_state_dict(copy.deepcopy(p.state_dict()))
    for step in range(4, 8):
        for n, r in ((net, p), (other, q)):
            run(n, r, seeded(5, 2, 5, 5, seed=step))
        for a, b in zip(net.parameters(), other.parameters(), strict=True):
            assert torch.equal(a.grad, b.grad)
    assert p.diagnostics() == q.diagnostics()


def test_state_that_does_not_fit_changes_nothing():
    net = network(nn.Linear(3, 2))
    p = kfac(net)
    run(net, p, seeded(4, 3))
    other = kfac(network(nn.Linear(4, 2)))
    kept = copy.deepcopy(p.state_dict())
    with pytest.raises(
        ValueError, match=r"state_dict\['stacks'\]\[0\]\['inputs'\]: expected .*\(1, 1, 4, 4\), got .*\(1, 1, 5, 5\)"
    ):
        p.load_state_dict(other.state_dict())
    with pytest.raises(KeyError, match="state_dict: expected the entries"):
        p.load_state_dict({})
    assert p.steps == kept["steps"]
    for mine, theirs in zip(p.state_dict()["fisher"]["stacks"], kept["fisher"]["stacks"], strict=True):
        assert all(torch.equal(mine[k], theirs[k]) for k in mine)


BAD = [
    ({"spatial": "half"}, ValueError, "spatial: expected one of full, sua, got 'half'"),
    ({"approximation": "sum"}, ValueError, "approximation: expected one of expand, reduce"),
    ({"fisher_type": "true"}, ValueError, "fisher_type: expected one of empirical, mc"),
    ({"loss_average": "mean"}, ValueError, "loss_average: expected one of batch, positions, sum"),
    ({"normalization": "full"}, ValueError, "normalization: expected one of unit, diagonal, skip"),
    ({"factor_update_steps": 0}, ValueError, "factor_update_steps: expected at least 1, got 0"),
    ({"inv_update_steps": 0.5}, TypeError, "inv_update_steps: expected an int"),
    ({"accumulation_steps": -1}, ValueError, "accumulation_steps: expected at least 1, got -1"),
    ({"damping": 0.0}, ValueError, "damping: expected a positive finite number, got 0.0"),
    ({"damping": "1"}, TypeError, "damping: expected a number or a function of the step"),
    ({"factor_decay": 1.0}, ValueError, r"factor_decay: expected a number in \[0, 1\), got 1.0"),
    ({"group_size": 0}, ValueError, "input_block: expected at least 1, got 0"),
    ({"damping_style": "half"}, ValueError, "style: expected"),
    ({"eigen_correction": True}, ValueError, "eigen_correction: expected style"),
    ({"eigen_correction": True, "spatial": "sua"}, ValueError, 'eigen_correction: expected spatial "full", got "sua"'),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD)
def test_errors(options, error, message):
    with pytest.raises(error, match=message):
        mk.KFAC(nn.Linear(2, 2), **options)
