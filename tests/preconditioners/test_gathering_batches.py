"""What a batch is: calls without samples, inputs that samples share, samples in another dimension."""

from __future__ import annotations

import warnings

import pytest
import torch
from gathering_cases import EKFAC, F64, KINDS, Net, assert_same, batch, factors, kfac, loss_of, plain, seeded, state
from torch import Tensor, nn

# ---- calls without samples -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, EKFAC], ids=["factors", "moments"])
@pytest.mark.parametrize("kind", KINDS)
def test_batches_without_samples_change_nothing(kind, options):
    net, x = Net(kind, 2), batch(kind)
    p = kfac(net, factor_decay=0.5, **options)
    for _ in range(2):
        loss_of(net(x)).backward()
        p.step()
    kept = state(p)
    for _ in range(3):
        net(x[:0]).sum().backward()
        p.step()
    assert all(map(torch.equal, state(p), kept))
    assert p.fisher.seen == 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_pass_without_samples_among_others(kind):
    net, x = Net(kind, 2), batch(kind)
    p = kfac(net, accumulation_steps=3)
    for part in (x, x[:0], x):
        (loss_of(net(part)) / 3 if len(part) else net(part).sum()).backward()
    p.step()
    assert_same(factors(p), plain(net, [lambda: loss_of(net(x))]))


def test_a_call_without_samples_among_others():
    net, x = Net("linear"), batch("linear")
    p = kfac(net)
    loss_of(net.head(torch.cat([net.segment(x[:0]), net.segment(x)]))).backward()
    p.step()
    assert_same(factors(p), plain(net, [lambda: loss_of(net(x))]))


@pytest.mark.parametrize("module", [nn.LayerNorm(3), nn.BatchNorm1d(3).eval(), nn.Embedding(4, 3)])
def test_other_kinds_without_samples(module):
    net = nn.Sequential(module).double()
    x = torch.randint(4, (6, 2)) if isinstance(module, nn.Embedding) else seeded(6, 3)
    p = kfac(net, factor_decay=0.5)
    net(x).square().sum().backward()
    p.step()
    kept = state(p)
    net(x[:0]).sum().backward()
    p.step()
    assert all(map(torch.equal, state(p), kept))


# ---- inputs that samples share ---------------------------------------------------------------------------------------


