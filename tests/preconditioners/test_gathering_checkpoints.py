"""Activation checkpoints of every kind leave the factors as they are, to rounding."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from gathering_cases import KINDS, Net, assert_same, batch, factors, gathering, kfac, loss_of
from torch import Tensor, nn

import mfac_kernels as mk

checkpoint = torch.utils.checkpoint.checkpoint
reentrant = functools.partial(checkpoint, use_reentrant=True)
recomputed = functools.partial(checkpoint, use_reentrant=False)


def nested(outer: Callable[..., Any], inner: Callable[..., Any]) -> Callable[..., Any]:
    return lambda f, x: outer(lambda x: inner(f, x), x)


class Twice(torch.autograd.Function):
    """A segment that is run again in its backward pass, as reversible blocks are: nested passes of another origin."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.f = f
        ctx.save_for_backward(x)
        with torch.no_grad():
            return f(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None]:
        (x,) = ctx.saved_tensors
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.f(x)
        torch.autograd.backward(y, gradient)
        return x.grad, None


WAYS: dict[str, Callable[..., Any]] = {
    "reentrant": reentrant,
    "recomputed": recomputed,
    "reentrant in reentrant": nested(reentrant, reentrant),
    "recomputed in recomputed": nested(recomputed, recomputed),
    "reentrant in recomputed": nested(recomputed, reentrant),
    "recomputed in reentrant": nested(reentrant, recomputed),
    "three deep": nested(reentrant, nested(reentrant, reentrant)),
    "function": lambda f, x: Twice.apply(x, f),
}


def plainly(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return f(x)


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("calls", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_checkpoints_leave_the_factors_as_they_are(way, kind, calls, k):
    net, found = Net(kind, calls), []
    for through in (plainly, WAYS[way]):
        with gathering(found, net, accumulation_steps=k) as p:
            for i in range(k):
                (loss_of(net(batch(kind, seed=i), through)) / k).backward()
        assert p.fisher.seen == 1
    assert_same(*found)


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_of_the_calls_is_checkpointed(kind):
    net, x, found = Net(kind, 3), batch(kind), []
    for part in (False, True):
        count = iter(range(6))
        with gathering(found, net, accumulation_steps=2):
            for _ in range(2):
                y = net(x, lambda f, x: reentrant(f, x) if part and next(count) % 2 else f(x))  # noqa: B023
                (loss_of(y) / 2).backward()
    assert_same(*found)


@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_sampled_labels(way, kind, calls):
    """A backward pass for each unit vector of the output: they sum to the Gauss-Newton matrix. The real one is none."""
    net, x, found = Net(kind, calls), batch(kind), []
    for through in (plainly, WAYS[way]):
        with gathering(found, net, fisher_type="mc", accumulation_steps=2) as p:
            for _ in range(2):
                output = net(x, through)
                with p.sampling():
                    for k in range(min(4, output[0].numel())):
                        (output.flatten(1)[:, k].sum() / len(x) / 2).backward(retain_graph=True)
                loss_of(output).backward()
    assert_same(*found)


@pytest.mark.parametrize("way", WAYS)
def test_several_losses_through_one_forward_pass(way):
    net, found = Net("linear", 2), []
    for through in (plainly, WAYS[way]):
        with gathering(found, net):
            output = net(batch("linear"), through)
            loss_of(output, 1).backward(retain_graph=True)
            loss_of(output, 2).backward()
    assert_same(*found)


@pytest.mark.parametrize("way", ["reentrant", "recomputed", "recomputed in recomputed"])
def test_probes_through_checkpoints(way):
    """A paused pass repeats the calls of a forward pass that was not paused, and the other way round."""
    net, x, found = Net("linear", 2), batch("linear"), []
    for probed in (False, True):
        with gathering(found, net) as p:
            output = net(x, WAYS[way])
            if probed:
                with p.paused():
                    output.sum().backward(retain_graph=True)
                if way != "reentrant":  # which has no torch.autograd.grad
                    torch.autograd.grad(output.sum(), x, retain_graph=True)
            loss_of(output).backward()
            if probed:
                with p.paused():
                    output = net(2 * x, WAYS[way])
                    output.sum().backward()
    assert_same(*found)


def test_a_pass_that_fails_is_over():
    """Not taken for one that the next is nested in."""

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            raise ArithmeticError

    net, x = Net("linear"), batch("linear")
    p = kfac(net, accumulation_steps=2)
    with pytest.raises(ArithmeticError):
        net.head(Fails.apply(net.segment(x))).sum().backward()
    p.step()
    found = []
    for _ in range(2):
        for _ in range(2):
            (loss_of(net(x, reentrant)) / 2).backward()
        p.step()
        found.append(factors(p))
    assert_same(*found)


@pytest.mark.parametrize("through", [plainly, recomputed, reentrant])
def test_records_hold_what_autograd_holds(through):
    """Saved inputs are packed as autograd's own: counted by what a pair of saved-tensor hooks is given."""
    packed: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        packed[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    found = []
    for with_kfac in (False, True):
        packed.clear()
        layers = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
        p = mk.KFAC(layers) if with_kfac else None
        x = torch.randn(5, 8, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            y = x
            for layer in layers:
                y = through(lambda x, layer=layer: torch.tanh(layer(x)), y)
        found.append(sum(packed.values()))
        y.sum().backward()
        assert p is None or p.fisher.batch_counts()[0].sum() == 4
    assert found[1] <= found[0]
