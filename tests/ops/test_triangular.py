"""Inverses of triangles, and upper Cholesky factors, against float64.

The computed inverse X of a triangle L is within c n eps |L^-1| |L| |L^-1| (Higham, Accuracy and Stability of Numerical
Algorithms, section 14.2), c = 2: products and a division.
"""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import mfac_kernels as mk
from mfac_kernels import ops
from mfac_kernels.reference import cholesky as reference

FLOATS = [torch.float32, torch.float64]
DTYPES = [*FLOATS, torch.bfloat16, torch.float16]
EPS = {dtype: torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps for dtype in DTYPES}
SIMT = bool(mk.build_info()["simt"])
NAN = float("nan")

uppers = pytest.mark.parametrize("upper", [True, False])


def triangles(*batch: int, n: int, dtype: torch.dtype = torch.float64, upper: bool = False, seed: int = 0) -> Tensor:
    """Diagonals of both signs in [1, 2], and NaN where nothing may be read."""
    generator = torch.Generator().manual_seed(seed + n)
    lower = torch.randn(*batch, n, n, generator=generator, dtype=torch.float64).tril(-1) / max(1, n) ** 0.5
    diagonal = 1 + torch.rand(*batch, n, generator=generator, dtype=torch.float64)
    diagonal[..., ::3] *= -1
    lower = lower + torch.diag_embed(diagonal) + torch.full((n, n), NAN, dtype=torch.float64).triu(1)
    return (lower.mT if upper else lower).to(dtype)


def assert_inverse(got: Tensor, blocks: Tensor, upper: bool) -> None:
    got, blocks = got.cpu(), blocks.cpu()
    assert torch.equal(got, got.triu() if upper else got.tril())
    want = reference.triangular_inverse(blocks, upper)
    triangle = blocks.double().triu() if upper else blocks.double().tril()
    bound = 2 * max(1, blocks.shape[-1]) * EPS[got.dtype] * (want.abs() @ triangle.abs() @ want.abs())
    assert bool(((got.double() - want).abs() <= bound).all())


@functools.cache
def of_size(n: int, dtype: torch.dtype, upper: bool) -> Tensor:
    return triangles(2 if SIMT or n > 64 else 17, n=n, dtype=dtype, upper=upper)


SIZES = [*range(10), 12, 15, 16, 17, 31, 33, 40, 57, 64, 65, 100, 128, 129] + ([] if SIMT else [200, 300])


@uppers
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n", SIZES)
def test_every_size(n, dtype, upper, device, instruction_set):
    blocks = of_size(n, dtype, upper)
    for count in {2, len(blocks)}:
        got, info = ops.triangular_inverse_ex(blocks[:count].to(device), upper=upper)
        assert got.dtype == dtype and info.dtype == torch.int32 and info.shape == (count,) and not info.any()
        assert_inverse(got, blocks[:count], upper)


