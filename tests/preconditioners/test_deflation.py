"""Two Kronecker products a layer: the two leading singular triples, their inverse, its state, what cannot be."""

from __future__ import annotations

import copy

import pytest
import torch
from kfac_cases import F64, kfac, mse, network, run, seeded
from pair_cases import dense, nearest
from torch import Tensor, nn

import mfac_kernels as mk

EPS = torch.finfo(F64).eps
# Both power iterations have converged to 1e-10 in these many batches.
BATCHES = 60


def rows(n: int, a: int, b: int) -> tuple[Tensor, Tensor]:
    return seeded(n, a), seeded(n, b, seed=4)


def fisher_of(
    x: Tensor, g: Tensor, way: str = "deflation", count: int = BATCHES, damping: float = 0.1, **shape: object
) -> mk.KroneckerFisher:
    """After ``count`` times the same rows."""
    fisher = mk.KroneckerFisher(
        [mk.KroneckerShape(outputs=g.shape[1], inputs=x.shape[1], **shape)],
        damping,
        approximate=way,
        factor_decay=0.0,
        dtype=F64,
    )
    for _ in range(count):
        fisher.accumulate(0, x, g)
        fisher.update()
    fisher.refresh()
    return fisher


def whole(fisher: mk.KroneckerFisher, layer: int = 0, damping: float = 0.0) -> Tensor:
    """B1 (x) A1 + B2 (x) A2 over the gradient row-major, with sqrt(damping) in A1 and B1, of one mean eigenvalue."""
    total = 0
    for shift, (a, b) in zip((damping**0.5, 0.0), fisher.products(layer), strict=True):
        blocks = (
            torch.kron(y + shift * torch.eye(len(y), dtype=F64), x + shift * torch.eye(len(x), dtype=F64))
            for x, y in zip(a, b, strict=True)
        )
        total = total + torch.block_diag(*blocks)
    return total


@pytest.mark.parametrize(("a", "b"), [(4, 3), (3, 5), (1, 3), (4, 1)])
def test_the_sum_has_the_two_leading_singular_triples(a, b):
    x, g = rows(11, a, b)
    m = dense(x, g, 1 / 11)
    fisher = fisher_of(x, g)
    torch.testing.assert_close(whole(fisher), nearest(m, b, 2), rtol=1e-8, atol=1e-9 * float(m.norm()))
    (second_a,), (second_b,) = fisher.products(0)[1]
    torch.testing.assert_close(second_a.norm(), second_b.norm())


@pytest.mark.parametrize("seed", range(5))
def test_nearer_than_one_product(seed):
    x, g = seeded(9, 4, seed=seed), seeded(9, 3, seed=seed + 50)
    m = dense(x, g, 1 / 9)
    (a,), (b,) = fisher_of(x, g, "kpsvd").factors(0)
    error = float((whole(fisher_of(x, g)) - m).norm())
    assert error < 0.99 * float((torch.kron(b, a) - m).norm())


