"""Modules of all kinds under KFAC, and the ways in which models use them."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from kfac_cases import F64, kfac, layer_fisher, mse, network, run, seeded
from torch import Tensor, nn

import mfac_kernels as mk


def test_a_module_called_twice_has_the_rows_of_both_calls():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            (self.layer,) = network(nn.Linear(3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(torch.tanh(self.layer(x)))

    net, x = Twice(), seeded(5, 3)
    p = kfac(net)
    run(net, p, x)
    first = torch.tanh(net.layer(x)).detach()
    rows = F.pad(torch.cat([x, first]), (0, 1), value=1.0)
    (a,), (b,) = p.fisher.factors(0)
    torch.testing.assert_close(a, rows.mT @ rows / 5)
    out = net.layer(first).detach()
    inner = (out @ net.layer.weight) * (1 - first**2)
    g = torch.cat([out, inner])
    torch.testing.assert_close(b, g.mT @ g / 10)


def test_modules_not_called_keep_their_factors_and_gradients():
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = network(nn.Linear(3, 2), nn.Linear(3, 2))
            self.use_right = True

        def forward(self, x: Tensor) -> Tensor:
            return self.right(x) if self.use_right else self.left(x)

    net = Branch()
    p = kfac(net)
    run(net, p, seeded(4, 3))
    kept = [f.clone() for f in p.fisher.factors(1)]
    net.use_right = False
    net.zero_grad()
    run(net, p, seeded(4, 3, seed=1))
    assert net.right.weight.grad is None
    for got, want in zip(p.fisher.factors(1), kept, strict=True):
        assert torch.equal(got, want)


def test_frozen_parameters():
    net = network(nn.Linear(3, 4), nn.Linear(4, 2))
    net[0].weight.requires_grad_(False)
    net[0].bias.requires_grad_(False)
    net[1].bias.requires_grad_(False)
    p = kfac(net)
    run(net, p, seeded(5, 3))
    assert [layer.name for layer in p._layers] == ["1"]
    assert p.fisher.shapes[0].columns == 4
    assert net[1].bias.grad is None


def test_what_is_left_alone_is_listed_once():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
            self.embed = nn.Embedding(5, 4)
            self.head = nn.Linear(4, 5, bias=False)
            self.again = nn.Linear(4, 5, bias=False)
            self.again.weight = self.head.weight
            self.scale = nn.Parameter(torch.ones(1))
            self.linear = nn.Linear(4, 4)

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.embed(tokens)
            x = x + self.attention(x, x, x, need_weights=False)[0] * self.scale
            return self.head(self.linear(x)) + self.again(x)

    net = Net()
    with pytest.warns(UserWarning, match="KFAC leaves") as caught:
        p = kfac(net)
    assert len(caught) == 1
    assert set(p.skipped_layers) == {"", "head", "again"}
    for word in ("Net is of no kind", "shares parameters with head"):
        assert word in str(caught[0].message)
    tokens = torch.tensor([[0, 1, 2], [3, 4, 0]])
    F.cross_entropy(net(tokens).flatten(0, 1), tokens.flatten()).backward()
    alone = net.scale.grad.clone()
    p.step()
    assert torch.equal(net.scale.grad, alone)
    assert bool(net.embed.weight.grad.isfinite().all())


def test_include_and_skip_by_name():
    net = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what was asked for is no news
        p = kfac(net, include=["1.*"], skip_layers=["1.1"])
    assert [layer.name for layer in p._layers] == ["1.0"]
    with pytest.raises(ValueError, match="model: expected layers to precondition, found none"):
        kfac(net, include=["none"])


def test_evaluation_gathers_nothing():
    net = network(nn.Linear(3, 2))
    p = kfac(net)
    net.eval()
    net(seeded(4, 3)).sum().backward()
    with torch.no_grad():
        net.train()(seeded(4, 3))
    p.step()
    assert float(p.fisher.factors(0)[0].abs().sum()) == 0


def test_removed_hooks_gather_nothing():
    net = network(nn.Linear(3, 2))
    p = kfac(net)
    p.remove_hooks()
    run(net, p, seeded(4, 3))
    assert float(p.fisher.factors(0)[0].abs().sum()) == 0


def test_sampling_leaves_gradients_alone():
    net = network(nn.Linear(3, 4))
    x, labels = seeded(6, 3), torch.tensor([0, 1, 2, 3, 0, 1])
    p = kfac(net, fisher_type="mc")
    logits = net(x)
    with p.sampling():
        drawn = torch.distributions.Categorical(logits=logits.detach()).sample()
        F.cross_entropy(logits, drawn).backward(retain_graph=True)
    assert all(q.grad is None for q in net.parameters())
    F.cross_entropy(logits, labels).backward()
    p.step()
    g = logits.detach().softmax(1) - F.one_hot(drawn, 4)
    torch.testing.assert_close(p.fisher.factors(0)[1][0], g.mT @ g / 6)


def test_compiled_models():
    def train(compiled: bool) -> list[Tensor]:
        torch._dynamo.reset()
        net = network(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        p = kfac(net)
        model = torch.compile(net, backend="aot_eager") if compiled else net
        for step in range(2):
            net.zero_grad()
            mse(model(seeded(5, 3, seed=step)), torch.ones(5, 2, dtype=F64)).backward()
            p.step()
        return [q.grad for q in net.parameters()]

    for got, want in zip(train(True), train(False), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


def test_moments_of_what_is_not_called_stay():
    """Between inversions: of a layer that rests, and of a normalization layer, whose block needs no correction."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.resting, self.last = network(
                nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 2)
            )
            self.rests = False

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(self.first(x))
            return self.last(x if self.rests else self.resting(x))

    net, x = Net(), seeded(6, 3)
    p = kfac(net, damping_style="exact", eigen_correction=True, inv_update_steps=100, factor_decay=0.5)
    updates = []
    for step in range(4):
        net.rests = step > 1
        run(net, p, x)
        updates.append((net.norm.weight.grad.clone(), [m.clone() for m in p.fisher._inverses.moments]))
    for _, moments in updates[2:]:
        assert any(torch.equal(a, b) for a, b in zip(moments, updates[1][1], strict=True))
    rested = p.fisher._place[[layer.name for layer in p._layers].index("resting")]
    norm = p.fisher._place[[layer.name for layer in p._layers].index("norm")]
    for stack, row in (rested, norm):
        i = p.fisher._stacks.index(stack)
        assert torch.equal(updates[3][1][i][row], updates[1][1][i][row])


