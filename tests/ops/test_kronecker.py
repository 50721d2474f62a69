"""Kronecker factors of linear layers, embeddings and pairs of inputs, against explicit rows in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from kronecker_cases import DTYPES, SIMT, assert_factor, blocks_of, dtypes, factor_dtype, random, seeds, strided
from torch import Tensor

from mfac_kernels import ops
from mfac_kernels.reference import kronecker as reference

features = st.one_of(
    st.integers(0, 40), st.sampled_from([63, 64, 65, 100] if SIMT else [63, 64, 65, 127, 129, 200, 257])
)


@given(
    lead=st.lists(st.integers(0, 9), min_size=0, max_size=3),
    d=features,
    bias=st.booleans(),
    weighted=st.booleans(),
    block=st.sampled_from([None, 1, 7, 32]),
    beta=st.sampled_from([0.0, 0.9, 1.0]),
    alpha=st.sampled_from([1.0, 0.25, -1.0]),
    dtype=dtypes,
    seed=seeds,
)
@example(  # rows of a bias alone
    lead=[1], d=0, bias=True, weighted=False, block=None, beta=0.9, alpha=1.0, dtype=torch.bfloat16, seed=0
)
def test_linear_factor(lead, d, bias, weighted, block, beta, alpha, dtype, seed, instruction_set, device):
    x = strided(random((*lead, d), dtype, seed), seed)
    weights = random(tuple(lead), factor_dtype(dtype), seed + 2) if weighted else None
    width = d + bias
    want = reference.linear_factor(x, weights, bias)
    size = reference.linear_factor(x.abs(), None if weights is None else weights.abs(), bias)
    old = random((width, width), factor_dtype(dtype), seed + 1)
    old = old + old.mT
    if block:
        want, size, old = (blocks_of(t, block) for t in (want, size, old))
    expected = beta * old.double() + alpha * want
    factor = (torch.full_like(old, float("nan")) if beta == 0 else old.clone()).to(device)
    ops.linear_factor_(
        factor, x.to(device), beta=beta, alpha=alpha, bias=bias, weights=None if weights is None else weights.to(device)
    )
    assert_factor(factor.cpu(), expected, beta * old.double().abs() + abs(alpha) * size, math.prod(lead), dtype)


# Many rows; many columns; both kinds of blocks.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "d", "block"), [(20_000, 9, None), (70, 600, None), (1100, 130, 64), (33, 1000, 100)])
def test_linear_factor_sizes(rows, d, block, dtype, instruction_set, device):
    if SIMT:
        rows, d = rows // 10, d // 4
    x = random((rows, d), dtype, 1)
    want, size = reference.linear_factor(x, bias=True), reference.linear_factor(x.abs(), bias=True)
    if block:
        want, size = blocks_of(want, block), blocks_of(size, block)
    factor = torch.zeros(want.shape, dtype=factor_dtype(dtype), device=device)
    ops.linear_factor_(factor, x.to(device), bias=True)
    assert_factor(factor.cpu(), want, size, min(rows, 512), dtype)


@pytest.mark.skipif(SIMT, reason="too long for an interpreter")
def test_long_sums_keep_their_digits(instruction_set):
    """300,000 rows of mean 1: a float32 sum in sequence loses 1e-3."""
    x = random((300_000, 8), torch.float32, 1)
    factor = torch.zeros(8, 8)
    ops.linear_factor_(factor, x)
    want = reference.linear_factor(x)
    assert float((factor - want).norm() / want.norm()) <= 1e-6


def test_rows_far_apart(device):
    """Offsets beyond 2^31; the memory between the rows is never touched."""
    far = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=device).as_strided((2, 50), (2**31 + 5, 1))
    far.copy_(random((2, 50), torch.bfloat16, 0))
    factors = [torch.zeros(50, 50, device=device) for _ in range(2)]
    for factor, x in zip(factors, (far, far.contiguous()), strict=True):
        ops.linear_factor_(factor, x)
    assert torch.equal(*factors)


@given(
    shape=st.lists(st.integers(0, 8), min_size=0, max_size=3),
    count=st.integers(1, 50),
    padding=st.booleans(),
    dtype=st.sampled_from([torch.int64, torch.int32]),
    seed=seeds,
)
def test_embedding_factor(shape, count, padding, dtype, seed, device):
    indices = torch.randint(0, count, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    padding_idx = seed % count if padding else None
    old = torch.arange(count, dtype=torch.float32)
    factor = old.clone().to(device)
    ops.embedding_factor_(factor, strided(indices, seed % 2).to(device), padding_idx=padding_idx, beta=0.5, alpha=2.0)
    want = 0.5 * old + 2 * reference.embedding_factor(indices, count, padding_idx)
    torch.testing.assert_close(factor.cpu().double(), want.double(), rtol=1e-6, atol=0)


@given(
    lead=st.lists(st.integers(0, 12), min_size=1, max_size=2),
    d=st.integers(0, 70),
    e=st.integers(0, 70),
    weighted=st.booleans(),
    dtype=dtypes,
    seed=seeds,
)
def test_cross_factor(lead, d, e, weighted, dtype, seed, instruction_set, device):
    x, y = (strided(random((*lead, k), dtype, seed + k), seed) for k in (d, e))
    weights = random(tuple(lead), factor_dtype(dtype), seed) if weighted else None
    got = ops.cross_factor(x.to(device), y.to(device), None if weights is None else weights.to(device)).cpu()
    want = reference.cross_factor(x, y, weights)
    size = reference.cross_factor(x.abs(), y.abs(), None if weights is None else weights.abs())
    assert got.dtype == factor_dtype(dtype)
    assert got.shape == (d, e)
    assert bool(((got - want).abs() <= (math.prod(lead) + 4) * torch.finfo(got.dtype).eps * size).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_rows_change_nothing(value, dtype, instruction_set, device):
    x = random((2, 40, 33), dtype, 1)
    x[1, 37, 31] = value
    old = random((34, 34), factor_dtype(dtype), 1)
    old = old + old.mT
    factor = old.clone().to(device)
    flag = ops.linear_factor_(factor, x.to(device), bias=True, beta=0.5, check_finite=True)
    assert flag.tolist() == [1] and torch.equal(factor.cpu(), old)
    flag = ops.linear_factor_(factor, x[:1].to(device), bias=True, beta=0.5, check_finite=True)
    assert flag.tolist() == [0] and not torch.equal(factor.cpu(), old)


@pytest.mark.skipif(SIMT, reason="threads of the CPU")
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_any_number_of_threads(dtype, same_bits, instruction_set):
    x, images = random((3000, 70), dtype, 0), random((4, 40, 12, 12), dtype, 0)

    def results() -> list[Tensor]:
        kind = factor_dtype(dtype)
        linear, conv = torch.zeros(71, 71, dtype=kind), torch.zeros(360, 360, dtype=kind)
        depthwise, sua = torch.zeros(40, 9, 9, dtype=kind), torch.zeros(40, 40, dtype=kind)
        ops.linear_factor_(linear, x, bias=True)
        ops.conv2d_factor_(conv, images, 3, padding=1)
        ops.conv2d_factor_(depthwise, images, 3, stride=2, groups=40)
        ops.conv2d_factor_(sua, images, 3, padding=1, spatial="sua")
        return [linear, conv, depthwise, sua, ops.cross_factor(x[:, :30], x[:, 30:])]

    same_bits(results)
