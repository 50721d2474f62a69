"""Ragged groups of rows, scales on the device: against calls one by one, bit for bit, and the formula in float64."""

from __future__ import annotations

from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kronecker_cases import DTYPES, SIMT, assert_factor, dtypes, factor_dtype, random, seeds, strided, tf32
from torch import Tensor

from mfac_kernels import ops
from mfac_kernels.reference import kronecker as reference

INTEGERS = [torch.int32, torch.int64]


def symmetric(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    root = random(shape, factor_dtype(dtype), seed)
    return root + root.mT


def one_by_one(factors: Tensor, x: Tensor, ends: list[int], weights: Tensor | None = None, **how: object) -> Tensor:
    """A call for each group."""
    result = factors.clone()
    for factor, (begin, end) in zip(result, pairwise(ends), strict=True):
        ops.linear_factor_(factor, x[begin:end], weights=None if weights is None else weights[begin:end], **how)
    return result


# Rows in front of the first group and behind the last; groups without rows; none at all, or one.
@given(
    sizes=st.lists(st.integers(0, 9), max_size=6),
    around=st.sampled_from([(0, 0), (2, 3)]),
    d=st.sampled_from([0, 1, 5, 8, 33]),
    bias=st.booleans(),
    weighted=st.booleans(),
    beta=st.sampled_from([0.0, 0.9]),
    integer=st.sampled_from(INTEGERS),
    dtype=dtypes,
    seed=seeds,
)
def test_ragged(sizes, around, d, bias, weighted, beta, integer, dtype, seed, instruction_set, device):
    ends = list(accumulate(sizes, initial=around[0]))
    rows, count, width = ends[-1] + around[1], len(sizes), d + bias
    x = strided(random((rows, d), dtype, seed), seed)
    weights = random((rows,), factor_dtype(dtype), seed + 2) if weighted else None
    old = symmetric((count, width, width), dtype, seed + 1)
    factors = (torch.full_like(old, float("nan")) if beta == 0 else old.clone()).to(device)
    on_device = x.to(device), None if weights is None else weights.to(device)
    alone = one_by_one(factors, on_device[0], ends, on_device[1], beta=beta, alpha=0.25, bias=bias)
    offsets = torch.tensor(ends, dtype=integer, device=device)
    ops.linear_factor_(factors, on_device[0], offsets=offsets, beta=beta, alpha=0.25, bias=bias, weights=on_device[1])
    assert torch.equal(factors, alone)
    for got, before, (begin, end) in zip(factors.cpu(), old.double(), pairwise(ends), strict=True):
        part, each = x[begin:end], None if weights is None else weights[begin:end]
        want = beta * before + 0.25 * reference.linear_factor(part, each, bias)
        size = reference.linear_factor(part.abs(), None if each is None else each.abs(), bias)
        assert_factor(got, want, beta * before.abs() + 0.25 * size, end - begin, dtype)


# Several runs of rows in some groups and not in others, at their ends; several tiles; with tensor cores and without.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("sizes", "d"), [([1, 511, 0, 512, 513, 2100], 24), ([1023, 3000, 0], 8), ([70, 0, 300], 136), ([4500], 5)]
)
def test_long_groups(sizes, d, dtype, instruction_set, device):
    ends = list(accumulate(sizes, initial=0))
    x = random((ends[-1], d), dtype, 1).to(device)
    old = symmetric((len(sizes), d + 1, d + 1), dtype, 2)
    factors = old.clone().to(device)
    want = one_by_one(factors, x, ends, beta=0.5, bias=True)
    ops.linear_factor_(factors, x, offsets=torch.tensor(ends, device=device), beta=0.5, bias=True)
    assert torch.equal(factors, want)
    for got, before, (begin, end) in zip(factors.cpu(), old.double(), pairwise(ends), strict=True):
        part = x[begin:end].cpu()
        want, size = reference.linear_factor(part, bias=True), reference.linear_factor(part.abs(), bias=True)
        assert_factor(got, 0.5 * before + want, 0.5 * before.abs() + size, min(end - begin, 512), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ragged_under_tf32(dtype, device):
    ends = [0, 0, 37, 600, 1700]
    x, factors = random((1700, 40), dtype, 0).to(device), symmetric((4, 40, 40), dtype, 1).to(device)
    with tf32():
        want = one_by_one(factors, x, ends)
        ops.linear_factor_(factors, x, offsets=torch.tensor(ends, device=device))
    assert torch.equal(factors, want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_group_is_refused_by_itself(dtype, instruction_set, device):
    ends = [0, 20, 20, 45, 60]
    x, old = random((60, 9), dtype, 1), symmetric((4, 10, 10), dtype, 2)
    x[44, 3] = float("nan")
    factors = old.clone().to(device)
    offsets = torch.tensor(ends, device=device)
    flag = ops.linear_factor_(factors, x.to(device), offsets=offsets, bias=True, beta=0.5, check_finite=True)
    assert flag.tolist() == [0, 0, 1, 0]
    x[44, 3] = 0
    want = one_by_one(old.to(device), x.to(device), ends, bias=True, beta=0.5, check_finite=True)
    want[2] = old[2].to(device)
    assert torch.equal(factors, want)


@pytest.mark.parametrize(
    ("ends", "message"),
    [([0, 5, 3, 6], "expected 5 to 6 at index 2, got 3"), ([-1, 6], "expected 0 to 6 at index 0, got -1"),
     ([0, 7], "expected 0 to 6 at index 1, got 7")],
)  # fmt: skip
def test_offsets_out_of_order(ends, message):
    factors = torch.ones(len(ends) - 1, 5, 5)
    shown = "descending or out of range" if SIMT else message  # a device assertion has no values to show
    with pytest.raises(RuntimeError, match=f"linear_factor_: offsets: {shown}"):
        ops.linear_factor_(factors, torch.ones(6, 5), offsets=torch.tensor(ends))
    assert torch.equal(factors, torch.ones_like(factors))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_scales_on_the_device(dtype, kind, instruction_set, device):
    """The bits of the numbers, which float32 holds exactly."""
    x, old = random((40, 9), dtype, 1).to(device), symmetric((3, 9, 9), dtype, 2).to(device)
    beta, alpha = (torch.tensor(value, dtype=kind, device=device) for value in (0.75, 0.125))
    want, got = old[0].clone(), old[0].clone()
    ops.linear_factor_(want, x, beta=0.75, alpha=0.125)
    ops.linear_factor_(got, x, beta=beta, alpha=0.125)
    assert torch.equal(got, want)
    got = old[0].clone()
    ops.linear_factor_(got, x, beta=0.75, alpha=alpha)
    assert torch.equal(got, want)

    ends, each = [0, 15, 15, 40], torch.tensor([0.75, 0.5, 0.0], dtype=kind, device=device)
    want = torch.stack(
        [one_by_one(old, x, ends, beta=value, alpha=0.125)[e] for e, value in enumerate((0.75, 0.5, 0.0))]
    )
    got = old.clone()
    got[2] = float("nan")  # beta = 0: not read
    ops.linear_factor_(got, x, offsets=torch.tensor(ends, device=device), beta=each, alpha=alpha)
    assert torch.equal(got, want)


@pytest.mark.parametrize("name", ["beta", "alpha"])
def test_scales_that_are_not_finite_are_refused(name, device):
    factor = torch.ones(5, 5, device=device)
    scale = torch.tensor(float("nan"), device=device)
    flag = ops.linear_factor_(factor, torch.ones(6, 5, device=device), check_finite=True, **{name: scale})
    assert flag.tolist() == [1] and torch.equal(factor, torch.ones_like(factor))


def test_a_running_mean(device):
    """beta = seen / (seen + n), alpha = 1 / (seen + n) of a counter on the device: the mean over all rows."""
    batches = [random((rows, 6), torch.float64, rows).to(device) for rows in (5, 1, 30)]
    mean, seen = torch.full((6, 6), float("nan"), dtype=torch.float64, device=device), torch.zeros((), device=device)
    for x in batches:
        total = seen + len(x)
        ops.linear_factor_(mean, x, beta=seen / total, alpha=1 / total)
        seen = total
    rows = torch.cat(batches).cpu()
    # The scales are float32: three steps of a few roundings each.
    torch.testing.assert_close(mean.cpu(), reference.linear_factor(rows) / 36, rtol=1e-6, atol=1e-6)


@pytest.mark.skipif(SIMT, reason="threads of the CPU")
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_any_number_of_threads(dtype, same_bits, instruction_set):
    ends = [0, 100, 100, 2900, 3000]
    x = random((3000, 70), dtype, 0)

    def results() -> list[Tensor]:
        factors = torch.zeros(4, 71, 71, dtype=factor_dtype(dtype))
        ops.linear_factor_(factors, x, offsets=torch.tensor(ends), bias=True)
        return [factors]

    same_bits(results)


pairs = st.tuples(
    st.lists(st.integers(0, 9), max_size=2), st.sampled_from([0, 1, 5, 33, 70]), st.booleans(), st.booleans(), dtypes
)


@given(given=st.lists(pairs, max_size=14), beta=st.sampled_from([0.0, 0.9]), seed=seeds)
def test_grouped(given, beta, seed, instruction_set, device):
    """Mixed shapes, dtypes, biases and weights: the bits of calls one by one."""
    xs, factors, biases, weights = [], [], [], []
    for i, (lead, d, bias, weighted, dtype) in enumerate(given):
        xs.append(strided(random((*lead, d), dtype, seed + i), seed + i).to(device))
        factors.append(symmetric((d + bias, d + bias), dtype, seed).to(device))
        biases.append(bias)
        weights.append(random(tuple(lead), factor_dtype(dtype), seed).to(device) if weighted else None)
    want = [factor.clone() for factor in factors]
    for factor, x, bias, each in zip(want, xs, biases, weights, strict=True):
        ops.linear_factor_(factor, x, beta=beta, alpha=0.25, bias=bias, weights=each)
    ops.grouped_linear_factor_(factors, xs, beta=beta, alpha=0.25, bias=biases, weights=weights)
    for got, expected in zip(factors, want, strict=True):
        assert torch.equal(got, expected)


# Alike in groups of more than one launch takes, some of many runs of rows; block diagonals.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rounded", [False, True])
def test_grouped_sizes(dtype, rounded, instruction_set, device):
    shapes = [(70, 16)] * 12 + [(2600, 8), (2100, 24), (600, 136), (40, 9)]
    xs = [random(shape, dtype, i).to(device) for i, shape in enumerate(shapes)]
    factors = [torch.zeros(d, d, dtype=factor_dtype(dtype), device=device) for _, d in shapes]
    factors[0] = torch.zeros(2, 8, 8, dtype=factor_dtype(dtype), device=device)
    want = [factor.clone() for factor in factors]
    with tf32(rounded):
        for factor, x in zip(want, xs, strict=True):
            ops.linear_factor_(factor, x)
        ops.grouped_linear_factor_(factors, xs)
    for got, expected in zip(factors, want, strict=True):
        assert torch.equal(got, expected)


def test_grouped_scales_and_flags(device):
    """A value and a flag for each pair."""
    xs = [random((20, d), torch.float32, d) for d in (3, 9, 3)]
    xs[1][19, 8] = float("inf")
    factors = [torch.ones(x.shape[1], x.shape[1], device=device) for x in xs]
    want = [factor.clone() for factor in factors]
    for i, beta in ((0, 0.5), (2, 0.75)):
        ops.linear_factor_(want[i], xs[i].to(device), beta=beta, alpha=0.125, check_finite=True)
    scales = torch.tensor([0.5, 1.0, 0.75], device=device), torch.tensor(0.125, device=device)
    flag = ops.grouped_linear_factor_(
        factors, [x.to(device) for x in xs], beta=scales[0], alpha=scales[1], check_finite=True
    )
    assert flag.tolist() == [0, 1, 0]
    for got, expected in zip(factors, want, strict=True):
        assert torch.equal(got, expected)


def test_grouped_of_nothing():
    assert ops.grouped_linear_factor_([], [], check_finite=True) is None


def test_grouped_factors_share_no_memory():
    memory, x = torch.zeros(40), torch.ones(6, 5)
    first, second = memory[:25].view(5, 5), memory[15:].view(5, 5)
    for factors, message in (
        ([first, torch.zeros(5, 5), first], r"factors\[2\]: expected memory of its own, got some of factors\[0\]"),
        ([second, first], r"factors\[1\]: expected memory of its own, got some of factors\[0\]"),
    ):
        with pytest.raises(RuntimeError, match=f"grouped_linear_factor_: {message}"):
            ops.grouped_linear_factor_(factors, [x] * len(factors))
    assert not memory.any()


@pytest.mark.skipif(SIMT, reason="threads of the CPU")
def test_grouped_same_bits_for_any_number_of_threads(same_bits, instruction_set):
    xs = [random((rows, d), dtype, 0) for dtype in DTYPES for rows, d in ((3000, 70), (5, 400))]

    def results() -> list[Tensor]:
        factors = [torch.zeros(x.shape[1], x.shape[1], dtype=factor_dtype(x.dtype)) for x in xs]
        ops.grouped_linear_factor_(factors, xs, check_finite=True)
        return factors

    same_bits(results)
