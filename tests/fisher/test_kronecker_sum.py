"""Sums of two Kronecker products: the exact inverse, and the nearest sum by power iteration and deflation."""

from __future__ import annotations

import pytest
import torch
from pair_cases import dense, nearest
from torch import Tensor

import mfac_kernels as mk

F64 = torch.float64
EPS = torch.finfo(F64).eps


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def spd(n: int, seed: int, cond: float = 10.0, batch: tuple[int, ...] = ()) -> Tensor:
    q = torch.linalg.qr(seeded(*batch, n, n, seed=seed))[0]
    a = q * torch.logspace(0, -float(torch.tensor(cond).log10()), n, dtype=F64) @ q.mT
    return (a + a.mT) / 2


def whole(a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor, damping: float = 0.0) -> Tensor:
    root = damping**0.5
    a1, b1 = a1 + root * torch.eye(len(a1), dtype=F64), b1 + root * torch.eye(len(b1), dtype=F64)
    return torch.kron(b1, a1) + torch.kron(b2, a2)


@pytest.mark.parametrize("damping", [0.0, 0.1])
@pytest.mark.parametrize(("a", "b"), [(1, 1), (1, 4), (5, 1), (5, 4), (4, 9)])
def test_inverse_is_the_dense_solve(a, b, damping):
    factors = spd(a, 1), spd(b, 2), spd(a, 3), spd(b, 4)
    x = seeded(b, a, seed=5)
    got = mk.KroneckerSum(factors[:2], factors[2:], damping).ihvp(x)
    want = torch.linalg.solve(whole(*factors, damping), x.flatten()).view(b, a)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12 * float(want.abs().max()))


@pytest.mark.parametrize("cond", [1e3, 1e6])
def test_ill_conditioned_pairs(cond):
    """Backward error: |F y - x| <= c eps |F| |y|, with c = 100 for the sizes here; a basis grows it by cond at most."""
    factors = spd(6, 1, cond), spd(5, 2, cond), spd(6, 3, cond), spd(5, 4, cond)
    x = seeded(5, 6, seed=5)
    y = mk.KroneckerSum(factors[:2], factors[2:]).ihvp(x)
    f = whole(*factors)
    residual = (f @ y.flatten() - x.flatten()).norm()
    assert float(residual) <= 100 * EPS * cond * float(torch.linalg.matrix_norm(f, 2) * y.norm())
    exact = torch.linalg.solve(f, x.flatten()).view(5, 6)
    assert float((y - exact).norm()) <= 100 * EPS * cond**2 * float(exact.norm())


def test_batches_are_layers():
    factors = spd(4, 1, batch=(3,)), spd(2, 2, batch=(3,)), spd(4, 3, batch=(3,)), spd(2, 4, batch=(3,))
    x = seeded(3, 2, 4, seed=5)
    got = mk.KroneckerSum(factors[:2], factors[2:], 1e-2).ihvp(x)
    for i in range(3):
        one = [f[i] for f in factors]
        torch.testing.assert_close(got[i], mk.KroneckerSum(tuple(one[:2]), tuple(one[2:]), 1e-2).ihvp(x[i]))


def test_an_indefinite_second_product_and_the_floor():
    a1, b1, b2 = spd(3, 1), spd(2, 2), spd(2, 4)
    a2 = -2 * a1
    sums = [mk.KroneckerSum((a1, b1), (a2, b2), floor=floor) for floor in (None, 0.1)]
    assert float(sums[0].values.min()) < 0.1 <= float(sums[1].values.min())
    x = seeded(2, 3, seed=7)
    want = torch.linalg.solve(whole(a1, b1, a2, b2), x.flatten()).view(2, 3)
    torch.testing.assert_close(sums[0].ihvp(x), want, rtol=1e-9, atol=1e-10)
    assert float((x * sums[1].ihvp(x)).sum()) > 0


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("weighted", [False, True])
def test_nearest_sum_is_the_svd_of_the_rearrangement(rank, weighted):
    a, g = seeded(9, 4) * torch.linspace(0.2, 3, 9, dtype=F64)[:, None], seeded(9, 3, seed=1)
    weights = seeded(9, seed=2).square() if weighted else None
    m = dense(a, g, 1 / 9 if weights is None else weights / 9)
    found = mk.nearest_kronecker_sum(a, g, rank, weights=weights, iterations=400)
    got = sum(torch.kron(y, x) for x, y in found)
    torch.testing.assert_close(got, nearest(m, 3, rank), rtol=1e-7, atol=1e-9 * float(m.norm()))
    for x, y in found:
        torch.testing.assert_close(x.norm(), y.norm())


def test_deflation_is_nearer_and_inverts():
    a, g = seeded(12, 4), seeded(12, 3, seed=1)
    m = dense(a, g, 1 / 12)
    found = mk.nearest_kronecker_sum(a, g, 2, iterations=200)
    errors = [float((sum(torch.kron(y, x) for x, y in found[:k]) - m).norm()) for k in (1, 2)]
    assert errors[1] < errors[0]
    again = mk.nearest_kronecker_sum(a, g, 2, start=found, iterations=1)
    for (x, y), (u, v) in zip(found, again, strict=True):
        torch.testing.assert_close(torch.kron(y, x), torch.kron(v, u), rtol=1e-6, atol=1e-9)
    x = seeded(3, 4, seed=3)
    total = mk.KroneckerSum(found[0], found[1], 0.5)
    assert float(total.values.min()) > 0
    want = torch.linalg.solve(whole(*found[0], *found[1], 0.5), x.flatten()).view(3, 4)
    torch.testing.assert_close(total.ihvp(x), want, rtol=1e-9, atol=1e-10)


def test_nothing_is_left_of_one_row():
    first, second = mk.nearest_kronecker_sum(seeded(1, 4), seeded(1, 3, seed=1), 2)
    torch.testing.assert_close(torch.kron(first[1], first[0]), dense(seeded(1, 4), seeded(1, 3, seed=1)))
    assert float(torch.kron(second[1], second[0]).abs().max()) < 1e-12
    zeros = mk.nearest_kronecker_sum(torch.zeros(2, 4), torch.zeros(2, 3))
    assert all(float(f.abs().max()) == 0 for f in zeros[0])


def test_errors():
    one, two = (spd(3, 1), spd(2, 2)), (spd(3, 3), spd(4, 4))
    with pytest.raises(ValueError, match=r"second: B: expected square matrices of one shape in both products, got"):
        mk.KroneckerSum(one, two)
    with pytest.raises(ValueError, match="damping: expected a number >= 0, got -1"):
        mk.KroneckerSum(one, one, -1)
    with pytest.raises(ValueError, match=r"floor: expected a positive number that torch.float64 holds, or None, got 0"):
        mk.KroneckerSum(one, one, floor=0)
    with pytest.raises(ValueError, match=r"x: expected shape \(2, 3\), got \(3, 2\)"):
        mk.KroneckerSum(one, one).ihvp(seeded(3, 2))
    with pytest.raises(torch.linalg.LinAlgError):
        mk.KroneckerSum((-one[0], one[1]), one)
    with pytest.raises(ValueError, match=r"gradients: expected shape \(n, outputs\)"):
        mk.nearest_kronecker_sum(seeded(3, 2), seeded(4, 2))