def test_moments_of_reduced_rows():
    """One sample: the moments of its summed rows are the eigenvalues of its factors, whose basis they are in."""
    net, x = network(nn.Linear(3, 2)), seeded(1, 5, 3)
    p = kfac(
        net,
        approximation="reduce",
        damping_style="exact",
        eigen_correction=True,
        inv_update_steps=100,
        factor_decay=0.0,
    )
    sums = []
    for _ in range(2):
        run(net, p, x, lambda y: mse(y.sum(1), torch.ones(1, 2, dtype=F64)))
        sums.append(p.fisher._inverses.moments[0].sum())
    torch.testing.assert_close(sums[1], sums[0])


def test_sampling_leaves_every_gradient_as_it_was():
    net = network(nn.Linear(3, 4), nn.Linear(4, 2))
    p = kfac(net, fisher_type="mc", skip_layers=["1"])
    output = net(seeded(5, 3))
    with p.sampling():
        output.sum().backward(retain_graph=True)
    assert all(q.grad is None for q in net.parameters())


def test_no_learning_rate_no_clip():
    x, results = seeded(5, 3), []
    for options in ({"kl_clip": None}, {"kl_clip": 1e-9, "lr": lambda step: 0.1 * step}):
        net = network(nn.Linear(3, 2))
        p = mk.KFAC(net, 1e-2, **options)
        run(net, p, x)
        results.append(net[0].weight.grad.clone())
    assert torch.equal(*results)
    run(net, p, x)
    assert float(net[0].weight.grad.norm()) < 1e-2 * float(results[0].norm())
    for options, message in (
        ({"kl_clip": -1.0}, "kl_clip: expected a positive"),
        ({"lr": -0.1}, "lr: expected a number >= 0"),
    ):
        with pytest.raises(ValueError, match=message):
            run(net, mk.KFAC(net, 1e-2, **options), x)


def test_positions_count_as_samples():
    """Tokens of sequences against the same tokens as samples: every kind of layer, and one that is called twice."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.last = network(nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 2))

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.norm(self.first(self.first(x).tanh())))

    x, found = seeded(4, 5, 3), []
    for tokens, average in ((x, "positions"), (x.flatten(0, 1), "batch")):
        net = Net()
        p = kfac(net, loss_average=average)
        run(net, p, tokens, lambda y: 0.5 * (y - 1).square().sum() / 20)
        found.append([layer_fisher(p, i) for i in range(3)])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_counts_once(use_reentrant):
    x, found = seeded(6, 3).requires_grad_(), []
    for checkpointed in (False, True):
        first, last = network(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), network(nn.Linear(3, 2), seed=9)
        net = nn.ModuleList([first, last])
        p = kfac(net)
        hidden = torch.utils.checkpoint.checkpoint(first, x, use_reentrant=use_reentrant) if checkpointed else first(x)
        mse(last(hidden), torch.zeros(6, 2)).backward()
        p.step()
        found.append([layer_fisher(p, i) for i in range(3)])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want)


def test_frozen_normalization_statistics():
    """BatchNorm in evaluation mode inside a model that trains."""
    net = network(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    p = kfac(net)
    net[1].eval()
    run(net, p, seeded(6, 3))
    (blocks, _) = p.fisher.factors(1)
    assert float(blocks.abs().amin(dim=(1, 2)).min()) > 0


def test_freezing_later_and_keywords():
    net = network(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    p = kfac(net)
    for parameter in (net[0].weight, net[0].bias, net[1].bias):
        parameter.requires_grad_(False)
    for _ in range(2):
        net.zero_grad()
        mse(net[2](input=net[1](net[0](seeded(5, 3)))), torch.zeros(5, 2)).backward()
        p.step()
    assert net[0].weight.grad is None and bool(net[2].weight.grad.isfinite().all())
    assert p.fisher.seen == p.steps == 2


def test_a_copy_steps_on_its_own():
    net, x = network(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)), seeded(5, 3)
    p = kfac(net)
    run(net, p, x)
    other, q = copy.deepcopy((net, p))
    for n, r in ((net, p), (other, q)):
        run(n, r, x)
    assert p.steps == q.steps == 2
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_a_weight_that_is_computed_is_left_alone():
    with pytest.warns(UserWarning, match="0: its weight is computed from other parameters"):
        p = kfac(nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), nn.Linear(3, 2)))
    assert [layer.name for layer in p._layers] == ["1"]
