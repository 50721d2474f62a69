"""Calls of one pass share its sums, passes are averaged: against the plain loop of the definition."""

from __future__ import annotations

import copy

import pytest
import torch
from gathering_cases import F64, KINDS, Net, assert_same, batch, factors, gathering, kfac, loss_of, plain, seeded
from torch import nn

import mfac_kernels as mk

OPTIONS = {"": {}, "exact": {"damping_style": "exact"}, "EKFAC": {"damping_style": "exact", "eigen_correction": True}}


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("calls", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_against_the_plain_loop(kind, calls, k):
    """Passes of other sizes, too: the mean over passes is not that of one batch then."""
    net = Net(kind, calls)
    p = kfac(net, accumulation_steps=k)
    batches = [batch(kind, seed=i, size=0 if kind == "linear" else i) for i in range(k)]
    for x in batches:
        (loss_of(net(x)) / k).backward()
    p.step()
    assert_same(factors(p), plain(net, [lambda x=x: loss_of(net(x)) for x in batches]))


@pytest.mark.parametrize("kind", KINDS)
def test_passes_that_call_a_layer_more_or_less_often(kind):
    net = Net(kind)
    p = kfac(net, accumulation_steps=3)
    x, losses = batch(kind), []
    for calls in (1, 3, 2):
        net.calls = calls
        (loss_of(net(x)) / 3).backward()
    p.step()

    def loss(calls: int) -> torch.Tensor:
        net.calls = calls
        return loss_of(net(x))

    losses = [lambda calls=calls: loss(calls) for calls in (1, 3, 2)]
    assert_same(factors(p), plain(net, losses))


@pytest.mark.parametrize("kind", KINDS)
def test_passes_are_counted_not_believed(kind):
    """Two of four accumulation steps, as at the end of an epoch: their mean, with the loss divided as it was."""
    net, x = Net(kind, 2), batch(kind)
    p = kfac(net, accumulation_steps=4)
    for _ in range(2):
        (loss_of(net(x)) / 4).backward()
    p.step()
    assert_same(factors(p), plain(net, [lambda: loss_of(net(x))]))


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_passes_of_all_losses_at_once_and_each_on_its_own(kind, k):
    """Through one forward pass: A enters once, and B with each, as two backward passes are one of the sum."""
    net = Net(kind, 2)
    found = []
    for apart in (False, True):
        with gathering(found, net, accumulation_steps=k):
            for i in range(k):
                output = net(batch(kind, seed=i))
                first = loss_of(output) / k
                first.backward(retain_graph=apart)
                if apart:
                    (0 * output.sum()).backward()
    assert_same(*found)


@pytest.mark.parametrize("calls", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_sum_and_a_mean_have_the_same_factors(kind, calls):
    net, x, found = Net(kind, calls), batch(kind), []
    for average in ("batch", "sum"):
        with gathering(found, net, loss_average=average, accumulation_steps=2):
            for _ in range(2):
                loss = loss_of(net(x))
                (loss / 2 if average == "batch" else loss * len(x)).backward()
    assert_same(*found)


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_equal_passes_are_one(kind, calls, approximation):
    net, x, found = Net(kind, calls), batch(kind), []
    for k in (1, 3):
        with gathering(found, net, accumulation_steps=k, approximation=approximation):
            for _ in range(k):
                (loss_of(net(x)) / k).backward()
    assert_same(*found)


@pytest.mark.parametrize("k", [1, 2])
def test_normalization_blocks_of_several_calls(k):
    """Of one LayerNorm: the block is the mean over samples of the squared gradients of all its calls."""
    norm = nn.LayerNorm(3).double()
    with torch.no_grad():
        norm.weight.copy_(seeded(3, seed=1))
    p = kfac(norm, accumulation_steps=k)
    x = seeded(4, 5, 3)
    for _ in range(k):
        (loss_of(norm(norm(x))) / k).backward()
    p.step()
    y = norm(x).detach().requires_grad_()
    out = norm(y)
    loss = loss_of(out)
    outer = 4 * torch.autograd.grad(loss, out, retain_graph=True)[0]
    inner = 4 * torch.autograd.grad(loss, y)[0]
    want = 0
    for g, value in ((outer, y), (inner, x)):
        normal = nn.functional.layer_norm(value, (3,))
        rows = torch.stack([(g * normal).sum(1), g.sum(1)], -1)  # (N, units, 2)
        want = want + torch.einsum("nui,nuj->uij", rows, rows) / 4
    assert_same([p.fisher.factors(0)[0]], [want.detach()])


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_state_between_micro_batches(kind, options, tmp_path):
    """Held bit for bit, in a file, for another preconditioner and for the same one, which goes on as if not asked."""

    def make() -> tuple[Net, mk.KFAC]:
        net = Net(kind, 2)
        return net, kfac(net, accumulation_steps=3, inv_update_steps=2, factor_decay=0.5, **options)

    def run(net: Net, p: mk.KFAC, parts: range) -> None:
        for i in parts:
            (loss_of(net(batch(kind, seed=i))) / 3).backward()
            if i % 3 == 2:
                p.step()

    net, p = make()
    run(net, p, range(5))
    torch.save([p.state_dict(), [q.grad for q in net.parameters()]], tmp_path / "state")
    other, q = make()
    state, gradients = torch.load(tmp_path / "state")
    q.load_state_dict(state)
    for parameter, gradient in zip(other.parameters(), gradients, strict=True):
        parameter.grad = gradient
    unasked, r = make()
    run(unasked, r, range(9))
    for n, k in ((net, p), (other, q)):
        run(n, k, range(5, 9))
        assert all(map(torch.equal, factors(k), factors(r)))
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(n.parameters(), unasked.parameters(), strict=True))


def test_state_that_does_not_fit_is_refused():
    net = Net("linear")
    p, other = kfac(net), kfac(Net("convolution"))
    loss_of(net(batch("linear"))).backward()
    state = copy.deepcopy(p.state_dict())
    with pytest.raises(ValueError, match=r"state_dict\['gathered'\]"):
        p.load_state_dict({**state, "gathered": {**state["gathered"], "passes": [1]}})
    loss_of(Net("convolution")(batch("convolution"))).backward()
    bad = {**state["gathered"], "sums": [torch.zeros(2, dtype=F64)] * 2}
    with pytest.raises(ValueError, match=r"state_dict\['gathered'\]\['sums'\]"):
        p.load_state_dict({**state, "gathered": bad})
    with pytest.raises(KeyError, match="gathered"):
        other.load_state_dict({"steps": 0, "fisher": {}})
    p.step()
    assert p.fisher.seen == 1
