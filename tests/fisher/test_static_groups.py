"""StaticFisher: submatrices of many groups, and minima under constraints, against dense matrices in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import mfac_kernels as mk
from mfac_kernels.fisher import static as module
from mfac_kernels.reference import static as reference
from mfac_kernels.reference.window import fisher as dense_fisher

NAN = float("nan")
BLOCKS = [None, 40, 13, 5]  # one block, wide ones, narrow ones


def masked_fisher(grads: Tensor, damping: float, n: int, block_size: int | None) -> Tensor:
    fisher = dense_fisher(grads, damping, n)
    block = torch.arange(len(fisher)) // (block_size or len(fisher))
    return fisher * (block[:, None] == block)


def error(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want|, Frobenius; |got| where want is zero."""
    norm = float(want.norm())
    return float((got.cpu().double() - want).norm()) / (norm or 1.0)


@pytest.mark.parametrize("elements", [1, 100, 1 << 22])  # pages of one group, of some, of all
@pytest.mark.parametrize("keep_vectors", [False, True])
@pytest.mark.parametrize("block_size", BLOCKS)
def test_group_submatrices(block_size, keep_vectors, elements, gradients, device, monkeypatch):
    """Neighbours, groups across blocks, repeated and negative indices, whatever their order."""
    if keep_vectors and block_size == 5:
        return  # no wider than the gradients
    monkeypatch.setattr(module, "_GROUP_ELEMENTS", elements)
    m, d, damping = 11, 67, 0.1
    g = gradients(m, d, norm=3.0)
    dense = torch.linalg.inv(masked_fisher(g, damping, m, block_size))
    static = mk.StaticFisher(g.to(device), damping, block_size=block_size, keep_vectors=keep_vectors)
    generator = torch.Generator().manual_seed(0)
    for index in (
        torch.arange(66).view(-1, 3),
        torch.arange(64).view(-1, 4).flip(0),
        torch.randint(-d, d, (9, 6), generator=generator),
        torch.randint(d, (5, 1), generator=generator).int(),
        torch.zeros(0, 4, dtype=torch.int64),
        torch.zeros(3, 0, dtype=torch.int64),
    ):
        got = static.group_submatrices(index.to(device))
        i = index.long()
        assert got.dtype == torch.float64 and got.shape == (*index.shape, index.shape[1])
        assert error(got, dense[i[:, :, None], i[:, None]]) <= 1e-12  # m eps cond, cond about 100
        assert torch.equal(got, got.mT)


sizes = st.tuples(st.integers(1, 9), st.integers(1, 24))


@given(sizes, st.integers(1, 30), st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]), st.integers(0, 2**31))
def test_the_minimum_under_constraints(shape, block_size, share, seed):
    """Equal to the solution with multipliers, for blocks that are narrow, wide and ragged; all fixed, none fixed."""
    m, d = shape
    generator = torch.Generator().manual_seed(seed)
    g = torch.randn(m, d, generator=generator, dtype=torch.float64)
    values = torch.randn(d, generator=generator, dtype=torch.float64)
    fixed = torch.rand(d, generator=generator) < share
    static = mk.StaticFisher(g, 0.1, block_size=block_size)
    fisher = masked_fisher(g, 0.1, m, block_size)
    got = static.constrained_minimum(values, fixed)
    assert torch.equal(got[fixed], values[fixed])
    # d eps cond: |g|^2 / (m 0.1) is below 10 d
    assert error(got, reference.constrained_minimum(fisher, values, fixed)) <= 1e-11


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_size", BLOCKS)
@pytest.mark.parametrize("few", [False, True])
def test_the_minimum_with_pages_and_appended_gradients(few, block_size, dtype, gradients, device, monkeypatch):
    monkeypatch.setattr("mfac_kernels.fisher._rows._COPY_ELEMENTS", 200)
    m, d, damping = 11, 67, 0.1
    g = gradients(m + 2, d, norm=3.0).to(dtype)
    values = gradients(1, d, seed=1)[0].float()
    fixed = (torch.arange(d) % 3 > 0) != few
    static = mk.StaticFisher(g[:m].to(device), damping, block_size=block_size, page_size=30)
    for row in g[m:].to(device):
        static.append(row)
    want = reference.constrained_minimum(masked_fisher(g, damping, m, block_size), values, fixed)
    got = static.constrained_minimum(values.to(device), fixed.to(device))
    assert got.dtype == torch.float32
    assert error(got, want) <= 2**-23  # float64, rounded once
    narrow = static.constrained_minimum(values.to(torch.bfloat16).to(device), fixed.to(device))
    assert narrow.dtype == torch.float32


