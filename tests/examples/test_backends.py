"""Other libraries, and other optimizers, get the same numbers from these kernels as from their own code."""

from __future__ import annotations

import pytest
import torch
from example_files import example
from torch import nn

F64 = torch.float64


def network(kind: str, bias: bool) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    nets = {
        "linear": (nn.Sequential(nn.Linear(5, 7, bias), nn.Tanh(), nn.Linear(7, 3, bias)), (6, 5)),
        "tokens": (nn.Sequential(nn.Linear(5, 4, bias), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3, bias)), (6, 3, 5)),
        "conv": (
            nn.Sequential(
                *(nn.Conv2d(2, 4, (3, 2), stride=(2, 1), padding=1, bias=bias), nn.Tanh()),
                *(nn.Conv2d(4, 3, 3, padding="same", bias=bias), nn.Tanh()),
                *(nn.Conv2d(3, 2, 2, padding="valid", dilation=2, bias=bias), nn.Flatten(), nn.LazyLinear(3, bias)),
            ),
            (6, 2, 6, 7),
        ),
        "groups": (
            nn.Sequential(nn.Conv2d(4, 6, 3, groups=2, bias=bias), nn.Flatten(), nn.LazyLinear(3)),
            (6, 4, 5, 5),
        ),
    }
    net, shape = nets[kind]
    x = torch.randn(*shape, dtype=F64)
    net = net.double()
    net(x)
    return net, x


@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize("kind", ["linear", "tokens", "conv", "groups"])
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_curvlinops(kind, approximation, bias, separate):
    """Two batches of different sizes; float64, so 1e-12 is 4,500 eps for sums of at most 300 terms and inverses."""
    curvlinops_factors = example("curvlinops_factors")
    net, x = network(kind, bias)
    y = torch.arange(len(x)) % 3
    data = [(x[:4], y[:4]), (x[4:], y[4:])]
    options = {"kfac_approx": approximation, "separate_weight_and_bias": separate, "fisher_type": "empirical"}
    want = curvlinops_factors.factors(net, data, **options)
    with curvlinops_factors.on_our_kernels():
        got = curvlinops_factors.factors(net, data, **options)
    for mine, theirs in zip(got, want, strict=True):
        assert len(mine) == len(theirs) and curvlinops_factors.difference(mine, theirs) < 1e-12


def test_curvlinops_is_itself_again():
    curvlinops_factors = example("curvlinops_factors")
    before = curvlinops_factors.KFAC._accumulate_gradient_covariance
    with pytest.raises(KeyError), curvlinops_factors.on_our_kernels():
        assert curvlinops_factors.KFAC._accumulate_gradient_covariance is not before
        raise KeyError
    assert curvlinops_factors.KFAC._accumulate_gradient_covariance is before


