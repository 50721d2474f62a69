"""TKFAC and KPSVD: traces, the SVD of the rearranged Fisher, and which is nearer to the Fisher."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from kfac_cases import F64, kfac, layer_fisher, mse, network, seeded
from pair_cases import dense, nearest, partial_traces
from torch import Tensor, nn

import mfac_kernels as mk

WAYS = ("kfac", "tkfac", "kpsvd")
# The power iteration has converged to rounding in these many batches: its rate is the ratio of two singular values.
BATCHES = 120


def correlated(n: int, *shape: int) -> Tensor:
    """Inputs of very different norms: what K-FAC's averages do not see."""
    x = seeded(n, *shape)
    return x * torch.linspace(0.2, 3, n, dtype=F64).view(-1, *[1] * len(shape))


def batches(
    net: nn.Module, x: Tensor, way: str, count: int = 1, module: nn.Module | None = None, **options: object
) -> tuple[mk.KFAC, Tensor]:
    """K-FAC after ``count`` times the same batch, and the output gradients of the module, times N."""
    p = kfac(net, approximate=way, factor_decay=0.0, **options)
    seen: list[Tensor] = []
    hook = (module or net[0]).register_forward_hook(lambda m, i, y: y.register_hook(seen.append) and None)
    for _ in range(count):
        net.zero_grad()
        y = net(x)
        mse(y, seeded(*y.shape, seed=5)).backward()
        p.step()
    hook.remove()
    p.remove_hooks()
    return p, seen[0] * len(x)


def with_ones(a: Tensor) -> Tensor:
    return torch.nn.functional.pad(a, (0, 1), value=1.0)


@pytest.mark.parametrize("shape", [(9, 4), (5, 3, 4), (1, 4)])
def test_traces_are_those_of_the_fisher(shape):
    net, x = network(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)), correlated(*shape)
    p, g = batches(net, x, "tkfac")
    m = dense(with_ones(x).flatten(0, -2), g.flatten(0, -2), 1 / len(x))
    got = layer_fisher(p)
    torch.testing.assert_close(got.trace(), m.trace(), rtol=1e-12, atol=0)
    for mine, exact in zip(partial_traces(got, 3), partial_traces(m, 3), strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-11, atol=1e-12 * float(m.trace()))
    (a,), (b,) = p.fisher.factors(0)
    torch.testing.assert_close(a.trace() / 5, b.trace() / 3, rtol=1e-12, atol=0)  # one mean eigenvalue
    phi, psi = a / a.trace(), b / b.trace()  # the paper's, of trace 1, with delta = tr F
    torch.testing.assert_close(got, m.trace() * torch.kron(psi, phi), rtol=1e-11, atol=1e-12 * float(m.trace()))


@pytest.mark.parametrize("shape", [(9, 4), (5, 3, 4)])
def test_power_iteration_is_the_svd_of_the_rearrangement(shape):
    net, x = network(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)), correlated(*shape)
    p, g = batches(net, x, "kpsvd", BATCHES)
    m = dense(with_ones(x).flatten(0, -2), g.flatten(0, -2), 1 / len(x))
    torch.testing.assert_close(layer_fisher(p), nearest(m, 3), rtol=1e-9, atol=1e-11 * float(m.norm()))


def test_the_first_batch_of_the_power_iteration_is_of_traces():
    net, x = network(nn.Linear(4, 3)), correlated(9, 4)
    first = [layer_fisher(batches(net, x, way)[0]) for way in ("kpsvd", "tkfac")]
    torch.testing.assert_close(*first, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_which_is_nearer_to_the_fisher(seed, approximation):
    net, x = network(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2), seed=seed), correlated(7, 2, 4)
    error = {}
    for way in WAYS:
        p, g = batches(net, x, way, BATCHES if way == "kpsvd" else 1, approximation=approximation)
        a, c = with_ones(x), g
        if approximation == "reduce":
            a, c = a.sum(1, keepdim=True), c.mean(1, keepdim=True)
        m = dense(a.flatten(0, 1), c.flatten(0, 1), 1 / len(x))
        error[way] = float((layer_fisher(p) - m).norm())
    assert error["kpsvd"] <= min(error["tkfac"], error["kfac"]) * (1 + 1e-12)
    assert error["kpsvd"] < 0.999 * error["kfac"]


CONVOLUTIONS = {
    "plain": nn.Conv2d(3, 4, 3, padding=1),
    "strided": nn.Conv2d(3, 4, 3, stride=2, bias=False),
    "groups": nn.Conv2d(4, 4, 3, groups=2),
    "depthwise": nn.Conv1d(3, 3, 2, groups=3),
}