@pytest.mark.parametrize("damping", [1e-8, 1e-12])
@pytest.mark.parametrize("block_size", [None, 13])
def test_the_minimum_with_dependent_gradients(block_size, damping, gradients, device):
    """Duplicates, and fewer gradients than free coordinates: the answer is finite and hardly depends on damping."""
    g = gradients(3, 40, norm=10.0).repeat(3, 1)
    values, fixed = gradients(1, 40, seed=1)[0], torch.arange(40) % 2 == 0
    got = mk.StaticFisher(g.to(device), damping, block_size=block_size).constrained_minimum(
        values.to(device), fixed.to(device)
    )
    fisher = masked_fisher(g, 0.0, 9, block_size)
    y = got.cpu()
    # The minimum of y^T F y without damping is 0: three gradients, more than three free coordinates a block.
    assert float(y @ fisher @ y) <= 1e-6 * float(values @ fisher @ values)


NO_INT = r"index: expected an int64 or int32 tensor, got"
SOME = torch.ones(6) > 0
ROWS = [
    ("group_submatrices", (torch.zeros(3).long(),), ValueError, r"index: expected shape \(q, k\), got \(3,\)"),
    ("group_submatrices", (torch.zeros(2, 2),), TypeError, f"{NO_INT} torch.float32"),
    ("group_submatrices", ([[0]],), TypeError, f"{NO_INT} list"),
    ("group_submatrices", (torch.full((1, 2), 6),), IndexError, r"index: expected indices in \[-6, 6\), got one out"),
    ("constrained_minimum", (torch.ones(5), SOME), ValueError, r"values: expected shape \(6,\), got \(5,\)"),
    ("constrained_minimum", (torch.full((6,), NAN), SOME), ValueError, "values: expected finite values"),
    ("constrained_minimum", (torch.ones(6), torch.ones(6)), TypeError, "fixed: expected a bool tensor, got torch.fl"),
    ("constrained_minimum", (torch.ones(6), None), TypeError, "fixed: expected a bool tensor, got NoneType"),
    ("constrained_minimum", (torch.ones(6), SOME[1:]), ValueError, r"fixed: expected shape \(6,\) on cpu, got"),
]


@pytest.mark.parametrize(("method", "arguments", "kind", "message"), ROWS, ids=[row[3] for row in ROWS])
@pytest.mark.parametrize("block_size", [None, 2])
def test_a_bad_call(method, arguments, kind, message, block_size, gradients):
    static = mk.StaticFisher(gradients(3, 6), 0.1, block_size=block_size)
    with pytest.raises(kind, match=f"^{message}"):
        getattr(static, method)(*arguments)


def test_a_change_in_place_does_not_pass_unseen(gradients):
    g = gradients(4, 9)
    static = mk.StaticFisher(g, 0.1)
    g[2, 5] += 1
    for call in (
        lambda: static.group_submatrices(torch.zeros(1, 1, dtype=torch.int64)),
        lambda: static.constrained_minimum(torch.ones(9), torch.ones(9) > 0),
    ):
        with pytest.raises(RuntimeError, match=r"^grads: .*changed in place"):
            call()
