"""The state of MFAC: saved, loaded, live; and state dicts that do not fit."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from mfac_cases import MODES, assert_equal, backward, batches, grads, mlp, tensors, train
from torch import nn

import mfac_kernels as mk


@pytest.mark.parametrize("per_group", [False, True])
@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("momentum_mode", MODES)
def test_resumes_bit_for_bit(momentum_mode, storage, per_group, device):
    data = batches(10, torch.float32, device)

    def make(model: nn.Module) -> tuple[mk.MFAC, torch.optim.Optimizer]:
        groups = [{"params": model[0].parameters()}, {"params": model[2].parameters()}]
        p = mk.MFAC(
            groups, 3, lambda t: 0.1 / (1 + t), momentum=0.9, momentum_mode=momentum_mode,
            weight_decay=0.01, dtype=storage, per_group=per_group,
        )  # fmt: skip
        return p, torch.optim.SGD(model.parameters(), lr=0.05)

    def run(model: nn.Module, p: mk.MFAC, optimizer: torch.optim.Optimizer, part: slice) -> None:
        for x, y in data[part]:
            backward(model, x, y)
            p.step()
            optimizer.step()

    model = mlp(torch.float32, device)
    p, optimizer = make(model)
    run(model, p, optimizer, slice(0, 5))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "p": p.state_dict(), "optimizer": optimizer.state_dict()}, file)
    run(model, p, optimizer, slice(5, 10))

    other = mlp(torch.float32, device, seed=7)
    p2, optimizer2 = make(other)
    run(other, p2, optimizer2, slice(0, 2))
    state = torch.load(io.BytesIO(file.getvalue()))
    other.load_state_dict(state["model"])
    p2.load_state_dict(state["p"])
    optimizer2.load_state_dict(state["optimizer"])
    run(other, p2, optimizer2, slice(5, 10))
    assert_equal(other.state_dict(), model.state_dict())
    assert_equal(p2.state_dict(), p.state_dict())
    assert_equal(grads(other), grads(model))


def test_state_dict_is_live_and_loads_onto_itself(device):
    model = mlp(torch.float32, device)
    p = train(model, batches(4, torch.float32, device))
    state = p.state_dict()
    backward(model, *batches(1, torch.float32, device)[0])
    p.step()
    live = {**state, "steps": p.steps}
    before = tensors(p.state_dict())
    assert_equal(live, before)
    p.load_state_dict(live)
    assert_equal(p.state_dict(), before)


@pytest.mark.parametrize(
    ("spoil", "kind", "message"),
    [
        (lambda s: s.pop("steps"), KeyError, r"expected the entries \['steps'\]"),
        (lambda s: s.pop("windows"), KeyError, r"expected the entries \['windows'\]"),
        (lambda s: s["windows"].pop(), ValueError, r"state_dict\['windows'\]: expected 2, got 1"),
        (lambda s: s["momentum_buffers"].pop(), ValueError, r"state_dict\['momentum_buffers'\]: expected 2, got 1"),
        (
            lambda s: s["momentum_buffers"].__setitem__(1, torch.zeros(4)),
            ValueError,
            r"state_dict\['momentum_buffers'\]\[1\]: expected torch.float32 of shape \(21,\), got .* of shape \(4,\)",
        ),
        (lambda s: s["windows"][1].pop("gram"), KeyError, r"expected the entries \['gram'\]"),
        (
            lambda s: s["windows"][1].update(window=torch.zeros(2, 2)),
            ValueError,
            r"state_dict\['window'\]: expected torch.float32 of shape \(3, 21\), got torch.float32 of shape \(2, 2\)",
        ),
    ],
)  # fmt: skip
def test_state_dicts_that_do_not_fit(spoil, kind, message):
    def make(seed: int) -> mk.MFAC:
        model = mlp(torch.float32, seed=seed)
        groups = [{"params": model[0].parameters()}, {"params": model[2].parameters()}]
        p = mk.MFAC(groups, 3, 0.1, momentum=0.9, per_group=True)
        for x, y in batches(4, torch.float32):
            backward(model, x, y)
            p.step()
        return p

    p, state = make(0), copy.deepcopy(make(1).state_dict())
    spoil(state)
    before = tensors(p.state_dict())
    with pytest.raises(kind, match=message):
        p.load_state_dict(state)
    assert_equal(p.state_dict(), before)
