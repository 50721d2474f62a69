"""What holds what: records, hooks, preconditioners, models; and that inputs are held no longer than autograd does."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from gathering_cases import KINDS, Net, assert_same, batch, factors, kfac, loss_of
from torch import nn

import mfac_kernels as mk


@pytest.mark.parametrize("pending", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_dropped_preconditioner_is_collected(kind, pending):
    """Though the model lives, and a graph whose outputs it has hooks on. Its hooks go with it."""
    net, x = Net(kind), batch(kind)
    p = kfac(net)
    gatherer, fisher = weakref.ref(p._gatherer), weakref.ref(p.fisher)
    output = net(x)
    if not pending:
        loss_of(output).backward()
        p.step()
        net.zero_grad()
    del p
    gc.collect()
    assert gatherer() is None and fisher() is None
    assert not net.body._forward_hooks and not net.head._forward_hooks
    loss_of(net(x) if not pending else output).backward()
    kept = net.body.weight.grad.clone()
    net.zero_grad()
    loss_of(net(x)).backward()
    assert torch.equal(net.body.weight.grad, kept)


def test_removed_hooks_free_what_the_model_held():
    net, x = Net("linear"), batch("linear")
    p = kfac(net)
    output = net(x)
    p.remove_hooks()
    assert not net.body._forward_hooks and not net.body._forward_hooks_with_kwargs
    p.remove_hooks()
    loss_of(net(x)).backward()
    assert p._gatherer.idle
    loss_of(output).backward()  # a call before, of a preconditioner that is alive
    p.step()
    assert p.fisher.seen == 1


@pytest.mark.parametrize("how", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
@pytest.mark.parametrize("kind", KINDS)
def test_a_copied_model_comes_without_factors(kind, how):
    net, x = Net(kind), batch(kind)
    p = kfac(net)
    loss_of(net(x)).backward()
    size = len(pickle.dumps(Net(kind)))
    other = how(net)
    p.step()
    kept = [f.clone() for f in factors(p)]
    loss_of(other(x)).backward()
    p.step()
    assert all(map(torch.equal, kept, factors(p)))
    other.zero_grad()
    assert len(pickle.dumps(other)) < size + 4096
    q = kfac(other)
    loss_of(other(x)).backward()
    q.step()
    assert_same(factors(q), kept)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_of_model_and_preconditioner_goes_on(how):
    net = Net("linear", 2)
    p = kfac(net, accumulation_steps=2, factor_decay=0.5)
    (loss_of(net(batch("linear"))) / 2).backward()
    pairs = [(net, p), how((net, p)), how((p, net))[::-1]]
    for other, _ in pairs[1:]:
        for mine, theirs in zip(net.parameters(), other.parameters(), strict=True):
            theirs.grad = mine.grad.clone()  # which copies of parameters have not
    found = []
    for n, k in pairs:
        for i in range(1, 4):
            (loss_of(n(batch("linear", seed=i))) / 2).backward()
            if i % 2:
                k.step()
        found.append([*factors(k), *(q.grad for q in n.parameters())])
    for others in found[1:]:
        assert all(map(torch.equal, found[0], others))


def test_two_on_one_model_warn():
    net = Net("linear")
    p = kfac(net)
    with pytest.warns(UserWarning, match=r"KFAC: another one is made for body: both .* remove_hooks\(\)"):
        q = kfac(net)
    p.remove_hooks()
    q.remove_hooks()
    r = kfac(net)
    del r
    gc.collect()
    mk.KFAC(net)


def records_of(layer: nn.Module) -> list[Any]:
    """Those that calls of the layer leave from now on, if they are alive."""
    found: list[Any] = []

    def look(module: nn.Module, inputs: object, output: torch.Tensor) -> None:
        assert output._backward_hooks is not None
        found.extend(weakref.ref(hook) for hook in output._backward_hooks.values())

    layer.register_forward_hook(look)
    return found


@pytest.mark.parametrize("retain", [False, True])
def test_inputs_are_let_go_with_those_of_autograd(retain):
    """In the backward pass, though the loss, and with it the graph, lives on. They are no copies."""
    layer, x = nn.Linear(8, 8), torch.randn(5, 8)
    p = mk.KFAC(layer)
    records = records_of(layer)
    loss = layer(x).square().sum()
    (record,) = (ref() for ref in records)
    assert record.x.get().data_ptr() == x.data_ptr()
    loss.backward(retain_graph=retain)
    assert (record.x is None) != retain
    p.step()


def test_records_die_with_their_outputs():
    layer = nn.Linear(8, 8)
    p = mk.KFAC(layer)
    records = records_of(layer)
    y = layer(torch.randn(5, 8))
    z = layer(y)
    assert [ref() is None for ref in records] == [False, False]
    del z
    assert [ref() is None for ref in records] == [False, True]
    del y
    assert [ref() is None for ref in records] == [True, True]
    assert p._gatherer.idle
