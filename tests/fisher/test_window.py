"""FisherWindow: accuracy, storage types, and every way of asking."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor
from window_cases import (
    DTYPES,
    EPS,
    NORMALIZE,
    assert_same_bits,
    dense_inverse,
    divisor,
    error,
    fill,
    newest_slot,
    tensors,
)

import mfac_kernels as mk
from mfac_kernels import ops
from mfac_kernels.reference import window as reference


@pytest.mark.parametrize("m", [64, 512])
@pytest.mark.parametrize(("rho", "newest_gate", "any_gate"), [(0.0, 1e-6, 1e-5), (0.99, 1e-5, 1e-3)])
def test_float32_accuracy(m, rho, newest_gate, any_gate, gradients, device):
    """Against float64 solves from the window's own rows, after the ring has wrapped."""
    d, damping = 20_000, 1e-5
    g = gradients(m + m // 8 + 2, d, rho=rho, norm=10.0, dtype=torch.float32)
    window = fill(mk.FisherWindow(d, m, damping, device=device), g[:-1])
    got = window.update_ihvp(g[-1].to(device))
    rows, slot = window.window.cpu(), newest_slot(window)
    assert got.dtype == torch.float32 and torch.equal(rows[slot], g[-1]) and slot != m - 1

    eigenvalues = torch.linalg.eigvalsh(reference.core(rows, m * damping))
    condition, largest = float(eigenvalues[-1] / eigenvalues[0]), float(eigenvalues[-1])
    # Rounding of the result to float32, and a backward stable solve with K: |K - K'| <= c m eps |K|, here with c = 2.
    tolerance = 2**-24 + 2 * m * EPS * condition
    assert tolerance < newest_gate
    assert error(got, reference.newest(rows, damping, m, slot)) <= tolerance

    # The same by subtraction: F^-1 g = (g - G^T K'^-1 G g) / damping is off by G^T K^-1 (K' - K) e / damping,
    # for the answer m G^T K^-1 e, so relatively by |K' - K| / (m damping).
    tolerance = 2**-24 + 2 * EPS * largest / damping
    assert tolerance < any_gate
    for row in (slot, (slot + m // 2) % m):
        want = reference.newest(rows, damping, m, row)
        assert error(window.ihvp(rows[row].to(device)), want) <= tolerance
    x = gradients(1, d, seed=1, dtype=torch.float32)
    # No cancellation outside the span: the two terms of the answer are |x| / damping and smaller.
    want = reference.woodbury(rows, damping, m, x)
    assert error(window.ihvp(x.to(device)), want) <= 2**-24 + 2 * m * EPS * condition


def extended_newest(rows: Tensor, damping: float, slot: int) -> Tensor:
    """reference.newest in extended precision (numpy's long double), rounded to float64."""
    g = rows.numpy().astype(np.longdouble)
    m = len(g)
    k = g @ g.T + np.longdouble(damping) * m * np.eye(m, dtype=np.longdouble)
    b = np.zeros((m, 1), dtype=np.longdouble)
    b[slot] = m
    a = np.concatenate([k, b], axis=1)
    for i in range(m):  # Gauss-Jordan, safe without pivoting: K is positive definite
        a[i] /= a[i, i]
        others = np.arange(m) != i
        a[others] -= a[others, i : i + 1] * a[i]
    return torch.from_numpy((a[:, m] @ g).astype(np.float64))


@pytest.mark.skipif(np.finfo(np.longdouble).eps >= EPS, reason="numpy's long double is a double here")
@pytest.mark.parametrize("rho", [0.99, 0.9999])
def test_ten_thousand_inserts_drift_no_further_than_a_fresh_factor(rho, gradients, device):
    m, d, inserts = 32, 300, 10_000
    g = gradients(inserts, d, rho=rho, norm=10.0)
    window = mk.FisherWindow(d, m, 1e-5, dtype=torch.float64, device=device)
    errors: list[tuple[float, float]] = []
    for t in range(inserts):
        got = window.update_ihvp(g[t].to(device))
        if t >= inserts - 2 * m:  # many slots, so that luck in one does not decide
            slot = newest_slot(window)
            want = extended_newest(window.window.cpu(), window.damping, slot)
            factor = window.factor.clone()
            ops.core_refactor_(window.gram, factor, window.state, window.damping * m, False)
            unit = torch.zeros(1, m, dtype=torch.float64, device=device)
            unit[0, slot] = m
            fresh = ops.core_solve(factor, window.state, unit, window.damping * m, False)
            errors.append((error(got, want), error(fresh[0] @ window.window, want)))
    kept, fresh_error = (max(e) for e in zip(*errors, strict=True))
    assert kept <= 10 * fresh_error + 4 * EPS


@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_for_the_gradients_as_stored(dtype, normalize, gradients, device):
    m, d = 7, 33
    window = mk.FisherWindow(d, m, 0.01, dtype=dtype, normalize=normalize, device=device)
    x = gradients(3, d, norm=1.0, seed=5).to(device)
    for g in gradients(2 * m + 3, d, norm=3.0):
        got = window.update_ihvp(g.to(device))
        slot, n = newest_slot(window), divisor(window)
        rows = window.window.cpu().double()
        assert torch.equal(rows[slot], g.to(dtype).double())
        # condition of K below 1e4, so that 1e-10 leaves a factor of 1e8 eps over it
        assert error(got, reference.newest(rows, 0.01, n, slot)) <= 1e-10
        assert error(window.ihvp(x), reference.ihvp(rows, 0.01, n, x.cpu())) <= 1e-10
    inverse = dense_inverse(window)
    # float32 at least: one rounding of each entry, |1 - sum| <= 1 before the division
    rounding = 1e-12 if window.diagonal().dtype == torch.float64 else 2**-22
    got = window.diagonal().cpu().double()
    assert float((got - inverse.diagonal()).abs().max()) <= rounding / window.damping
    assert window.diagonal().dtype == torch.promote_types(dtype, torch.float32)
    for i, j in [(0, 0), (4, 9), (9, 4), (-1, 32), (-33, 5)]:
        element = window.element(i, j)
        assert element.shape == () and element.dtype == torch.float64
        assert abs(float(element) - float(inverse[i, j])) <= 1e-12 / window.damping


@pytest.mark.parametrize(("dtype", "value"), [(torch.float16, 65520.0), (torch.bfloat16, 3.4e38)])
def test_a_finite_gradient_that_overflows_the_window_is_refused(dtype, value, device):
    window = fill(mk.FisherWindow(5, 3, dtype=dtype, device=device), torch.ones(1, 5))
    before = copy.deepcopy(window)
    g = torch.zeros(5, device=device)
    g[3] = value
    if device == "cpu":
        with pytest.raises(ValueError, match=f"^g: expected values that are finite in {dtype}"):
            window.update(g)
        assert_same_bits(window, before)
    else:
        window.update(g)
        with pytest.raises(ValueError, match=f"^g: 1 gradients were not finite in {dtype}"):
            window.check()
    window.update(g * 0.99)
    assert window.seen == 2


@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_results_come_in_the_argument_s_dtype(dtype, x_dtype, gradients, device):
    window = fill(mk.FisherWindow(12, 4, 1.0, dtype=dtype, device=device), gradients(5, 12))
    x = gradients(2, 12, norm=1.0, dtype=x_dtype).to(device)
    want = x.cpu().double() @ dense_inverse(window)
    got = window.ihvp(x)
    assert got.dtype == x_dtype
    assert error(got, want) <= torch.finfo(x_dtype).eps + 1e-13  # one rounding at the end; condition of F below 100
    assert window.update_ihvp(x[0]).dtype == x_dtype


@pytest.mark.parametrize("k", [0, 1, 3, 4, 5, 70])
@pytest.mark.parametrize("count", [0, 2, 9])
def test_any_number_of_vectors(k, count, gradients, device):
    window = mk.FisherWindow(50, 6, 0.1, dtype=torch.float64, device=device)
    fill(window, gradients(count, 50))
    x = gradients(k, 50, seed=3).to(device)
    got = window.ihvp(x)
    assert got.shape == (k, 50)
    want = x.cpu() @ dense_inverse(window)
    torch.testing.assert_close(got.cpu(), want, rtol=0, atol=1e-11 * max(1.0, float(want.norm())))
    for row, one in zip(x, got, strict=True):
        assert error(window.ihvp(row), one.cpu()) <= 1e-11


def test_any_layout_of_vectors(gradients, device):
    window = fill(mk.FisherWindow(20, 4, 0.1, dtype=torch.float64, device=device), gradients(5, 20))
    wide = gradients(6, 40, seed=1).to(device)
    for x in (wide[:, ::2], wide[::3, :20], wide.mT[:20].mT, wide[0, :20].expand(3, 20)):
        assert torch.equal(window.ihvp(x), window.ihvp(x.contiguous()))
    twin = copy.deepcopy(window)
    strided = wide[0, ::2]
    assert torch.equal(window.update_ihvp(strided), twin.update_ihvp(strided.contiguous()))
    assert_same_bits(window, twin)


@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize(("dim", "ngrads"), [(1, 1), (1, 5), (40, 1), (5, 40)])
def test_smallest_sizes(dim, ngrads, normalize, gradients, device):
    window = mk.FisherWindow(dim, ngrads, 0.25, dtype=torch.float64, normalize=normalize, device=device)
    x = gradients(2, dim, seed=2)
    for g in gradients(2 * ngrads + 1, dim, norm=2.0):
        got = window.update_ihvp(g.to(device))
        inverse = dense_inverse(window)
        assert error(got, g @ inverse) <= 1e-11
        assert error(window.ihvp(x.to(device)), x @ inverse) <= 1e-11
        torch.testing.assert_close(window.diagonal().cpu(), inverse.diagonal(), rtol=1e-11, atol=1e-11)


def test_an_empty_window_divides_by_the_damping(device):
    window = mk.FisherWindow(3, 4, 0.5, dtype=torch.float64, device=device)
    x = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64, device=device)
    assert torch.equal(window.ihvp(x), x * 2)
    assert window.diagonal().tolist() == [2.0] * 3
    assert (float(window.element(1, 1)), float(window.element(0, 1))) == (2.0, 0.0)
    assert (window.seen, window.refused) == (0, 0)


def test_no_graph_is_left(device):
    window = mk.FisherWindow(4, 3, device=device)
    g = torch.ones(4, device=device, requires_grad=True)
    window.update(g * 2)
    results = [
        window.update_ihvp(g * 2),
        window.ihvp(g),
        window.diagonal(),
        window.element(0, 1),
        window.try_update_ihvp(g * 2)[0],
    ]
    assert not any(t.requires_grad for t in results + tensors(window))


def test_rows_further_apart_than_2_to_the_31(gradients, device):
    """The index arithmetic of a window of more than 2^32 elements, of which three short rows are touched."""
    d, stride = 5000, 2**31 + 8191
    try:
        memory = torch.empty(2 * stride + d, dtype=torch.bfloat16, device=device)
    except RuntimeError as failure:
        pytest.skip(f"cannot reserve 8.6 GB of address space: {failure}")
    far, near = (mk.FisherWindow(d, 3, 0.1, dtype=torch.bfloat16, device=device) for _ in range(2))
    far.window = memory.as_strided((3, d), (stride, 1)).zero_()
    x = gradients(2, d, seed=1, dtype=torch.float32).to(device)
    for g in gradients(5, d, dtype=torch.float32).to(device):
        assert torch.equal(far.update_ihvp(g), near.update_ihvp(g))
    assert_same_bits(far, near)
    assert torch.equal(far.ihvp(x), near.ihvp(x))
    assert torch.equal(far.diagonal(), near.diagonal())
    assert torch.equal(far.element(4999, 4998), near.element(4999, 4998))