@given(
    b=st.integers(0, 20),
    n=st.sampled_from([0, 1, 2, 5, 16, 33] + ([] if SIMT else [70, 140])),
    dtype=st.sampled_from(DTYPES),
    spread=st.booleans(),
    by_columns=st.booleans(),
    upper=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_strides(b, n, dtype, spread, by_columns, upper, seed, device, instruction_set):
    blocks = triangles(b, n=n, dtype=dtype, upper=upper, seed=seed).to(device)
    want = ops.triangular_inverse(blocks, upper=upper)
    assert_inverse(want, blocks, upper)
    memory = torch.full((b + 2, n + 3, 2 * n), NAN, dtype=dtype, device=device)
    strided = memory[1 : b + 1, 3:, ::2] if spread else memory[1 : b + 1, 1 : n + 1, 1 : n + 1]
    strided = strided.mT if by_columns and strided.shape[-1] == strided.shape[-2] else strided
    if strided.shape != blocks.shape:
        return
    strided.copy_(blocks)
    out = torch.zeros_like(want).mT.contiguous().mT
    assert ops.triangular_inverse_ex(strided, upper=upper, out=out)[0] is out and torch.equal(out, want)
    ops.triangular_inverse_ex(strided, upper=upper, out=strided)
    assert torch.equal(strided, want.to(dtype))


@uppers
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n", [1, 2, 9, 33, 130] if SIMT else [1, 2, 9, 16, 33, 70, 130, 300])
def test_failures_between_good_blocks(n, dtype, upper, device, instruction_set):
    """Codes count from the first row of a lower triangle, from the last of an upper one; what is not finite is -1."""
    rows = sorted({r for r in (0, 3, 4, 31, 63, 64, 127, n - 1) if r < n})
    good = triangles(2 * len(rows) + 3, n=n, dtype=dtype, upper=upper)
    want = ops.triangular_inverse(good.to(device), upper=upper)
    mixed = good.clone()
    for i, row in enumerate(rows):
        at = n - 1 - row if upper else row
        mixed[2 * i + 1, at, at] = 0
    mixed[-2, 0, 0] = float("inf")
    mixed[-2, n // 2, n // 2] = 0 if n > 1 else float("inf")
    got, info = ops.triangular_inverse_ex(mixed.to(device), upper=upper)
    assert info[::2].eq(0).all() and info[1::2].tolist() == [*(row + 1 for row in rows), -1]
    assert bool(got[1::2].isnan().all()) and torch.equal(got[::2], want[::2])
    if n > 1:
        mixed = good.clone()
        mixed[(1, 0, n - 1) if upper else (1, n - 1, 0)] = NAN
        got, info = ops.triangular_inverse_ex(mixed.to(device), upper=upper)
        assert info.tolist() == [0, -1, *([0] * (len(good) - 2))] and torch.equal(got[2:], want[2:])


@uppers
def test_raising_form_says_what_failed(upper, device):
    blocks = triangles(2, 3, n=5, upper=upper)
    blocks[1, 0, 2, 2] = 0
    minor = "trailing" if upper else "leading"
    with pytest.raises(
        torch.linalg.LinAlgError,
        match=rf"^triangular_inverse: block \(1, 0\): the {minor} minor of order 3 is zero; .* 1 of 6$",
    ):
        ops.triangular_inverse(blocks.to(device), upper=upper)


@pytest.mark.parametrize("dtype", FLOATS)
def test_cholesky_qr(dtype, device):
    """Q = Y R^-1, twice: |Q^T Q - I| is of the order of eps, whatever the condition of Y up to 1 / sqrt(eps)."""
    y = torch.randn(200, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = (y * torch.logspace(0, -2, 40, dtype=torch.float64)).to(device, dtype)
    for _ in range(2):
        r = ops.cholesky_factor(y.mT @ y, upper=True)
        y = y @ ops.triangular_inverse(r, upper=True)
    assert float((y.mT @ y - torch.eye(40, device=device)).abs().max()) <= 200 * EPS[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [0, 1, 7, 33, 130])
def test_upper_factor_is_the_lower_one_transposed(n, dtype, device, instruction_set):
    x = torch.randn(3, 2 * n, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    blocks = (x.mT @ x / max(1, n)).to(device, dtype)
    lower, codes = ops.cholesky_factor_ex(blocks, 0.1)
    upper, info = ops.cholesky_factor_ex(blocks, 0.1, upper=True)
    assert not codes.any() and torch.equal(info, codes) and torch.equal(upper, lower.mT)
    out = torch.zeros_like(upper)
    assert ops.cholesky_factor_ex(blocks, 0.1, upper=True, out=out)[0] is out and torch.equal(out, upper)
    assert not ops.cholesky_factor(blocks, 0.1, upper=True, dtype=torch.float64).tril(-1).any()


def test_upper_factor_needs_memory_of_its_own(device):
    blocks = torch.eye(4, device=device).repeat(2, 1, 1)
    with pytest.raises(
        RuntimeError, match=r"^cholesky_factor_: out\[0\]: expected the memory of blocks\[0\] or memory"
    ):
        ops.cholesky_factor_ex(blocks, 3.0, upper=True, out=blocks)
    assert torch.equal(blocks.cpu(), torch.eye(4).repeat(2, 1, 1))


@pytest.mark.parametrize("dtype", DTYPES)
@uppers
def test_opcheck(dtype, upper, device):
    computed = torch.float64 if dtype == torch.float64 else torch.float32
    blocks = [triangles(4, n=3, dtype=dtype, upper=upper).to(device), torch.eye(20, dtype=dtype, device=device)]
    out = [torch.zeros_like(b, dtype=computed) for b in blocks]
    torch.library.opcheck(torch.ops.mfac_kernels.triangular_inverse_.default, (out, blocks, upper))


def test_same_bits_for_any_number_of_threads(device, threads, instruction_set):
    blocks = [
        triangles(b, n=n, dtype=torch.float32).to(device) for b, n in ((40, 16), (5, 70), (1, 129 if SIMT else 600))
    ]
    threads(1)
    once = [ops.triangular_inverse(b) for b in blocks]
    for count in (2, 3):
        threads(count)
        assert all(torch.equal(ops.triangular_inverse(b), want) for b, want in zip(blocks, once, strict=True))


B, OUT = torch.eye(3).repeat(2, 1, 1), torch.zeros(2, 3, 3)
BAD = [
    (([OUT, OUT], [B]), r"out: expected 1 tensors, as blocks has, got 2"),
    (([OUT], [B[:, :2]]), r"blocks\[0\]: expected shape \(..., n, n\), got \(2, 2, 3\)"),
    (([OUT.half()], [B]), r"out\[0\]: expected float32 or float64, got Half"),
    (([OUT[:1]], [B]), r"out\[0\]: expected shape \(2, 3, 3\), got \(1, 3, 3\)"),
    (([OUT[:1].expand(2, 3, 3)], [B]), r"out\[0\]: expected distinct elements, got stride 0 in dimension 0"),
]


@pytest.mark.parametrize("place", ["cpu", "meta"])
@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_errors_name_argument_expected_and_got(arguments, message, place):
    if place == "meta":
        arguments = [
            [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=place) for t in ts] for ts in arguments
        ]
    with pytest.raises(RuntimeError, match=f"^triangular_inverse_: {message}"):
        torch.ops.mfac_kernels.triangular_inverse_(*arguments, False)
    assert not OUT.any()


def test_what_is_not_differentiable_says_so():
    with pytest.raises(RuntimeError, match=r"^triangular_inverse_ex: not differentiable"):
        ops.triangular_inverse_ex(torch.eye(3).requires_grad_())