def test_laplace_torch():
    laplace_kronecker = example("laplace_kronecker")
    net, x = network("tokens", bias=True)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, torch.arange(6) % 3), batch_size=3)
    want = laplace_kronecker.posterior(net, data)
    with laplace_kronecker.on_our_kernels():
        got = laplace_kronecker.posterior(net, data)
    torch.testing.assert_close(got(x), want(x), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(got.log_marginal_likelihood(), want.log_marginal_likelihood(), rtol=1e-11, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("shape", [(1, 1), (3, 8), (17, 5), (33, 33)])
def test_soap(shape, dtype):
    """The same updates as with torch.linalg.qr; the first gradients leave L or R without full rank, where what is
    beyond its rank is noise that differs, so they come in one by one only after the first 40 have been averaged."""
    soap = example("soap")
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(40, *shape, generator=generator, dtype=dtype)
    ours, theirs = soap.Soap(start[0]), soap.Soap(start[0], soap.by_torch)
    for s, t in zip(ours.statistics, theirs.statistics, strict=True):
        rows = start.mT if len(s) == shape[0] and s is ours.statistics[0] else start
        for own in (s, t):
            own.copy_(torch.einsum("nij,nik->jk", rows, rows) / 40)
    for g in torch.randn(8, *shape, generator=generator, dtype=dtype):
        got, want = ours.update(g), theirs.update(g)
    eps = torch.finfo(dtype).eps
    assert float((got - want).norm() / want.norm()) < 2000 * eps  # 8 steps, divided by roots of small second moments
    for q in ours.bases:
        assert float((q.mT @ q - torch.eye(len(q), dtype=dtype)).abs().max()) < 16 * len(q) ** 0.5 * eps


@pytest.mark.parametrize("condition", [1e2, 1e5])
def test_the_basis_of_cholesky_qr_is_orthonormal(condition):
    """From a basis that is far from L's: what one pass alone would leave is eps cond."""
    soap = example("soap")
    q = torch.linalg.qr(torch.randn(24, 24, generator=torch.Generator().manual_seed(0))).Q
    statistics = (q * torch.logspace(0, -torch.tensor(condition).log10().item(), 24)) @ q.mT
    basis = soap.by_cholesky((statistics + statistics.mT) / 2, torch.eye(24))
    assert not torch.equal(basis, torch.eye(24))
    assert float((basis.mT @ basis - torch.eye(24)).abs().max()) < 64 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("statistics", [torch.zeros(4, 4), torch.full((4, 4), torch.nan), torch.ones(4, 4)])
def test_a_basis_that_cannot_be_turned_is_kept(statistics):
    soap = example("soap")
    basis = torch.eye(4)[[2, 0, 1, 3]]
    assert torch.equal(soap.by_cholesky(statistics, basis), basis)


def test_shampoo():
    """The formula for each weight alone, in float64."""
    shampoo = example("shampoo")
    shapes, beta, epsilon = [(5, 3), (3, 5), (1, 7), (5, 5)], 0.9, 1e-3
    generator = torch.Generator().manual_seed(0)
    steps = [[torch.randn(*s, generator=generator, dtype=F64) for s in shapes] for _ in range(3)]
    optimizer = shampoo.Shampoo(steps[0], beta, epsilon)
    for gradients in steps:
        updates = optimizer.updates(gradients)
    for i, got in enumerate(updates):
        left, right = (
            torch.zeros(shapes[i][0], shapes[i][0], dtype=F64),
            torch.zeros(shapes[i][1], shapes[i][1], dtype=F64),
        )
        for gradients in steps:
            g = gradients[i]
            left, right = beta * left + (1 - beta) * g @ g.mT, beta * right + (1 - beta) * g.mT @ g
        # X = (A + epsilon I)^(-1/4) is what has X^-4 = A + epsilon I: by two square roots, no eigenvalues of A itself
        want = steps[-1][i]
        for side, matrix in (("left", left), ("right", right)):
            u, s, vh = torch.linalg.svd(matrix + epsilon * torch.eye(len(matrix), dtype=F64))
            root = (u * s.pow(-0.25)) @ vh
            want = root @ want if side == "left" else want @ root
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("m, d", [(1, 1), (4, 9), (31, 200)])
def test_spring_and_engd(m, d, dtype):
    """The d x d form: (O^T O + damping I)^-1 O^T r, which knows nothing of the m x m matrix."""
    natural_gradient = example("natural_gradient")
    generator = torch.Generator().manual_seed(m)
    o = torch.randn(m, d, generator=generator, dtype=dtype) / m**0.5
    r, before = torch.randn(m, generator=generator, dtype=dtype), torch.randn(d, generator=generator, dtype=dtype)
    damping = 1e-2
    o64, r64, phi64 = o.double(), r.double(), before.double()
    normal = o64.mT @ o64 + damping * torch.eye(d, dtype=F64)
    engd = torch.linalg.solve(normal, o64.mT @ r64)
    spring = 0.7 * phi64 + torch.linalg.solve(normal, o64.mT @ (r64 - 0.7 * o64 @ phi64))
    tolerance = {"rtol": 100 * torch.finfo(dtype).eps * max(1, d / damping if dtype == F64 else 1), "atol": 1e-6}
    torch.testing.assert_close(natural_gradient.spring(o, r, damping).double(), engd, **tolerance)
    torch.testing.assert_close(natural_gradient.spring(o, r, damping, 0.7, before).double(), spring, **tolerance)


def test_a_physics_informed_network_is_solved():
    natural_gradient = example("natural_gradient")
    problem = natural_gradient.Poisson(width=16, points=30)
    first = float(problem.jacobian()[1].square().sum())
    for _ in range(20):
        problem.subtract(natural_gradient.spring(*problem.jacobian(), damping=1e-4))
    assert float(problem.jacobian()[1].square().sum()) < 1e-5 * first


def test_influence_is_that_of_a_dense_matrix_and_of_retraining():
    influence = example("influence")
    generator = torch.Generator().manual_seed(0)
    (x, y), test = influence.dataset(60, generator), influence.dataset(200, generator)
    net = influence.network()
    for _ in range(4):
        influence.train(net, x, y, len(x))
    scores = influence.influence(net, x, y, test)

    v, log_p = influence.log_probability_rows(net, x)
    fisher = torch.einsum("nk,nki,nkj->ij", log_p.exp(), v, v) / len(x)
    fisher += influence.DAMPING * torch.eye(len(fisher), dtype=F64)
    of_test = influence.log_probability_rows(net, test[0])[0]
    gradient = -of_test[torch.arange(200), test[1]].mean(0)
    want = torch.linalg.solve(fisher, -v[torch.arange(60), y].mT).mT @ gradient / len(x)
    torch.testing.assert_close(scores, want, rtol=1e-9, atol=1e-14)

    chosen = scores.abs().argsort(descending=True)[:8].tolist()
    truth = torch.tensor([influence.retrained(net, x, y, test, i) for i in chosen], dtype=F64)
    assert float(torch.corrcoef(torch.stack([scores[chosen], truth]))[0, 1]) > 0.8
