"""Identities that hold to rounding, in float64: every way to the same inverse gives the same numbers.

Gradients of norm about 3 and damping 0.03 keep cond(F) below 1e4: 1e-10 is then more than 100 times c m eps cond(F).
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import mfac_kernels as mk
from mfac_kernels.reference import static as paper
from mfac_kernels.reference import window as reference

DAMPING = 0.03  # 1 / 0.03 is a float32 or float64 rounding apart from itself
SIZES = [(1, 1), (1, 9), (5, 1), (4, 30), (13, 31), (31, 13), (16, 16), (33, 70)]  # (m, d)


def same(got: Tensor, want: Tensor) -> None:
    """Equal to 1e-10 of the largest entry."""
    assert got.shape == want.shape and got.dtype == want.dtype == torch.float64
    error = float((got.cpu() - want.cpu()).abs().amax())
    assert error <= 1e-10 * float(want.abs().amax())


def windowed(grads: Tensor, device: str = "cpu", **options: object) -> mk.FisherWindow:
    """A window that the gradients fill exactly, however many came before them."""
    m, d = grads.shape
    window = mk.FisherWindow(d, m, DAMPING, dtype=torch.float64, device=device, **options)
    for g in grads.to(device):
        window.update(g)
    return window


def masked_inverse(grads: Tensor, n: int, block_size: int) -> Tensor:
    """The inverse of F with everything outside the diagonal blocks set to zero."""
    fisher = reference.fisher(grads, DAMPING, n)
    block = torch.arange(len(fisher)) // block_size
    return torch.linalg.inv(fisher * (block[:, None] == block))


@pytest.mark.parametrize(("m", "d"), SIZES)
def test_static_is_dynamic_is_woodbury_is_dense(m, d, gradients, device):
    g = gradients(m, d, norm=3.0)
    x = torch.cat([gradients(3, d, norm=3.0, seed=1), g[-1:]])
    window, static = windowed(g, device), mk.StaticFisher(g.to(device), DAMPING)
    dense = torch.linalg.inv(reference.fisher(g, DAMPING, m))
    want = x @ dense
    same(reference.ihvp(g, DAMPING, m, x), want)
    same(reference.woodbury(g, DAMPING, m, x), want)
    same(window.ihvp(x.to(device)), want)
    same(static.ihvp(x.to(device)), want)
    v, q = paper.recursion(g, DAMPING)
    same(torch.stack([paper.recursion_ihvp(v, q, DAMPING, row) for row in x]), want)
    same(paper.recursion_elements(v, q, DAMPING), dense)
    same(reference.newest(g, DAMPING, m, m - 1), want[-1])
    for curvature in (window, static):
        same(curvature.diagonal(), dense.diagonal())
        entries = [curvature.element(i, j) for i in range(min(d, 4)) for j in range(-1, min(d, 3))]
        wanted = [dense[i, j] for i in range(min(d, 4)) for j in range(-1, min(d, 3))]
        same(torch.stack(entries), torch.stack(wanted))
    same(static.submatrix(torch.arange(d, device=device)), dense)
    i, j = torch.meshgrid(torch.arange(d), torch.arange(d), indexing="ij")
    pairs = i.flatten().to(device), j.flatten().to(device)
    same(static.elements(*pairs).reshape(d, d), dense)


def test_the_inserted_gradient_is_preconditioned_by_push_through(gradients, device):
    m, d = 9, 40
    window = mk.FisherWindow(d, m, DAMPING, dtype=torch.float64, device=device)
    held = torch.zeros(0, d, dtype=torch.float64)
    for g in gradients(3 * m, d, norm=3.0, rho=0.9):
        held = torch.cat([held, g[None]])[-m:]
        same(window.update_ihvp(g.to(device)), reference.ihvp(held, DAMPING, m, g))


@given(m=st.integers(1, 12), d=st.integers(1, 20), offset=st.integers(0, 30), seed=st.integers(0, 2**31))
def test_the_order_of_the_rows_does_not_matter(m, d, offset, seed, gradients):
    g = gradients(m + offset, d, norm=3.0, seed=seed)
    wrapped = mk.FisherWindow(d, m, DAMPING, dtype=torch.float64)
    for row in g:
        wrapped.update(row)
    held = g[-m:]
    shuffled = held[torch.randperm(m, generator=torch.Generator().manual_seed(seed))]
    x = gradients(2, d, seed=seed + 1)
    want = windowed(held).ihvp(x)
    same(wrapped.ihvp(x), want)
    same(windowed(shuffled).ihvp(x), want)
    same(mk.StaticFisher(shuffled, DAMPING).ihvp(x), want)
    same(wrapped.diagonal(), windowed(shuffled).diagonal())


@pytest.mark.parametrize(("m", "d"), [(1, 9), (4, 30), (13, 31), (33, 70)])
def test_the_recursion_s_vectors_are_a_triangular_transform(m, d, gradients, device):
    """diag(chol(S / damping + m I))^2 == q, and V of the recursion as written == V in closed form."""
    g = gradients(m, d, norm=3.0)
    v, q = paper.recursion(g, DAMPING)
    gram = g @ g.mT
    lower = torch.linalg.cholesky(gram / DAMPING + m * torch.eye(m, dtype=torch.float64))
    same(lower.diagonal().square(), q)
    got_v, got_q = mk.StaticFisher(g.to(device), DAMPING).vectors()
    same(got_v, v)
    same(got_q, q[None])


@pytest.mark.parametrize("block_size", [1, 2, 7, 8, 9, 12, 20, 39, 40, 1000])
def test_blocks_are_the_masked_fisher(block_size, gradients, device):
    """b < m, b == m, b > m, ragged last blocks; b >= d is the full Fisher."""
    m, d = 8, 40
    g = gradients(m, d, norm=3.0)
    static = mk.StaticFisher(g.to(device), DAMPING, block_size=block_size)
    dense = masked_inverse(g, m, block_size)
    x = gradients(3, d, seed=1)
    same(static.ihvp(x.to(device)), x @ dense)
    same(static.ihvp(x[0].to(device)), x[0] @ dense)
    same(static.diagonal(), dense.diagonal())
    same(static.submatrix(torch.arange(d, device=device)), dense)
    i, j = torch.arange(d), torch.arange(d).flip(0)
    same(static.elements(i.to(device), j.to(device)), dense[i, j])
    if block_size >= d:
        same(static.ihvp(x.to(device)), mk.StaticFisher(g.to(device), DAMPING).ihvp(x.to(device)))
    extra = gradients(3, d, norm=3.0, seed=2)
    for row in extra.to(device):
        static.append(row)
    dense = masked_inverse(torch.cat([g, extra]), m, block_size)
    same(static.ihvp(x.to(device)), x @ dense)
    same(static.diagonal(), dense.diagonal())
    same(static.submatrix(torch.arange(d, device=device)), dense)


@pytest.mark.parametrize("block_size", [9, 12, 20])
def test_each_block_is_its_own_recursion(block_size, gradients, device):
    m, d = 8, 40
    g = gradients(m, d, norm=3.0)
    v, q = mk.StaticFisher(g.to(device), DAMPING, block_size=block_size).vectors()
    assert q.shape == (-(-d // block_size), m)
    blocks = paper.block_recursion(g, block_size, DAMPING)
    same(v, torch.cat([block_v for block_v, _ in blocks], dim=1))
    same(q, torch.stack([block_q for _, block_q in blocks]))


@pytest.mark.parametrize("normalize", ["ngrads", "seen"])
def test_m_new_gradients_forget_the_old_exactly(normalize, gradients, device):
    m, d = 6, 25
    g = gradients(m, d, norm=3.0)
    window = mk.FisherWindow(d, m, DAMPING, dtype=torch.float64, normalize=normalize, device=device)
    for row in gradients(2 * m, d, norm=1e3, seed=1).to(device):
        window.update(row)
    for row in g.to(device):
        window.update(row)
    new = windowed(g, device, normalize=normalize)
    # In slot order slot 0 is the oldest again: rows of the Gram matrix hold the dots with what was older.
    assert torch.equal(window.window, new.window)
    assert torch.equal(window.gram.tril(), new.gram.tril())
    # The factor reached its place by rotations that met gradients of norm 1e3: nothing of them is left.
    same(window.factor.triu(), new.factor.triu())
    x = gradients(2, d, seed=2).to(device)
    same(window.ihvp(x), new.ihvp(x))


def test_the_first_step(gradients, device):
    m, d = 10, 25
    g = gradients(1, d, norm=3.0)[0]
    square = float(g @ g)
    for normalize, n in (("ngrads", m), ("seen", 1)):
        window = mk.FisherWindow(d, m, DAMPING, dtype=torch.float64, normalize=normalize, device=device)
        same(window.update_ihvp(g.to(device)), n * g / (n * DAMPING + square))


def test_seen_divides_by_the_gradients_held(gradients, device):
    m, d = 5, 12
    window = mk.FisherWindow(d, m, DAMPING, dtype=torch.float64, normalize="seen", device=device)
    g = gradients(2 * m, d, norm=3.0)
    x = gradients(2, d, seed=1)
    for t in range(1, len(g) + 1):
        got = window.update_ihvp(g[t - 1].to(device))
        held = g[max(0, t - m) : t]
        dense = torch.linalg.inv(reference.fisher(held, DAMPING, len(held)))
        same(got, g[t - 1] @ dense)
        same(window.ihvp(x.to(device)), x @ dense)
        same(window.diagonal(), dense.diagonal())
        same(window.element(3, 3)[None], dense[3:4, 3])


@pytest.mark.parametrize(
    ("block_size", "keep_vectors"),
    [(None, False), (None, True), (10, False), (10, True), (4, False)],  # 4 < m: no vectors
)
def test_one_by_one_is_all_at_once(block_size, keep_vectors, gradients, device):
    """Appending is the paper's recursion: from no gradients at all to the same V, q and products."""
    m, d = 7, 25
    g = gradients(m, d, norm=3.0)
    options = {"block_size": block_size, "ngrads": m}
    grown = mk.StaticFisher(g[:0].to(device), DAMPING, keep_vectors=keep_vectors, **options)
    whole = mk.StaticFisher(g.to(device), DAMPING, **options)
    x = gradients(2, d, seed=1).to(device)
    same(grown.ihvp(x), x / DAMPING)
    every = torch.arange(d, device=device)
    for count, row in enumerate(g.to(device)):
        assert grown.count == count
        if block_size is None:
            v = grown.ihvp(row)
            q = m + row @ v
            want = grown.ihvp(x) - (x @ v)[:, None] * v / q
        grown.append(row)
        if block_size is None:  # F^-1 <- F^-1 - v v^T / q, as written
            same(grown.ihvp(x), want)
        part = mk.StaticFisher(g[: count + 1].to(device), DAMPING, **options)
        same(grown.submatrix(every), part.submatrix(every))
    same(grown.ihvp(x), whole.ihvp(x))
    same(grown.diagonal(), whole.diagonal())
    same(grown.elements(every, every.flip(0)), whole.elements(every, every.flip(0)))
    if block_size != 4:
        for got, want in zip(grown.vectors(), whole.vectors(), strict=True):
            same(got, want)