def test_the_first_product_is_kpsvds():
    x, g = rows(11, 4, 3)
    for mine, theirs in zip(fisher_of(x, g, count=5).factors(0), fisher_of(x, g, "kpsvd", 5).factors(0), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("damping", [0.1, 3.0])
@pytest.mark.parametrize("bias", [True, False])
def test_the_step_is_the_dense_solve(damping, bias):
    x, g = rows(11, 4, 3)
    fisher = fisher_of(x, g, damping=damping, bias=bias)
    assert fisher.diagnostics()["directions_raised"] == 0
    gradient = seeded(3, 4 + bias, seed=9)
    (step,) = fisher.ihvp([gradient])
    want = torch.linalg.solve(whole(fisher, damping=damping), gradient.flatten()).view_as(gradient)
    # c n eps cond: the bases grow rounding by the condition of the damped first product, below 1e4 here
    torch.testing.assert_close(step, want, rtol=100 * 15 * EPS * 1e4, atol=1e-12)


def test_pi_divides_the_damping():
    """Factors in blocks have mean eigenvalues of their own no longer: those of A and B differ."""
    x, g = rows(11, 4, 3)
    fisher = fisher_of(x, g, input_block=2, output_block=2, damping=0.5)
    (a, b), (c, d) = ([torch.block_diag(*blocks) for blocks in product] for product in fisher.products(0))
    b, d = b[:3, :3], d[:3, :3]
    pi = (a.trace() / 4) / (b.trace() / 3)
    f = torch.kron(b + (0.5 / pi).sqrt() * torch.eye(3, dtype=F64), a + (0.5 * pi).sqrt() * torch.eye(4, dtype=F64))
    gradient = seeded(3, 4, seed=9)
    assert fisher.diagnostics()["directions_raised"] == 0
    want = torch.linalg.solve(f + torch.kron(d, c), gradient.flatten()).view(3, 4)
    torch.testing.assert_close(fisher.ihvp([gradient])[0], want, rtol=1e-9, atol=1e-12)


def test_blocks_of_one_are_diagonals():
    x, g = rows(11, 4, 3)
    fisher = fisher_of(x, g, input_block=1, output_block=1, count=5, damping=2.0)
    (a, b), (c, d) = ([factor.flatten() for factor in product] for product in fisher.products(0))
    f = (b + 2**0.5)[:, None] * (a + 2**0.5) + d[:, None] * c
    gradient = seeded(3, 4, seed=9)
    torch.testing.assert_close(fisher.ihvp([gradient])[0], gradient / f, rtol=1e-11, atol=1e-13)


def test_a_fisher_of_rank_one_gives_the_step_of_one_product():
    """What is left of M is rounding: of the second product eps |M| at most, which the damping divides."""
    x, g = seeded(1, 4), seeded(1, 3, seed=1)
    gradient = seeded(3, 4, seed=9)
    steps = [fisher_of(x, g, way, 20).ihvp([gradient])[0] for way in ("deflation", "kpsvd")]
    size = float(dense(x, g).norm())
    torch.testing.assert_close(*steps, rtol=100 * EPS * size / 0.1, atol=100 * EPS * size / 0.1)


def test_where_the_sum_is_indefinite_it_has_the_damping():
    """Along each joint direction k the curvature k^T F k / |k|^2 is the sum's, or the damping if that is less."""
    x = seeded(11, 4) * torch.linspace(0.2, 3, 11, dtype=F64)[:, None]
    g = seeded(11, 3, seed=4) * (1 + x[:, :1].square())
    damping = 1e-4
    fisher = fisher_of(x, g, damping=damping)
    f = whole(fisher, damping=damping)
    assert float(torch.linalg.eigvalsh(f)[0]) < -damping
    raised = fisher.diagnostics()["directions_raised"]
    assert 0 < raised < 12
    inverse = fisher.inverse(0)
    assert float(torch.linalg.eigvalsh((inverse + inverse.mT) / 2)[0]) > 0
    k_a, k_b, values, _ = (t.squeeze() for t in fisher.inverse_state(0))
    k = torch.kron(k_b, k_a)
    own = (k.mT @ f @ k).diagonal()
    lengths = k.square().sum(0)
    torch.testing.assert_close(values.flatten(), own.maximum(damping * lengths), rtol=1e-6, atol=1e-9)
    fisher.refresh()
    assert fisher.diagnostics()["directions_raised"] == 2 * raised  # since the start


def test_a_layer_without_a_batch_keeps_its_gradient():
    fisher = mk.KroneckerFisher([mk.KroneckerShape(outputs=2, inputs=3)], approximate="deflation", dtype=F64)
    fisher.refresh()
    gradient = seeded(2, 3)
    assert torch.equal(fisher.ihvp([gradient])[0], gradient)
    assert fisher.diagnostics()["directions_raised"] == 0


MODULES = {
    "convolution": (nn.Conv2d(3, 4, 3, padding=1), (4, 3, 4, 4), {}),
    "groups": (nn.Conv2d(4, 4, 3, groups=2), (4, 4, 5, 5), {}),
    "depthwise": (nn.Conv1d(3, 3, 2, groups=3), (4, 3, 6), {}),
    "sua": (nn.Conv2d(3, 4, 3), (4, 3, 5, 5), {"spatial": "sua"}),
    "reduce": (nn.Linear(4, 3), (5, 3, 4), {"approximation": "reduce"}),
    "blocks": (nn.Linear(5, 4), (7, 5), {"group_size": (2, 3)}),
    "transposed": (nn.ConvTranspose2d(3, 2, 2, bias=False), (4, 3, 3, 3), {}),
}


@pytest.mark.parametrize("name", MODULES)
def test_layers(name):
    """The inverse that a step applies is that of the sum, damped, over every kind of layer."""
    module, size, options = MODULES[name]
    net = network(copy.deepcopy(module))
    p = kfac(net, 2.0, approximate="deflation", factor_decay=0.5, pi_correction=False, **options)
    for step in range(4):
        run(net, p, seeded(*size, seed=step), lambda y: mse(y, seeded(*y.shape, seed=5)))
    fisher, shape = p.fisher, p.fisher.shapes[0]
    assert fisher.diagnostics()["directions_raised"] == 0
    assert float(fisher.products(0)[1][0].abs().max()) > 0 or shape.outputs == 1
    gradient = seeded(shape.groups * shape.outputs, shape.columns, seed=9)
    (step,) = fisher.ihvp([gradient])
    if name == "sua":  # at every offset, the bias shared by them
        pixels = gradient[:, :-1].view(4, 3, 9).mT
        back = step[:, :-1].view(4, 3, 9).mT
        share = torch.cat([pixels, gradient[:, -1:, None].expand(-1, 9, 1) / 3], 2)
        want = torch.linalg.solve(whole(fisher, damping=2.0), share.transpose(0, 1).reshape(9, -1).mT).mT.view(9, 4, 4)
        torch.testing.assert_close(back.transpose(0, 1), want[..., :3], rtol=1e-9, atol=1e-11)
        return
    if name == "blocks":
        (a, b), (c, d) = ([torch.block_diag(*blocks) for blocks in product] for product in fisher.products(0))
        a, c = a[:6, :6], c[:6, :6]
        b, d = b[:4, :4], d[:4, :4]
        root = 2**0.5
        f = torch.kron(b + root * torch.eye(4, dtype=F64), a + root * torch.eye(6, dtype=F64)) + torch.kron(d, c)
    else:
        f = whole(fisher, damping=2.0)
    want = torch.linalg.solve(f, gradient.flatten()).view_as(gradient)
    torch.testing.assert_close(step, want, rtol=1e-9, atol=1e-11)


def test_normalization_layers_and_embeddings_beside():
    """A block of a normalization layer has no second product: its step is K-FAC's."""
    found = []
    for way in ("kfac", "deflation"):
        net = network(nn.Embedding(7, 4), nn.LayerNorm(4), nn.Linear(4, 2))
        p = kfac(net, approximate=way)
        for step in range(3):
            tokens = torch.randint(7, (5, 3), generator=torch.Generator().manual_seed(step))
            run(net, p, tokens, lambda y: mse(y, seeded(*y.shape, seed=5)))
        found.append([net[1].weight.grad, net[1].bias.grad])
        assert all(bool(w.grad.isfinite().all()) for w in net.parameters())
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-13)


