"""What MiniBlockFisher and KBFGS have in common: refused batches, resumes, scales of the loss, rests."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from relatives_cases import build, closure_of, step, train
from torch import nn
from two_level_cases import DAMPING, close

import mfac_kernels as mk

METHODS = {"mini-block": mk.MiniBlockFisher, "kbfgs": mk.KBFGS}
methods = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def tensors(state: Any) -> list[torch.Tensor]:
    if isinstance(state, dict):
        state = list(state.values())
    return [t for one in state for t in tensors(one)] if isinstance(state, list) else [state]


@methods
@pytest.mark.parametrize("kind", ["linear", "convolutional", "normalised"])
def test_resumes_bit_for_bit(method, kind):
    net, x = build(kind)
    options = {} if method is mk.KBFGS else {"inv_update_steps": 3}
    net = net.double()
    p = method(net, DAMPING, include=None, **options)
    train(net, p, x, 2)
    other = copy.deepcopy(net)
    q = method(other, DAMPING, **options)
    q.load_state_dict(copy.deepcopy(p.state_dict()))
    train(net, p, x, 3)
    train(other, q, x, 3)
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    assert p.diagnostics() == q.diagnostics()


@methods
def test_a_batch_that_is_not_finite_changes_nothing_and_is_counted(method):
    net, x = build("normalised")
    p = method(net, DAMPING)
    train(net, p, x, 2)
    before = [t.clone() for t in tensors(p._state())]
    step(net, p, closure_of(net, x, math.inf))
    if method is mk.MiniBlockFisher:
        p.blocks.refresh(DAMPING)
    for a, b in zip(before, tensors(p._state()), strict=True):
        assert torch.equal(a, b)
    assert (p.diagnostics()["seen"], p.diagnostics()["skipped"]) == (2, 1)
    train(net, p, x, 1)
    assert all(q.grad.isfinite().all() for layer in p._layers for q in layer.parameters())


@methods
def test_a_loss_that_is_scaled(method):
    results = []
    for scale in (1.0, 1024.0):
        net, x = build("linear")
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        scaler.scale(torch.ones(()))
        p = method(net, DAMPING, scaler=scaler)
        closure = closure_of(net, x, scale)
        for _ in range(2):
            closure()
            for q in net.parameters():
                q.grad /= scale
            p.step(closure) if method is mk.KBFGS else p.step()
        results.append([q.grad.clone() for q in net.parameters()])
    for a, b in zip(*results, strict=True):
        close(a, b)


@methods
def test_layers_that_rest_keep_what_they_have(method):
    a, b = (nn.Linear(3, 3).double() for _ in range(2))
    net = nn.ModuleList([a, b])
    p = method(net, DAMPING)

    def closure() -> None:
        net.zero_grad()
        a(torch.arange(12.0, dtype=torch.float64).view(4, 3).sin()).square().sum().backward()

    for _ in range(2):
        step(net, p, closure)
    assert b.weight.grad is None and a.weight.grad.isfinite().all()


@methods
def test_no_state_between_a_backward_pass_and_its_step(method):
    net, x = build("linear")
    p = method(net, DAMPING)
    closure_of(net, x)()
    with pytest.raises(RuntimeError, match=rf"{p._owner}: state_dict\(\) was called between a backward pass and"):
        p.state_dict()
    with pytest.raises((KeyError, ValueError), match="state_dict"):
        p.load_state_dict({})


@methods
def test_float32_networks(method):
    net, x = build("convolutional")
    net, x = net.float(), x.float()
    p = method(net, DAMPING)
    train(net, p, x, 4)
    assert all(q.grad.dtype == torch.float32 and q.grad.isfinite().all() for q in net.parameters())
    assert p.diagnostics()["seen"] == 4


@methods
def test_a_frozen_parameter_that_is_trained_later(method):
    net, x = build("linear")
    net[0].weight.requires_grad_(False)
    p = method(net, DAMPING, include=["2", "3"])
    closure = closure_of(net, x)
    closure()
    damping = p.damping
    p.damping = -1.0
    with pytest.raises(ValueError, match="damping: expected a positive number"):
        step(net, p, closure)
    p.damping = damping
    step(net, p, closure)
