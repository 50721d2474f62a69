"""Batched Cholesky inverses, factors and solves against float64 LAPACK."""

from __future__ import annotations

import functools

import pytest
import torch
from cholesky_cases import DTYPES, EPS, FLOATS, SIMT, assert_factor, assert_is, junk_above, spd, truth
from torch import Tensor

from mfac_kernels import ops
from mfac_kernels.reference import cholesky as reference


@functools.cache
def of_size(n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks, enough for kernels that interleave them; condition numbers 1 to 1e7 or what dtype bears; their truth."""
    count = (3 if n <= 32 else 1) if SIMT else (19 if n <= 64 else 2)
    most = min(1e7, 0.05 / (max(n, 1) * EPS[dtype]))
    blocks = spd((count,), n, most ** torch.linspace(0, 1, count, dtype=torch.float64), dtype, n)
    return blocks, *truth(blocks)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("first", range(0, 131, 10))
def test_inverse_of_every_size(first, dtype, device, instruction_set):
    for n in range(first, min(first + 10, 131)):
        blocks, want, cond = of_size(n, dtype)
        got, info = ops.cholesky_inverse_ex(junk_above(blocks).to(device))
        assert got.dtype == dtype and info.dtype == torch.int32 and not info.any()
        assert_is(got, want, cond)
        one, info = ops.cholesky_inverse_ex(blocks[-1].to(device))
        assert info.shape == () and not info
        assert_is(one, want[-1], cond[-1] if n else cond)


LARGE = [(256, 3), (300, 1)] if SIMT else [(256, 5), (257, 2), (512, 2), (1000, 1)]


@functools.cache
def large(n: int, count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    cond = 0.05 / (n * EPS[torch.float32])
    blocks = spd((count,), n, cond, dtype, n)
    return blocks, *truth(blocks, cond=1.1 * cond)  # rounded to float32, the smallest eigenvalue is off by up to n eps


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("n", "count"), LARGE)
def test_inverse_of_large_blocks(n, count, dtype, device, instruction_set):
    blocks, want, cond = large(n, count, dtype)
    got, info = ops.cholesky_inverse_ex(junk_above(blocks).to(device))
    assert not info.any()
    assert_is(got, want, cond)


@pytest.mark.skipif(SIMT, reason="hours in the interpreter; the kernel is that of 300")
@pytest.mark.parametrize("dtype", FLOATS)
def test_inverse_of_size_2049(dtype, device):
    blocks = spd((), 2049, 100.0, dtype)
    got, info = ops.cholesky_inverse_ex(blocks.to(device))
    assert not info and torch.equal(got, got.mT)
    # X A = I up to c n eps cond: a product in float64 is cheaper than an inverse
    residual = got.cpu().double() @ blocks.double() - torch.eye(2049, dtype=torch.float64)
    assert float(torch.linalg.matrix_norm(residual)) <= 4 * 2049 * EPS[dtype] * 100 * 2049**0.5


@pytest.mark.parametrize("cond", [1e5, 1e6])
@pytest.mark.parametrize("n", [16, 48] if SIMT else [16, 64, 128, 400])
def test_inverse_is_as_stable_as_lapack(n, cond, device, instruction_set):
    """float32 where the bound says nothing any more. Gauss-Jordan, for one, loses another factor of cond here."""
    blocks = spd((4,), n, cond, torch.float32, n)
    want = reference.inverse(blocks)
    got, info = ops.cholesky_inverse_ex(blocks.to(device))
    lapack = torch.cholesky_inverse(torch.linalg.cholesky(blocks))
    assert not info.any()
    error, allowed = (torch.linalg.matrix_norm(x.cpu().double() - want).mean() for x in (got, lapack))
    assert float(error) <= 3 * float(allowed)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("first", range(0, 131, 10))
def test_factor_and_solve_of_every_size(first, dtype, device, instruction_set):
    for n in range(first, min(first + 10, 131), 3 if SIMT and first else 1):
        blocks, _, _ = of_size(n, dtype)
        factor, info = ops.cholesky_factor_ex(junk_above(blocks).to(device))
        assert not info.any() and factor.dtype == dtype
        assert_factor(factor, blocks.double())
        b = torch.randn(len(blocks), n, n % 5, generator=torch.Generator().manual_seed(n), dtype=dtype)
        assert_solution(ops.cholesky_solve(junk_above(factor) if n else factor, b.to(device)), factor, b)


def assert_solution(x: Tensor, factor: Tensor, b: Tensor) -> None:
    lower, x64 = factor.cpu().double().tril(), x.cpu().double()
    a = lower @ lower.mT
    scale = torch.linalg.matrix_norm(a) * torch.linalg.matrix_norm(x64)
    assert bool((torch.linalg.matrix_norm(a @ x64 - b.double()) <= 4 * a.shape[-1] * EPS[x.dtype] * scale).all())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("n", "columns"), [(150, 3)] if SIMT else [(256, 40), (700, 300)])
def test_factor_and_solve_of_large_blocks(n, columns, dtype, device, instruction_set):
    blocks = spd((2,), n, 1e3, dtype)
    factor = ops.cholesky_factor(blocks.to(device))
    assert_factor(factor, blocks.double())
    b = torch.randn(2, n, columns, dtype=dtype)
    assert_solution(ops.cholesky_solve(factor, b.to(device)), factor, b)


@pytest.mark.parametrize(
    ("factors", "vectors"), [((), ()), ((3,), (3,)), ((3,), (2, 3)), ((2, 1), (3,)), ((3,), ()), ((0,), (0,))]
)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced"])
def test_solve_broadcasts(factors, vectors, layout, device, instruction_set):
    n, k = 6, 4
    factor = ops.cholesky_factor(spd(factors, n, dtype=torch.float32).to(device))
    b = torch.randn(*vectors, n, k + 1)[..., 1:]
    if layout == "transposed":
        b, factor = b.mT.contiguous().mT, factor.mT.contiguous().mT
    if layout == "sliced":
        factor = torch.nn.functional.pad(factor, (1, 2, 3, 0))[..., 3:, 1:-2]
    before = b.clone()
    x = ops.cholesky_solve(factor, b.to(device))
    assert x.shape == (*torch.broadcast_shapes(factors, vectors), n, k)
    assert torch.equal(b, before)
    assert_solution(x, factor.expand(*x.shape[:-2], n, n), b)


@pytest.mark.parametrize("factor_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_solve_in_the_wider_dtype(dtype, factor_dtype, device):
    factor = ops.cholesky_factor(spd((), 5, 4.0), dtype=factor_dtype).to(device)
    b = torch.randn(5, 2).to(dtype)
    x = ops.cholesky_solve(factor, b.to(device))
    assert x.dtype == (torch.float64 if torch.float64 in (dtype, factor_dtype) else torch.float32)
    assert_solution(x, factor, b)