def test_batches_of_float32_have_no_gradient_and_overflow_apart():
    net = network(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).float()
    p = kfac(net, 1e-4, approximate="deflation", factor_decay=0.9)
    for scale in (1.0, 1e11, 0.0, 1.0):
        net.zero_grad()
        (scale * net(scale * seeded(6, 4).float())).square().mean().backward()
        p.step()
        assert scale > 1 or all(bool(w.grad.isfinite().all()) for w in net.parameters())
    assert p.diagnostics()["skipped"] == 1


def test_a_state_of_one_product_is_refused():
    net = network(nn.Linear(3, 2))
    p, q = (kfac(net, approximate=way) for way in ("deflation", "kpsvd"))
    with pytest.raises(ValueError, match=r"\['inputs'\]: expected .*\(1, 2, 4, 4\), got .*\(1, 1, 4, 4\)"):
        p.load_state_dict(q.state_dict())


def test_calls_and_passes_add_up():
    """Sums are linear in the rows: two passes of half a batch are one of all."""
    x, found = seeded(6, 4), []
    for steps in (1, 2):
        net = network(nn.Linear(4, 4))
        p = kfac(net, approximate="deflation", factor_decay=0.5, accumulation_steps=steps)
        for _ in range(3):
            for part in x.chunk(steps):
                (mse(net(part), torch.zeros(())) / steps).backward()
            p.step()
            net.zero_grad()
        found.append(p.fisher.products(0))
    for mine, theirs in zip(*found, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_covered_counts_the_second_product():
    """Two averages and two sums of A and of B, a basis each, and the values in them."""
    net = network(nn.Linear(4, 3))
    (row,) = kfac(net, approximate="deflation").covered().layers
    assert row.megabytes == pytest.approx(8 * (5 * 25 + 5 * 9 + 15) / 1e6)


def test_errors():
    with pytest.raises(
        ValueError, match='damping_style: expected "factored" with approximate "deflation", got "exact"'
    ):
        kfac(network(nn.Linear(2, 2)), approximate="deflation", damping_style="exact")
    with pytest.raises(ValueError, match='style: expected "factored" with approximate "deflation", got \'exact\''):
        mk.KroneckerFisher([mk.KroneckerShape(outputs=2, inputs=3)], approximate="deflation", style="exact")
    net = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5))
    net[1].weight = net[0].weight
    with pytest.raises(ValueError, match='approximate: expected "kfac" with a weight that is used both ways, 0 = 1'):
        kfac(net, approximate="deflation")
