"""FisherWindow: state that is saved, changed, refused and repeated, bit for bit."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from window_cases import DTYPES, NORMALIZE, assert_same_bits, error, fill, tensors

import mfac_kernels as mk
from mfac_kernels.reference import window as reference


def saved(window: mk.FisherWindow) -> dict[str, object]:
    """Its state after a trip through torch.save."""
    buffer = io.BytesIO()
    torch.save(window.state_dict(), buffer)
    return torch.load(io.BytesIO(buffer.getvalue()))


@pytest.mark.parametrize("count", [0, 2, 5, 13])
@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_resumes_bit_for_bit(dtype, normalize, count, gradients, device):
    m, d = 5, 37
    bad = torch.full((d,), float("nan"), device=device)

    def make(damping: float) -> mk.FisherWindow:
        return mk.FisherWindow(d, m, damping, dtype=dtype, normalize=normalize, device=device)

    window = fill(make(0.1), gradients(count, d))
    window.try_update_ihvp(bad)
    window.damping = 0.2
    other = fill(make(0.7), gradients(3, d, seed=9))
    other.load_state_dict(saved(window))
    assert_same_bits(other, window)
    other.check()  # what was refused before the load is not news
    for t, g in enumerate(gradients(2 * m, d, seed=1).to(device)):
        assert torch.equal(window.ihvp(g), other.ihvp(g))
        assert torch.equal(window.update_ihvp(g), other.update_ihvp(g))
        if t == m:
            window.try_update_ihvp(bad)
            other.try_update_ihvp(bad)
    assert_same_bits(other, window)
    assert (other.seen, other.refused) == (count + 2 * m, 2)
    assert torch.equal(window.diagonal(), other.diagonal())


def test_a_state_from_a_cpu_goes_on_on_any_device(gradients, device):
    m, d = 5, 37
    window = fill(mk.FisherWindow(d, m, 0.1), gradients(13, d))
    other = mk.FisherWindow(d, m, 0.1, device=device)
    other.load_state_dict(saved(window))
    for g in gradients(2 * m, d, seed=1):
        want = window.update_ihvp(g)
        # float32 results, and two ways of solving with a K whose condition is below 1e3
        assert float((other.update_ihvp(g.to(device)).cpu() - want).norm()) <= 1e-6 * float(want.norm())


@pytest.mark.parametrize("count", [0, 1, 3, 5, 13])
def test_what_a_gpu_keeps_beside_the_factor_is_missed_where_it_is_not(count, gradients):
    window = fill(mk.FisherWindow(37, 5, 0.1), gradients(count, 37))
    if count > 1 and not mk.build_info()["simt"]:
        assert not window._keeps_inverse()
    slots = window._by_age()
    lower = window.factor[slots[:, None], slots].triu().mT
    inverse = torch.linalg.solve_triangular(lower, torch.eye(len(slots), dtype=lower.dtype), upper=False)
    window.factor[slots[:, None], slots] = lower.mT + inverse.tril(-1)
    assert window._keeps_inverse()


def test_state_dict_is_live_and_loads_onto_itself(gradients, device):
    window = fill(mk.FisherWindow(6, 3, device=device), gradients(4, 6))
    state = window.state_dict()
    window.update(torch.ones(6, device=device))
    before = copy.deepcopy(window)
    window.load_state_dict(state)
    assert_same_bits(window, before)


def test_reset_is_a_new_window(gradients, device):
    window = fill(mk.FisherWindow(11, 4, 0.1, device=device), gradients(7, 11))
    bad = torch.full((11,), torch.inf, device=device)
    window.try_update_ihvp(bad)
    with pytest.raises(ValueError, match="1 gradients were not finite"):
        window.check()
    window.reset()
    window.check()
    new = mk.FisherWindow(11, 4, 0.1, device=device)
    assert_same_bits(window, new)
    for g in gradients(6, 11, seed=1).to(device):
        assert torch.equal(window.update_ihvp(g), new.update_ihvp(g))
    window.try_update_ihvp(bad)
    with pytest.raises(ValueError, match="1 gradients were not finite"):
        window.check()


@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize("count", [0, 3, 8, 17])
def test_changing_the_damping_is_a_window_with_that_damping(count, normalize, gradients, device):
    m, d = 8, 21
    old, new = (
        mk.FisherWindow(d, m, damping, dtype=torch.float64, normalize=normalize, device=device)
        for damping in (3.0, 0.01)
    )
    g = gradients(count + 1, d, norm=2.0)
    fill(old, g[:-1])
    fill(new, g[:-1])
    old.damping = 0.01
    assert old.damping == 0.01
    x = gradients(2, d, seed=4).to(device)
    assert error(old.ihvp(x), new.ihvp(x).cpu()) <= 1e-11
    assert error(old.diagonal(), new.diagonal().cpu()) <= 1e-11
    last = g[-1].to(device)
    assert error(old.update_ihvp(last), new.update_ihvp(last).cpu()) <= 1e-11
    assert torch.equal(old.gram, new.gram)


@pytest.mark.parametrize("count", [0, 3, 6])
@pytest.mark.parametrize("normalize", NORMALIZE)
def test_a_refused_gradient_changes_nothing_but_the_count(normalize, count, gradients, device):
    window = fill(mk.FisherWindow(9, 4, normalize=normalize, device=device), gradients(count, 9))
    before = copy.deepcopy(window)
    g = torch.ones(9, device=device)
    g[8] = torch.nan
    returned, accepted = window.try_update_ihvp(g)
    assert accepted.dtype == torch.bool and accepted.shape == () and not accepted
    assert torch.equal(returned, torch.zeros_like(g))
    assert (window.seen, window.refused) == (count, 1)
    with pytest.raises(ValueError, match="1 gradients were not finite in"):
        window.check()
    window.check()
    for mine, theirs in zip(tensors(window)[:3], tensors(before)[:3], strict=True):
        assert torch.equal(mine, theirs)
    y, accepted = window.try_update_ihvp(torch.ones(9, device=device))
    assert accepted and torch.equal(y, before.update_ihvp(torch.ones(9, device=device)))


steps = st.lists(
    st.sampled_from(["insert", "insert", "insert", "refuse", "damping", "save", "reset"]),
    max_size=40,
)


@given(
    m=st.integers(1, 9),
    d=st.integers(1, 12),
    normalize=st.sampled_from(NORMALIZE),
    steps=steps,
    seed=st.integers(0, 2**31),
)
def test_any_history(m, d, normalize, steps, seed):
    """Whatever happens to it, a window is the Fisher of the gradients it was last given."""
    generator = torch.Generator().manual_seed(seed)
    window = mk.FisherWindow(d, m, 0.5, dtype=torch.float64, normalize=normalize)
    held: list[Tensor] = []
    for step in steps:
        g = torch.randn(d, generator=generator, dtype=torch.float64)
        if step == "insert":
            got = window.update_ihvp(g)
            held = [*held, g][-m:]
            rows = torch.stack(held)
            n = m if normalize == "ngrads" else len(held)
            want = reference.ihvp(rows, window.damping, n, g)
            assert error(got, want) <= 1e-11
        elif step == "refuse":
            window.try_update_ihvp(g / 0)
        elif step == "damping":
            window.damping = 0.1 + float(g[0].abs())
        elif step == "save":
            state = saved(window)
            window = mk.FisherWindow(d, m, 0.5, dtype=torch.float64, normalize=normalize)
            window.load_state_dict(state)
        else:
            window.reset()
            held = []
    rows = torch.stack(held) if held else torch.zeros(0, d, dtype=torch.float64)
    n = m if normalize == "ngrads" else max(1, len(held))
    x = torch.randn(2, d, generator=generator, dtype=torch.float64)
    assert error(window.ihvp(x), reference.ihvp(rows, window.damping, n, x)) <= 1e-11


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_any_number_of_threads_and_every_run(dtype, gradients, threads):
    d, m = 40_000, 10
    g = gradients(m + 4, d, rho=0.9, dtype=torch.float32)
    results = []
    for count in (1, 2, 3, 1):
        threads(count)
        window = mk.FisherWindow(d, m, 1e-5, dtype=dtype)
        outputs = [window.update_ihvp(row) for row in g]
        results.append([*outputs, window.ihvp(g[:5]), *tensors(window)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_diagonal_is_the_same_on_every_run(gradients, device):
    window = fill(mk.FisherWindow(5000, 12, device=device), gradients(15, 5000))
    assert torch.equal(window.diagonal(), window.diagonal())