def patches_by_autograd(module: nn.Module, x: Tensor, group: int) -> Tensor:
    """(N S, columns) of a group: the weight's gradient of one output pixel is the patch that it sees."""
    channel = group * (module.out_channels // module.groups)
    parameters = [module.weight] + ([] if module.bias is None else [module.bias])
    rows = []
    for pixel in module(x).flatten(2)[:, channel].flatten():
        found = torch.autograd.grad(pixel, parameters, retain_graph=True)
        rows.append(torch.cat([f[channel].flatten() for f in found]))
    return torch.stack(rows)


@pytest.mark.parametrize("way", ["tkfac", "kpsvd"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name, way):
    module = copy.deepcopy(CONVOLUTIONS[name])
    net, x = network(module), correlated(4, module.in_channels, *[4] * (module.weight.dim() - 2))
    p, g = batches(net, x, way, 1 if way == "tkfac" else BATCHES)
    a, b = p.fisher.factors(0)
    outputs = module.out_channels // module.groups
    for group in range(module.groups):
        rows = g.flatten(2)[:, group * outputs : (group + 1) * outputs].mT.flatten(0, 1)
        m = dense(patches_by_autograd(module, x, group), rows, 1 / len(x))
        got = torch.kron(b[group], a[group])
        if way == "kpsvd":
            torch.testing.assert_close(got, nearest(m, outputs), rtol=1e-8, atol=1e-10 * float(m.norm()))
            continue
        for mine, exact in zip(partial_traces(got, outputs), partial_traces(m, outputs), strict=True):
            torch.testing.assert_close(mine, exact, rtol=1e-10, atol=1e-12 * float(m.trace()))


@pytest.mark.parametrize("way", ["tkfac", "kpsvd"])
def test_without_spatial_correlations_a_kernel_of_one_is_full(way):
    results = []
    for spatial in ("full", "sua"):
        net, x = network(nn.Conv2d(3, 4, 1)), correlated(4, 3, 3, 3)
        results.append(layer_fisher(batches(net, x, way, 3, spatial=spatial)[0]))
    torch.testing.assert_close(*results, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
def test_without_spatial_correlations_the_trace_is_the_mean_over_offsets(bias):
    """A of SUA is the projection of the full factor: the mean of the blocks of its offsets."""
    module = nn.Conv2d(2, 3, 2, bias=bias)
    net, x = network(module), correlated(4, 2, 4, 4)
    p, g = batches(net, x, "tkfac", spatial="sua")
    rows, c = patches_by_autograd(module, x, 0), g.flatten(2).mT.flatten(0, 1)
    want_a, want_b = 0, 0
    for o in range(4):
        pixel = rows[:, [o, 4 + o, *([8] if bias else [])]]
        m = dense(pixel, c, 1 / len(x) / 4)
        want_a, want_b = (w + part for w, part in zip((want_a, want_b), partial_traces(m, 3), strict=True))
    (a,), (b,) = p.fisher.factors(0)
    delta = want_b.trace()
    torch.testing.assert_close(torch.kron(b, a), torch.kron(want_b, want_a) / delta, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("way", ["tkfac", "kpsvd"])
@pytest.mark.parametrize("group_size", [1, 2, (None, 2)])
def test_block_diagonals_are_those_of_the_masked_factors(way, group_size):
    """In the first batch factors in blocks are the blocks of dense ones, up to the scale."""
    dense_p, _ = batches(network(nn.Linear(5, 3)), correlated(9, 5), way)
    p, _ = batches(network(nn.Linear(5, 3)), correlated(9, 5), way, group_size=group_size)
    for (whole,), blocks in zip(dense_p.fisher.factors(0), p.fisher.factors(0), strict=True):
        width = len(whole)
        mask = torch.block_diag(*[torch.ones_like(block) for block in blocks])[:width, :width]
        got = torch.block_diag(*blocks)[:width, :width]
        torch.testing.assert_close(got, whole * mask, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("way", ["tkfac", "kpsvd"])
def test_embeddings_by_index_are_linear_layers_of_one_hot_rows(way):
    tokens = torch.randint(6, (5, 4), generator=torch.Generator().manual_seed(3))
    embedding = network(nn.Embedding(6, 3))
    linear = network(nn.Linear(6, 3, bias=False))
    with torch.no_grad():
        linear[0].weight.copy_(embedding[0].weight.mT)
    p, _ = batches(embedding, tokens, way, 6)
    q, _ = batches(linear, torch.nn.functional.one_hot(tokens, 6).double(), way, 6, group_size=(1, None))
    for mine, theirs in zip(p.fisher.factors(0), q.fisher.factors(0), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("way", ["tkfac", "kpsvd"])
def test_transposed_convolutions_pair_pixels_with_patches(way):
    """A kernel of one: what a convolution with the transposed weight has, up to which factor is whose."""
    x = correlated(4, 3, 3, 3)
    found = []
    for module in (nn.Conv2d(3, 2, 1, bias=False), nn.ConvTranspose2d(3, 2, 1, bias=False)):
        net = network(module)
        with torch.no_grad():
            weight = seeded(2, 3, 1, 1)
            module.weight.copy_(weight if isinstance(module, nn.Conv2d) else weight.transpose(0, 1))
        found.append(batches(net, x, way, 4)[0].fisher.factors(0))
    (a, b), (c, d) = found
    torch.testing.assert_close(a, d, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(b, c, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("way", ["tkfac", "kpsvd"])
def test_two_calls_and_two_passes_are_one(way):
    """As if all rows came in one call: sums are linear."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = network(nn.Linear(4, 4))[0]

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.body(part) for part in x.split(2, 1)], 1)

    x, factors = correlated(6, 4, 4), []
    for net, steps in ((network(nn.Linear(4, 4)), 1), (Twice(), 1), (network(nn.Linear(4, 4)), 2)):
        p = kfac(net, approximate=way, factor_decay=0.5, accumulation_steps=steps)
        for _ in range(3):
            for part in x.chunk(steps):
                (mse(net(part), torch.zeros(())) / steps).backward()
            p.step()
            net.zero_grad()
        factors.append(layer_fisher(p))
    torch.testing.assert_close(factors[1], factors[0], rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(factors[2], factors[0], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("way", ["tkfac", "kpsvd"])
def test_masked_positions_are_as_if_they_were_not(way):
    x = correlated(3, 4, 4)
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[:, 3] = False
    found = []
    for positions in (4, 3):
        net = network(nn.Linear(4, 2))
        p = kfac(net, approximate=way, factor_decay=0.0)
        for _ in range(2):
            if positions == 4:
                p.valid(mask)
            rows = x if positions == 4 else x[:, :3]
            mse(net(rows)[:, :3], torch.zeros(())).backward()
            p.step()
        found.append(layer_fisher(p))
    torch.testing.assert_close(*found, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("way", ["tkfac", "kpsvd"])
def test_products_that_overflow_refuse_their_batch(way):
    """Finite rows, finite squares, fourth powers that are not: nothing changes, and the next batch counts."""
    net = network(nn.Linear(4, 3)).float()
    p = kfac(net, approximate=way, factor_decay=0.5)

    def run(scale: float) -> None:
        net.zero_grad()
        (scale * net(scale * seeded(5, 4).float())).square().mean().backward()
        p.step()

    run(1.0)
    kept = [f.clone() for f in p.fisher.factors(0)]
    run(1e11)
    assert all(map(torch.equal, p.fisher.factors(0), kept))
    assert (p.fisher.seen, p.fisher.skipped) == (1, 1)
    run(1.0)
    assert p.fisher.seen == 2
    assert all(bool(f.isfinite().all()) for f in p.fisher.factors(0))


@pytest.mark.parametrize("way", ["tkfac", "kpsvd"])
def test_resumes_bit_for_bit(way):
    x = correlated(6, 4)
    net = network(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    other = copy.deepcopy(net)
    p = kfac(net, approximate=way)
    for _ in range(2):
        mse(net(x), torch.zeros(())).backward()
        p.step()
    q = kfac(other, approximate=way)
    q.load_state_dict(copy.deepcopy(p.state_dict()))
    results = []
    for model, own in ((net, p), (other, q)):
        model.zero_grad()
        mse(model(x), torch.zeros(())).backward()
        own.step()
        results.append([w.grad for w in model.parameters()])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("way", ["tkfac", "kpsvd"])
def test_a_loss_without_gradient_gives_zero_factors(way):
    net = network(nn.Linear(4, 3))
    p = kfac(net, approximate=way)
    (0 * net(seeded(5, 4))).sum().backward()
    p.step()
    assert float(layer_fisher(p).abs().max()) == 0
    assert bool(net[0].weight.grad.isfinite().all())


def test_rows_of_a_fisher():
    """Without a model: rows of one layer."""
    a, g = correlated(8, 3), seeded(8, 2, seed=4)
    fisher = mk.KroneckerFisher(
        [mk.KroneckerShape(outputs=2, inputs=3, bias=True)], approximate="tkfac", dtype=F64, factor_decay=0.0
    )
    fisher.accumulate(0, a, g)
    fisher.update()
    (x,), (y,) = fisher.factors(0)
    m = dense(with_ones(a), g, 1 / 8)
    assert math.isclose(float(x.trace() * y.trace()), float(m.trace()), rel_tol=1e-12)


def test_errors():
    with pytest.raises(ValueError, match="approximate: expected one of kfac, tkfac, kpsvd, deflation, got 'svd'"):
        kfac(network(nn.Linear(2, 2)), approximate="svd")
    net = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5))
    net[1].weight = net[0].weight
    with pytest.raises(ValueError, match='approximate: expected "kfac" with a weight that is used both ways, 0 = 1'):
        kfac(net, approximate="tkfac")
    shape = mk.KroneckerShape(outputs=2, inputs=3)
    with pytest.raises(TypeError, match='add_pairs: expected a KroneckerFisher with an approximate other than "kfac"'):
        mk.KroneckerFisher([shape]).add_pairs(0, seeded(1, 2, 3), seeded(1, 2, 2), 1.0)
    with pytest.raises(ValueError, match=r"shapes\[0\]: expected no lags or two_uses"):
        mk.KroneckerFisher([mk.KroneckerShape(outputs=2, inputs=3, two_uses=True)], approximate="kpsvd")