class Shared(nn.Module):
    """A module whose input is the same for all samples, before layers whose inputs are not."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.shared, self.head = module, nn.Linear(3, 3)
        self.double()
        with torch.no_grad():
            for i, q in enumerate(self.parameters()):
                q.copy_(0.5 * seeded(*q.shape, seed=i))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head(x + self.shared(y))


SHARED = {
    "positions (1, S)": (lambda: nn.Embedding(5, 3), torch.arange(5)[None], True),
    "positions (S,)": (lambda: nn.Embedding(5, 3), torch.arange(5), True),
    "query (1, S, D)": (lambda: nn.Linear(2, 3), seeded(1, 5, 2), True),
    "normalized (1, S, D)": (lambda: nn.LayerNorm(3), seeded(1, 5, 3), False),
}


@pytest.mark.parametrize("options", [{}, {"loss_average": "positions"}, {"loss_average": "sum"}, EKFAC], ids=str)
@pytest.mark.parametrize("name", SHARED)
def test_inputs_that_all_samples_share(name, options):
    """As if they had been expanded, for gradients of samples that do not overlap: squares of their sums add up."""
    make, y, sums_over_positions = SHARED[name]
    n, s = 10, 5
    x = torch.zeros(n, s, 3, dtype=F64)
    chosen = torch.zeros(n, s, 3, dtype=F64)
    for i in range(n if sums_over_positions else 3):  # each has a gradient in one position, or column, of its own
        chosen[i, i % s, i // s if sums_over_positions else i] = 1 + i
    found = []
    for expanded in (True, False):
        net = Shared(make())
        with torch.no_grad():
            net.head.weight.copy_(torch.eye(3))
            net.head.bias.zero_()
        p = kfac(net, **options)
        given = (y if y.dim() > 1 else y[None]).expand(n, *y.shape[y.dim() > 1 :]).contiguous() if expanded else y
        for _ in range(2):
            net.zero_grad()
            loss = (chosen * net(x, given)).sum()
            (loss if options.get("loss_average") == "sum" else loss / n).backward()
            p.step()
        a, b = p.fisher.factors(0)
        block = [a, b.diagonal(dim1=1, dim2=2)] if sums_over_positions else [a.diagonal(dim1=1, dim2=2)]
        moments = [p.fisher._inverses.moments[0].sum()] if "eigen_correction" in options else []
        found.append(block + (moments if sums_over_positions else []))
    assert_same(found[1], found[0])


@pytest.mark.parametrize("y", [torch.arange(5)[None], torch.arange(5)])
def test_nothing_tells_the_size_of_the_batch(y):
    """One embedding: a warning that names it, or the size is given."""
    found = []
    for size in (None, 16):
        net = nn.ModuleDict({"positions": nn.Embedding(5, 3)}).double()
        with torch.no_grad():
            net["positions"].weight.copy_(seeded(5, 3))
        p = kfac(net, batch_size=size)
        chosen = torch.zeros(16, 5, 3, dtype=F64)
        for i in range(15):
            chosen[i, i % 5, i // 5] = 1
        ((net["positions"](y) * chosen).sum() / 16).backward()
        if size is None:
            with pytest.warns(UserWarning, match="positions: ., with no other layer to tell .* batch_size=") as caught:
                p.step()
            assert len(caught) == 1
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                p.step()
        a, b = p.fisher.factors(0)
        found.append(float(a.sum() * b.diagonal(dim1=1, dim2=2).sum()))
    # (1 / N) sum over all indices, times (1 / (N S)) sum of the squares of N / 16
    assert found[1] == pytest.approx(5 * 15 / (16 * 5))


def test_layers_with_other_samples_are_named():
    class Query(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x) + self.query(torch.ones(5, 3, dtype=x.dtype)))

    net = Query().double()
    p = kfac(net)
    loss_of(net(seeded(8, 5, 3))).backward()
    with pytest.warns(UserWarning, match="query: 5, not 8") as caught:
        p.step()
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss_of(net(seeded(8, 5, 3))).backward()
        p.step()


def test_batch_size_counts_rows_that_are_no_samples_as_positions():
    """Layers on flattened positions, and one that sees a part of the batch: the scale is that of N samples."""
    net, x = Net("sequence"), batch("sequence", 6)
    p = kfac(net, batch_size=6)
    flat = torch.tanh(net.body(x.flatten(0, 1)))
    loss_of(net.head(flat).unflatten(0, (6, 4))).backward()
    p.step()
    assert_same(factors(p), plain(net, [lambda: loss_of(net(x))]))
    p.batch_size = 12
    net.zero_grad()
    (loss_of(net(x)) / 2).backward()
    with pytest.warns(UserWarning, match="body: 6, not 12; head: 6, not 12"):
        p.step()
    a, b = plain(net, [lambda: loss_of(net(x))])[:2]
    assert_same(p.fisher.factors(0), [a / 2, b])


@pytest.mark.parametrize("options", [{}, {"approximation": "reduce"}, {"loss_average": "positions"}, EKFAC], ids=str)
@pytest.mark.parametrize("make", [lambda: nn.Linear(3, 3), lambda: nn.LayerNorm(3), lambda: nn.Embedding(4, 3)])
def test_samples_in_the_second_dimension(make, options):
    x = torch.randint(4, (5, 6), generator=torch.Generator().manual_seed(0))
    found = []
    for dim in (0, 1):
        net = nn.Sequential(make(), nn.Linear(3, 2)).double()
        with torch.no_grad():
            for i, q in enumerate(net.parameters()):
                q.copy_(seeded(*q.shape, seed=i))
        p = kfac(net, batch_dim=dim, **options)
        for _ in range(2):
            net.zero_grad()
            y = x if isinstance(net[0], nn.Embedding) else seeded(5, 6, 3)
            output = net(y.transpose(0, 1) if dim else y)
            loss = (output.transpose(0, 1) if dim else output).square().cumsum(1).sum() / len(x)
            loss.backward()
            p.step()
        found.append(state(p))
    assert_same(*found)