@pytest.mark.parametrize("block_size", [None, 10])
def test_kept_vectors_give_the_same_entries(block_size, gradients, device):
    m, d = 7, 25
    g = gradients(m + 4, d, norm=3.0).to(device)
    kept, not_kept = (
        mk.StaticFisher(g[:m], DAMPING, block_size=block_size, keep_vectors=keep) for keep in (True, False)
    )
    every = torch.arange(d, device=device)
    for row in [None, *g[m:]]:
        if row is not None:
            kept.append(row)
            not_kept.append(row)
        same(kept.submatrix(every), not_kept.submatrix(every))
        same(kept.elements(every, every.flip(0)), not_kept.elements(every, every.flip(0)))
        same(kept.element(-1, 3)[None], not_kept.element(-1, 3)[None])
        same(kept.ihvp(g[0]), not_kept.ihvp(g[0]))
        same(kept.diagonal(), not_kept.diagonal())


def test_the_full_and_the_sliding_fisher_agree_on_the_last_m(gradients, device):
    m, d = 8, 30
    g = gradients(3 * m + 3, d, norm=3.0)
    window = mk.FisherWindow(d, m, DAMPING, dtype=torch.float64, device=device)
    for row in g.to(device):
        window.update(row)
    static = mk.StaticFisher(g[-m:].to(device), DAMPING)
    x = gradients(2, d, seed=1).to(device)
    same(window.ihvp(x), static.ihvp(x))
    same(window.diagonal(), static.diagonal())
