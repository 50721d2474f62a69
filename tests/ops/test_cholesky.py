"""Batched Cholesky inverses, factors and solves against float64 LAPACK.

Bounds. In precision eps the factor is exact for a matrix that is off by c n eps norm(A), and so are solves with it
(Higham, Accuracy and Stability of Numerical Algorithms, theorems 10.3 and 10.4); inverses have a relative error of
c n eps cond(A) (section 14.3). c = 4: a rounding is eps / 2, and there are three stages. Theory has another factor of
up to n, for rounding errors that all point the same way.
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

dtypes = st.sampled_from(DTYPES)
sizes = st.one_of(st.integers(0, 20), st.sampled_from([31, 32, 33, 48, 64, 65] + [] if SIMT else [96, 100, 128, 129]))
seeds = st.integers(0, 2**31)


def spd(
    batch: tuple[int, ...], n: int, cond: float | Tensor = 100.0, dtype: torch.dtype = torch.float64, seed: int = 0
) -> Tensor:
    """Dense, eigenvalues from 1 down to 1 / cond in even ratios: (*batch, n, n) before it is rounded to dtype."""
    generator = torch.Generator().manual_seed(seed)
    eigenvalues = torch.as_tensor(cond, dtype=torch.float64)[..., None] ** -torch.linspace(0, 1, n, dtype=torch.float64)
    a = torch.diag_embed(eigenvalues.expand(*batch, n))
    for _ in range(2):  # two reflections I - 2 v v^T
        v = torch.nn.functional.normalize(torch.randn(*batch, n, 1, generator=generator, dtype=torch.float64), dim=-2)
        a = a - 2 * v @ (v.mT @ a)
        a = a - 2 * (a @ v) @ v.mT
    return ((a + a.mT) / 2).to(dtype)


def junk_above(blocks: Tensor) -> Tensor:
    """The same lower triangles under NaN, which nothing may read."""
    return blocks.tril() + torch.full_like(blocks, NAN).triu(1)


def truth(blocks: Tensor, damping: float | Tensor = 0.0, cond: float | None = None) -> tuple[Tensor, Tensor]:
    """The inverses in float64 and the condition numbers, computed unless given."""
    a = reference.damped(blocks.cpu(), damping)
    if cond is not None or a.numel() == 0:
        return reference.inverse(a), torch.tensor(cond or 1.0)
    eigenvalues = torch.linalg.eigvalsh(a)
    return reference.inverse(a), eigenvalues[..., -1] / eigenvalues[..., 0]


def assert_is(got: Tensor, want: Tensor, cond: Tensor) -> None:
    """Relative error c n eps cond, and exact symmetry."""
    got, n = got.cpu(), want.shape[-1]
    assert got.shape == want.shape
    assert torch.equal(got, got.mT)
    error = torch.linalg.matrix_norm(got.double() - want)
    bound = 4 * n * EPS[got.dtype] * cond * torch.linalg.matrix_norm(want)
    assert bool((error <= bound).all()), f"{(error / bound).max():g} of the bound at n = {n}"


def assert_inverse(got: Tensor, blocks: Tensor, damping: float | Tensor = 0.0) -> None:
    assert_is(got, *truth(blocks, damping))


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


# ---- layouts, dampings, dtypes


def laid_out(blocks: Tensor, layout: str) -> Tensor:
    """The same values (b, n, n) in another layout of memory; of what lies between, nothing may be read or written."""
    b, n = blocks.shape[:2]
    if layout == "transposed":
        return blocks.mT.contiguous().mT
    if layout == "sliced":
        wide = torch.full((b, n + 3, n + 5), NAN, dtype=blocks.dtype, device=blocks.device)
        wide[:, 1 : n + 1, 2 : n + 2] = blocks
        return wide[:, 1 : n + 1, 2 : n + 2]
    if layout == "spread":
        wide = torch.full((2 * b, n, 2 * n), NAN, dtype=blocks.dtype, device=blocks.device)
        wide[::2, :, ::2] = blocks
        return wide[::2, :, ::2]
    if layout == "batch last":
        return blocks.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    return blocks.contiguous()


LAYOUTS = ["contiguous", "transposed", "sliced", "spread", "batch last"]
layouts = st.sampled_from(LAYOUTS)


@given(b=st.integers(0, 35), n=sizes, dtype=dtypes, layout=layouts, out_layout=layouts, seed=seeds)
def test_any_strides(b, n, dtype, layout, out_layout, seed, device, instruction_set):
    blocks = spd((b,), n, 10.0, dtype, seed).to(device)
    want, info = ops.cholesky_inverse_ex(blocks, 0.5)
    assert not info.any()
    assert_inverse(want, blocks, 0.5)
    factor, _ = ops.cholesky_factor_ex(blocks, 0.5)
    strided = laid_out(junk_above(blocks), layout)
    out = laid_out(torch.zeros_like(want), out_layout)
    got, _ = ops.cholesky_inverse_ex(strided, 0.5, out=out)
    assert got is out and torch.equal(out, want)
    got, _ = ops.cholesky_factor_ex(strided, 0.5, out=out)
    assert got is out and torch.equal(out, factor)
    ops.cholesky_inverse_ex(strided, 0.5, out=strided)
    assert torch.equal(strided, want.to(dtype))


def test_what_lies_between_strided_blocks_stays():
    wide = torch.full((8, 9, 11), 7.0)
    blocks = wide[::2, 1:6, 3:8]
    blocks.copy_(spd((4,), 5, dtype=torch.float32))
    before = wide.clone()
    ops.cholesky_inverse_ex(blocks, out=blocks)
    before[::2, 1:6, 3:8] = blocks
    assert torch.equal(wide, before)


@pytest.mark.parametrize("batch", [(), (1,), (0,), (2, 3), (2, 0, 3), (4, 1, 5), (2, 3, 2, 2)])
@pytest.mark.parametrize("n", [0, 1, 3, 40])
def test_batch_shapes(batch, n, device, instruction_set):
    blocks = spd(batch, n, dtype=torch.float32)
    for layout in (blocks, blocks.transpose(0, len(batch) - 1) if len(batch) > 1 else blocks.mT):
        got, info = ops.cholesky_inverse_ex(layout.to(device))
        assert info.shape == layout.shape[:-2] and not info.any()
        assert_inverse(got, layout)
        factor, info = ops.cholesky_factor_ex(layout.to(device))
        assert info.shape == layout.shape[:-2] and factor.shape == layout.shape


DAMPINGS = [
    ((3,), 0.25),
    ((3,), torch.tensor(0.25)),
    ((3,), torch.tensor([0.25], dtype=torch.bfloat16)),
    ((3,), torch.tensor([0.5, 0.0, 2.0])),
    ((2, 3), torch.tensor([[0.5], [2.0]], dtype=torch.float64)),
    ((2, 3), torch.arange(12.0)[::2].view(2, 3)),
    ((), torch.tensor([1e-3, 1e-2, 0.0])),  # one block, many dampings
    ((2, 1), torch.arange(1.0, 4.0)),
    ((3,), torch.tensor([2])),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "damping"), DAMPINGS)
def test_damping_broadcasts(batch, damping, dtype, device, instruction_set):
    blocks = spd(batch, 9, dtype=dtype) + torch.eye(9, dtype=dtype) / 4  # rounding to 16 bits leaves it definite
    shift = damping.double() if isinstance(damping, Tensor) else damping
    moved = damping.to(device) if isinstance(damping, Tensor) else damping
    got, info = ops.cholesky_inverse_ex(blocks.to(device), moved)
    assert_inverse(got, blocks, shift)
    assert info.shape == got.shape[:-2] and not info.any()
    factor, _ = ops.cholesky_factor_ex(blocks.to(device), moved)
    assert_factor(factor, reference.damped(blocks, shift))
    assert torch.equal(ops.cholesky_inverse(blocks.to(device), moved), got)


@pytest.mark.parametrize("n", [1, 7, 40])
def test_expanded_batches(n, device, instruction_set):
    block = spd((), n, dtype=torch.float32).to(device)
    damping = torch.arange(20) / 16
    got, _ = ops.cholesky_inverse_ex(block.expand(2, 20, n, n), damping.to(device))
    assert_inverse(got, block.expand(2, 20, n, n), damping)


@pytest.mark.parametrize("asked", [None, *DTYPES])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype, asked, device, instruction_set):
    """16 bits are computed in float32, the wider of input and result otherwise; rounded once at the end."""
    blocks = spd((5,), 12, 10.0, dtype).to(device)
    got, _ = ops.cholesky_inverse_ex(blocks, 0.1, dtype=asked)
    computed = torch.float64 if torch.float64 in (dtype, asked) else torch.float32
    wide, _ = ops.cholesky_inverse_ex(blocks.to(computed), 0.1)
    assert got.dtype == (asked or computed)
    assert torch.equal(got, wide.to(got.dtype))
    out = torch.empty_like(got)
    assert ops.cholesky_inverse_ex(blocks, 0.1, out=out)[0] is out and torch.equal(out, got)


def test_offsets_past_2_to_the_31():
    """The memory between the blocks is never touched."""
    far = torch.empty(2**31 + 64, dtype=torch.bfloat16).as_strided((2, 3, 3), (2**31 + 5, 4, 1))
    far.copy_(spd((2,), 3, 4.0, torch.bfloat16))
    assert torch.equal(ops.cholesky_inverse(far), ops.cholesky_inverse(far.contiguous()))
    assert torch.equal(ops.cholesky_factor(far), ops.cholesky_factor(far.contiguous()))


# ---- factors and solves


def assert_factor(got: Tensor, a: Tensor) -> None:
    lower = got.cpu().double()
    assert torch.equal(lower, lower.tril()) and bool((lower.diagonal(dim1=-2, dim2=-1) > 0).all())
    residual = torch.linalg.matrix_norm(lower @ lower.mT - a)
    assert bool((residual <= 4 * a.shape[-1] * EPS[got.dtype] * torch.linalg.matrix_norm(a)).all())


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


# ---- blocks that fail


def indefinite(n: int, pivot: int, dtype: torch.dtype) -> Tensor:
    """L D L^T, D = I but for D_pivot = -1: the leading minor of order pivot + 1 is the first that is not positive."""
    lower = torch.randn(n, n, generator=torch.Generator().manual_seed(pivot), dtype=torch.float64).tril(-1) / max(1, n)
    lower = lower + torch.eye(n, dtype=torch.float64)
    signs = torch.ones(n, dtype=torch.float64)
    signs[pivot] = -1
    return ((lower * signs) @ lower.mT).to(dtype)


@functools.cache
def good_and_bad(n: int, dtype: torch.dtype) -> tuple[list[int], Tensor, Tensor]:
    """Pivots; good blocks; and the same with every second block failing, at these pivots in turn."""
    some = {0, 1, 15, 16, 31, 63, 64, 127, 128, n - 2, n - 1}
    pivots = [p for p in range(n) if p in some or n <= (16 if SIMT else 40)]
    good = spd((2 * len(pivots) + 1,), n, 10.0, dtype)
    mixed = good.clone()
    mixed[1::2] = torch.stack([indefinite(n, p, dtype) for p in pivots])
    return pivots, good, mixed


@pytest.mark.parametrize("op", ["inverse", "factor"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n", [1, 2, 5, 16, 33] if SIMT else [1, 2, 5, 16, 17, 33, 40, 64, 70, 130, 200])
def test_failure_at_every_pivot_in_the_middle_of_good_blocks(n, dtype, op, device, instruction_set):
    pivots, good, mixed = good_and_bad(n, dtype)
    run = getattr(ops, f"cholesky_{op}_ex")
    want, _ = run(good.to(device))
    got, info = run(mixed.to(device))
    assert info[::2].eq(0).all() and info[1::2].tolist() == [p + 1 for p in pivots]
    assert bool(got[1::2].isnan().all())
    assert torch.equal(got[::2], want[::2])
    if n <= 5:
        assert [reference.info(block) for block in mixed[1::2]] == info[1::2].tolist()


@pytest.mark.parametrize("op", ["inverse", "factor"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [NAN, float("inf"), -float("inf")])
@pytest.mark.parametrize("n", [1, 7, 40, 70])
def test_blocks_that_are_not_finite(n, value, dtype, op, device, instruction_set):
    run = getattr(ops, f"cholesky_{op}_ex")
    blocks = spd((20,), n, 4.0, dtype) + torch.eye(n, dtype=dtype)
    clean, _ = run(blocks.to(device), 1.0)
    blocks[3, n - 1, 0], blocks[11, n // 2, n // 2] = value, value
    if n > 1:
        blocks[5, 0, 1] = value  # above the diagonal
    damping = torch.ones(20)
    damping[17] = value
    got, info = run(blocks.to(device), damping.to(device))
    bad = torch.zeros(20, dtype=torch.bool)
    bad[[3, 11, 17]] = True
    assert info.tolist() == [-1 if b else 0 for b in bad]
    assert bool(got[bad].isnan().all()) and torch.equal(got[~bad], clean[~bad])
    assert run(blocks.to(device), value)[1].tolist() == [-1] * 20


def test_zero_pivots_and_dampings(device, instruction_set):
    for dtype in FLOATS:
        zero = torch.zeros(3, 4, 4, dtype=dtype, device=device)
        got, info = ops.cholesky_inverse_ex(zero, torch.tensor([0.0, 0.5, -1.0], device=device))
        assert info.tolist() == [1, 0, 1]
        torch.testing.assert_close(got[1], 2 * torch.eye(4, dtype=dtype, device=device))


@pytest.mark.parametrize("dtype", FLOATS)
def test_raising_forms_say_what_failed(dtype, device):
    blocks = spd((2, 3), 5, dtype=dtype)
    blocks[1, 0] = indefinite(5, 2, dtype)
    blocks[1, 2, 4, 1] = NAN
    damping = torch.tensor([[1e-3], [1e-4]])
    failure = r"block \(1, 0\): the leading minor of order 3 is not positive, with damping 0.0001; .* 2 of 6"
    for op in (ops.cholesky_inverse, ops.cholesky_factor):
        with pytest.raises(torch.linalg.LinAlgError, match=f"^{op.__name__}: {failure}$"):
            op(blocks.to(device), damping.to(device))
        with pytest.raises(torch.linalg.LinAlgError, match=r": block \(1,\): not finite, with damping 0.5; .* 1 of 2$"):
            op(blocks[1, 1:].to(device), 0.5)
        with pytest.raises(torch.linalg.LinAlgError, match=r": the block: not finite, with damping nan; .* 1 of 1$"):
            op(blocks[0, 0].to(device), NAN)


# ---- lists of batches


MIXED = [(3, 5), (0, 7), (20, 33), (1, 64), (2, 0), (17, 16), (2, 100), (40, 1), (1, 3)]


def test_grouped_is_each_batch_alone(device, instruction_set):
    batches = [spd((b,), n, 10.0, DTYPES[i % 4], i).to(device) for i, (b, n) in enumerate(MIXED)]
    dampings = [0.1, torch.full((0,), 0.1), torch.linspace(0.1, 1, 20), 0.5, 0.0, torch.tensor(0.3), 1, 0.2, 0.0]
    dampings = [d.to(device) if isinstance(d, Tensor) else d for d in dampings]
    inverses, infos = ops.grouped_cholesky_inverse_ex(batches, dampings)
    for blocks, damping, got, info in zip(batches, dampings, inverses, infos, strict=True):
        want, want_info = ops.cholesky_inverse_ex(blocks, damping)
        assert got.dtype == want.dtype and torch.equal(got, want) and torch.equal(info, want_info)
    one, _ = ops.grouped_cholesky_inverse_ex(batches, 0.25, dtype=torch.float64)
    for blocks, got in zip(batches, one, strict=True):
        assert torch.equal(got, ops.cholesky_inverse_ex(blocks, 0.25, dtype=torch.float64)[0])
    assert ops.grouped_cholesky_inverse_ex([], 0.1) == ([], [])


def test_grouped_failures_stay_where_they_are(device, instruction_set):
    batches = [spd((4,), n, dtype=torch.float32) for n in (3, 40, 17)]
    batches[1][2] = indefinite(40, 30, torch.float32)
    batches[2][0, 1, 0] = NAN
    inverses, infos = ops.grouped_cholesky_inverse_ex([b.to(device) for b in batches], 0.0)
    assert [info.tolist() for info in infos] == [[0] * 4, [0, 0, 31, 0], [-1, 0, 0, 0]]
    for blocks, got, info in zip(batches, inverses, infos, strict=True):
        good = info.cpu() == 0
        assert_inverse(got.cpu()[good], blocks[good])
        assert bool(got.cpu()[~good].isnan().all())


@given(
    b=st.integers(1, 40),
    n=st.sampled_from([1, 4, 16, 33] if SIMT else [1, 4, 16, 33, 70, 140]),
    dtype=st.sampled_from(FLOATS),
    wide=st.booleans(),
    seed=seeds,
)
def test_only_the_blocks_asked_for(b, n, dtype, wide, seed, device, instruction_set):
    """Of two batches, some blocks: the others keep what out holds, and their info is 0 whatever they are."""
    b = min(b, 5) if n > 33 else b
    generator = torch.Generator().manual_seed(seed)
    only = torch.randint(0, 3, (b + 2,), generator=generator, dtype=torch.int32) - 1
    blocks = [spd((b,), n, 10.0, dtype, seed).to(device), spd((2,), 3, 10.0, dtype, seed).to(device)]
    blocks[0][only[:b].to(device) == 0] = -1.0
    computed = torch.float64 if wide else dtype
    out = [torch.full_like(x, 7.0, dtype=computed) for x in blocks]
    damping = [torch.zeros(1, dtype=torch.float64, device=device)] * 2
    for op in (torch.ops.mfac_kernels.cholesky_inverse_, torch.ops.mfac_kernels.cholesky_factor_):
        full = [torch.empty_like(x) for x in out]
        op(full, blocks, damping)
        info = op(out, blocks, damping, only.to(device))
        assert not info.any()
        for got, want, chosen in zip(out, full, only.to(device).split([b, 2]), strict=True):
            assert torch.equal(got[chosen != 0], want[chosen != 0])
            assert bool((got[chosen == 0] == 7).all())


# ---- the robust form


def test_robust_changes_nothing_where_nothing_fails(device, instruction_set):
    batches = [spd((b,), n, 10.0, DTYPES[i % 4], i).to(device) for i, (b, n) in enumerate(MIXED)]
    result = ops.robust_cholesky_inverse(batches, 0.1)
    inverses, _ = ops.grouped_cholesky_inverse_ex(batches, 0.1)
    for got, want, attempts, damping in zip(*result[:1], inverses, *result[1:], strict=True):
        assert torch.equal(got, want) and not attempts.any() and bool((damping == 0.1).all())
        assert attempts.shape == damping.shape == want.shape[:-2]
    assert ops.robust_cholesky_inverse([]) == ([], [], [])


def test_robust_repeats_what_fails(device, instruction_set):
    n, eps = 12, torch.finfo(torch.float32).eps
    blocks = spd((6,), n, 4.0, torch.float32)
    # 1e-6 of damping is enough in exact arithmetic; float32 rounds 1 + 1e-9 to 1
    blocks[1] = torch.ones(n, n)
    damping = torch.full((6,), 1e-9, dtype=torch.float64)
    blocks[2] = spd((), n, 4.0, torch.float32) - 0.26 * torch.eye(n)  # eigenvalue -0.01: the damping has to grow to it
    blocks[3, 2, 1] = NAN
    blocks[4] = indefinite(n, 5, torch.float32)  # eigenvalue about -1: beyond the bound
    damping[5] = 0.3
    asked = damping.clone()
    other = spd((2,), 5, 10.0)
    (got, also), (attempts, zero), (used, _) = ops.robust_cholesky_inverse(
        [blocks.to(device), other.to(device)], [damping.to(device), 0.0], bound=0.5
    )
    attempts, used, got = attempts.cpu(), used.cpu(), got.cpu()
    assert attempts.tolist()[:2] == [0, 1] and attempts.tolist()[3:] == [-1, -2, 0]
    assert torch.equal(used[[0, 1, 5]], asked[[0, 1, 5]])
    k = int(attempts[2]) - 1
    mean = float(blocks[2].double().diagonal().abs().mean())
    lowest = -float(torch.linalg.eigvalsh(blocks[2].double())[0])
    assert float(used[2]) == pytest.approx(max(10 * 1e-9, eps * mean) * 10 ** (k - 1), rel=1e-12)
    assert lowest < float(used[2]) <= 10 * lowest
    assert float(used[4]) == pytest.approx(0.5 * float(blocks[4].double().diagonal().abs().mean()))
    assert bool(got[[3, 4]].isnan().all())
    assert_inverse(got[[0, 5]], blocks[[0, 5]], damping[[0, 5]])
    torch.testing.assert_close(got[1].double(), reference.inverse(blocks[1], 1e-9), rtol=1e-5, atol=1)
    want = reference.inverse(blocks[2], float(used[2]))
    torch.testing.assert_close(got[2].double(), want, rtol=1e-6, atol=1e-6 * float(want.abs().max()))
    assert not zero.any()
    assert_inverse(also, other)


def test_robust_from_no_damping(device):
    """Damping 0 grows from eps of the mean diagonal; a block that is zero can only be told."""
    blocks = torch.ones(3, 6, 6)
    blocks[1] = 0
    blocks[2] *= 1e10
    result = ops.robust_cholesky_inverse([blocks.to(device)], 0.0)
    assert result.attempts[0].tolist() == [2, -2, 2]
    assert result.dampings[0].cpu() == pytest.approx(
        torch.finfo(torch.float32).eps * torch.tensor([1.0, 0.0, 1e10]).double()
    )
    want = reference.inverse(blocks[0], float(result.dampings[0][0]))
    torch.testing.assert_close(result.inverses[0][0].double(), want, rtol=1e-6, atol=0)  # float64, rounded at the end


# ---- the block diagonal


@given(
    dim=st.integers(0, 40), size=st.integers(1, 45), k=st.integers(0, 5), lead=st.sampled_from([(), (2,)]), seed=seeds
)
def test_block_diagonal(dim, size, k, lead, seed, device):
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(dim, dim, generator=generator, dtype=torch.float64).to(device)
    blocks = ops.diagonal_blocks(matrix, size)
    assert len(blocks) <= 2 and all(
        b.untyped_storage().data_ptr() == matrix.untyped_storage().data_ptr() for b in blocks
    )
    masked = torch.block_diag(*(block for batch in blocks for block in batch)).view(dim, dim)
    group = torch.arange(dim, device=device) // size
    assert torch.equal(masked, torch.where(group[:, None] == group, matrix, 0.0))
    x = torch.randn(*lead, dim, k, generator=generator, dtype=torch.float64).to(device)
    bound = 2 * (dim + 1) * EPS[torch.float64] * (masked.abs() @ x.abs())
    assert bool(((ops.block_diagonal_matmul(blocks, x) - masked @ x).abs() <= bound).all())
    right = ops.matmul_block_diagonal(x.mT, blocks)
    assert right.shape == x.mT.shape and bool(((right - x.mT @ masked).abs().mT <= bound + 1).all())


def test_block_diagonal_of_a_batch():
    matrices = torch.randn(3, 2, 7, 7)
    whole, ragged = ops.diagonal_blocks(matrices, 3)
    assert whole.shape == (3, 2, 2, 3, 3) and ragged.shape == (3, 2, 1, 1, 1)
    assert torch.equal(whole[:, :, 1], matrices[..., 3:6, 3:6]) and torch.equal(
        ragged[..., 0, 0, 0], matrices[..., 6, 6]
    )


def test_inverse_of_the_block_diagonal_in_place(device):
    """What K-FAC with channel groups does: cut, invert, apply; the rest of the factor stays as it was."""
    factor = spd((), 70, dtype=torch.float32)
    moved = factor.clone().to(device)
    blocks = ops.diagonal_blocks(moved, 32)
    for batch in blocks:
        ops.cholesky_inverse(batch, 0.01, out=batch)
    for start in (0, 32, 64):
        part = slice(start, start + 32)
        assert_inverse(moved[part, part], factor[part, part], 0.01)
    assert torch.equal(moved.cpu()[:32, 32:], factor[:32, 32:])
    x = torch.randn(70, 3)
    product = ops.block_diagonal_matmul(blocks, x.to(device))
    want = torch.block_diag(*(block for batch in blocks for block in batch)) @ x.to(device)
    torch.testing.assert_close(product, want)


# ---- derivatives, compilation, threads


def symmetric(root: Tensor) -> Tensor:
    return root @ root.mT / root.shape[-1] + torch.eye(root.shape[-1], dtype=root.dtype)


@pytest.mark.parametrize("shape", [(3, 3), (2, 1, 4, 4), (2, 0, 0), (2, 1, 1)])
@pytest.mark.parametrize("damped", [(), (2,), (1, 3)])
def test_gradients(shape, damped):
    if len(shape) == 3 and damped == (1, 3) and shape[0] == 2:
        damped = (3, 1)
    root = torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    damping = torch.full(damped, 0.3, dtype=torch.float64, requires_grad=True)

    def inverse(root: Tensor, damping: Tensor) -> Tensor:
        return ops.cholesky_inverse_ex(symmetric(root), damping)[0]

    assert torch.autograd.gradcheck(inverse, (root, damping))
    assert torch.autograd.gradgradcheck(inverse, (root, damping))


def test_gradient_is_symmetric_and_that_of_torch():
    a = spd((4,), 6).requires_grad_()
    weights = torch.randn(4, 6, 6, dtype=torch.float64)
    (got,) = torch.autograd.grad((ops.cholesky_inverse(a) * weights).sum(), a)
    (want,) = torch.autograd.grad((torch.linalg.inv(a) * weights).sum(), a)
    want = (want + want.mT) / 2
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11 * float(want.abs().max()))
    torch.testing.assert_close(got, got.mT, rtol=1e-13, atol=1e-13 * float(want.abs().max()))


def test_gradients_of_lists_and_dtypes():
    batches = [
        spd((2,), n, 4.0, dtype).requires_grad_(n != 3) for n, dtype in ((3, torch.float32), (5, torch.bfloat16))
    ]
    damping = torch.tensor(0.1, requires_grad=True)
    inverses, infos = ops.grouped_cholesky_inverse_ex(batches, damping)
    assert not any(info.requires_grad for info in infos)
    sum(inverse.sum() for inverse in inverses).backward()
    assert batches[0].grad is None and batches[1].grad.dtype == torch.bfloat16
    want = -sum(reference.inverse(b.detach(), 0.1).sum(-1).square().sum() for b in batches)
    torch.testing.assert_close(damping.grad.double(), want, rtol=1e-5, atol=0)


def test_what_is_not_differentiable_says_so():
    a = spd((2,), 3).requires_grad_()
    for op, arguments in (
        (ops.cholesky_factor_ex, (a,)),
        (ops.cholesky_solve, (a.detach(), a)),
        (ops.robust_cholesky_inverse, ([a],)),
    ):
        with pytest.raises(RuntimeError, match=f"^{op.__name__}: not differentiable"):
            op(*arguments)
        with torch.no_grad():
            op(*arguments)
    with pytest.raises(RuntimeError, match="cholesky_inverse_ex: out: expected none where a gradient is required"):
        ops.cholesky_inverse_ex(a, out=torch.empty(2, 3, 3).double())


def samples(dtype: torch.dtype, device: str = "cpu") -> list[tuple[str, tuple[object, ...]]]:
    blocks = [spd((4,), 3, 4.0, dtype).to(device), spd((2, 1), 20, 4.0, dtype).mT.to(device)]
    computed = torch.float64 if dtype == torch.float64 else torch.float32
    out = [torch.zeros_like(b, dtype=computed) for b in blocks]
    damping = [torch.ones(4, device=device).double(), torch.ones(1, device=device).double()]
    only = torch.tensor([1, 0, 0, 2, -1, 0], dtype=torch.int32, device=device)
    factors = [ops.cholesky_factor(b.to(computed)) for b in blocks]
    x = [torch.ones(*f.shape[:-1], 2, dtype=computed, device=device) for f in factors]
    return [
        ("cholesky_inverse_", (out, blocks, damping)),
        ("cholesky_inverse_", (out, blocks, damping, only)),
        ("cholesky_factor_", (out, blocks, damping)),
        ("cholesky_factor_", (out, blocks, damping, only)),
        ("cholesky_solve_", (x, factors)),
    ]


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype, device):
    for name, arguments in samples(dtype, device):
        torch.library.opcheck(getattr(torch.ops.mfac_kernels, name).default, arguments)


def test_compiles_to_one_graph(device):
    def everything(a: Tensor, b: Tensor, bad: Tensor, damping: Tensor) -> list[Tensor]:
        inverses, infos = ops.grouped_cholesky_inverse_ex([a, b], [damping, 0.5])
        factor, info = ops.cholesky_factor_ex(a, 0.1)
        robust = ops.robust_cholesky_inverse([bad, b], 0.0)
        blocks = ops.diagonal_blocks(b[0], 3)
        product = ops.block_diagonal_matmul(blocks, b[0])
        inverse, _ = ops.cholesky_inverse_ex(a, damping, out=torch.empty_like(a))
        tail = [inverse, product, ops.cholesky_solve(factor, a), factor, info]
        return [*inverses, *infos, *robust.inverses, *robust.attempts, *robust.dampings, *tail]

    a, b = spd((4,), 5, dtype=torch.float32).to(device), spd((2,), 7, 4.0).to(device)
    bad = torch.stack([torch.ones(4, 4), torch.eye(4), torch.zeros(4, 4)]).to(device)
    damping = torch.tensor([0.1, 0.2, 0.3, 0.0], device=device)
    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(a, b, bad, damping), everything(a, b, bad, damping), strict=True):
        assert torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0))


def test_gradients_compile_to_one_graph(device):
    def loss(a: Tensor, damping: Tensor) -> Tensor:
        inverse, _ = ops.cholesky_inverse_ex(a, damping)
        return inverse.square().sum()

    a, damping = spd((4,), 5).to(device).requires_grad_(), torch.tensor(0.1, device=device).double().requires_grad_()
    want = torch.autograd.grad(loss(a, damping), (a, damping))
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(a, damping), (a, damping))
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", FLOATS)
def test_same_bits_for_any_number_of_threads(dtype, device, threads, instruction_set):
    shapes = [(40, 16), (5, 33), (2, 64), (1, 100)] if SIMT else [(200, 16), (40, 33), (20, 64), (5, 130), (2, 300)]
    batches = [spd((b,), n, 100.0, dtype).to(device) for b, n in shapes]

    def results() -> list[Tensor]:
        inverses, infos = ops.grouped_cholesky_inverse_ex(batches, 0.01)
        factors = [ops.cholesky_factor(batch, 0.01) for batch in batches]
        return [*inverses, *infos, *factors, *(ops.cholesky_solve(f, b) for f, b in zip(factors, batches, strict=True))]

    threads(1)
    once = results()
    for count in (1, 2, 3):
        threads(count)
        for got, want in zip(results(), once, strict=True):
            assert torch.equal(got, want)


# ---- bad arguments


B = torch.eye(3).repeat(2, 1, 1)
OUT = torch.zeros(2, 3, 3)
D = torch.ones(2, dtype=torch.float64)
ANY = "expected float32, float64, bfloat16 or float16, got"
DAMPED = [
    (([OUT, OUT], [B], [D]), r"out: expected 1 tensors, as blocks has, got 2"),
    (([OUT], [B], []), r"damping: expected 1 tensors, as blocks has, got 0"),
    (([OUT], [B[0, 0]], [D]), r"blocks\[0\]: expected shape \(..., n, n\), got \(3,\)"),
    (([OUT, OUT], [B, B[:, :2]], [D, D]), r"blocks\[1\]: expected shape \(..., n, n\), got \(2, 2, 3\)"),
    (([OUT], [B.int()], [D]), rf"blocks(\[0\])?: {ANY} Int"),
    (([OUT.bfloat16()], [B], [D]), r"out\[0\]: expected float32 or float64, got BFloat16"),
    (([OUT], [B.double()], [D]), r"out\[0\]: expected Double, as blocks\[0\] is, got Float"),
    (([OUT[:1]], [B], [D]), r"out\[0\]: expected shape \(2, 3, 3\), got \(1, 3, 3\)"),
    (([OUT[:1].expand(2, 3, 3)], [B], [D]), r"out\[0\]: expected distinct elements, got stride 0 in dimension 0"),
    (([OUT], [B], [D.float()]), r"damping\[0\]: expected Double, got Float"),
    (([OUT], [B], [D.repeat(2)]), r"damping\[0\]: expected 1 or 2 values, got 4"),
    (([OUT], [B], [D.repeat(2)[::2]]), r"damping\[0\]: expected a contiguous tensor"),
    (([OUT], [B], [D], torch.ones(2)), r"only: expected Int, got Float"),
    (([OUT], [B], [D], torch.ones(3).int()), r"only: expected shape \(2,\), got \(3,\)"),
]
BAD = [
    *(("cholesky_inverse_", *case) for case in DAMPED),
    *(("cholesky_factor_", *case) for case in DAMPED),
    ("cholesky_solve_", ([B, B], [B]), r"x: expected 1 tensors, as factors has, got 2"),
    ("cholesky_solve_", ([B], [B[:, :, :2]]), r"factors\[0\]: expected shape \(..., n, n\), got \(2, 3, 2\)"),
    ("cholesky_solve_", ([B], [B.half()]), r"factors\[0\]: expected float32 or float64, got Half"),
    ("cholesky_solve_", ([B.double()], [B]), r"x\[0\]: expected Float, got Double"),
    (
        "cholesky_solve_",
        ([B[:, :2]], [B]),
        r"x\[0\]: expected right-hand sides \(..., n, k\) of factors of shape \(2, 3, 3\), got \(2, 2, 3\)",
    ),
    ("cholesky_solve_", ([B[..., :1].expand(2, 3, 4)], [B]), r"x\[0\]: expected distinct elements, got stride 0"),
]


def moved(arguments: object, device: str) -> object:
    if isinstance(arguments, (list, tuple)):
        return type(arguments)(moved(a, device) for a in arguments)
    if not isinstance(arguments, Tensor):
        return arguments
    return torch.empty_strided(arguments.shape, arguments.stride(), dtype=arguments.dtype, device=device)


@pytest.mark.parametrize("fake", [False, True], ids=["real", "fake"])
@pytest.mark.parametrize(("name", "arguments", "message"), BAD, ids=lambda v: v if isinstance(v, str) else "")
def test_errors_name_argument_expected_and_got(name, arguments, message, fake):
    if fake:
        arguments = moved(arguments, "meta")
    before = OUT.clone(), B.clone()
    with pytest.raises(RuntimeError, match=f"^{name}: {message}"):
        getattr(torch.ops.mfac_kernels, name)(*arguments)
    assert torch.equal(OUT, before[0]) and torch.equal(B, before[1])


def test_out_may_not_be_a_part_of_blocks():
    memory = torch.eye(4).repeat(5, 1, 1)
    before = memory.clone()
    with pytest.raises(
        RuntimeError, match=r"^cholesky_inverse_: out\[0\]: expected the memory of blocks\[0\] or memory apart"
    ):
        ops.cholesky_inverse_ex(memory[:4], out=memory[1:])
    assert torch.equal(memory, before)


WRONG = [
    (
        lambda: ops.cholesky_inverse_ex(B[0, 0]),
        r"cholesky_inverse_ex: blocks: expected shape \(..., n, n\), got \(3,\)",
    ),
    (lambda: ops.cholesky_inverse(B.bool()), rf"cholesky_inverse_ex: blocks: {ANY} torch.bool"),
    (
        lambda: ops.cholesky_inverse_ex(B, D.repeat(2)),
        r"cholesky_inverse_ex: damping: expected a batch that broadcasts with \(2,\), got \(4,\)",
    ),
    (lambda: ops.cholesky_inverse_ex(B, 0.1, dtype=torch.int32), rf"cholesky_inverse_ex: dtype: {ANY} Int"),
    (
        lambda: ops.cholesky_inverse_ex(B, out=OUT[0]),
        r"cholesky_inverse_ex: out: expected shape \(2, 3, 3\), got \(3, 3\)",
    ),
    (
        lambda: ops.cholesky_factor_ex(B, out=OUT, dtype=torch.float64),
        r"cholesky_factor_ex: dtype: expected Float, as out is, got Double",
    ),
    (lambda: ops.grouped_cholesky_inverse_ex([B], [0.1, 0.2]), r"damping: expected 1, one per batch, got 2"),
    (
        lambda: ops.grouped_cholesky_inverse_ex([B, B[0, 0]], 0.1),
        r"batches\[1\]: expected shape \(..., n, n\), got \(3,\)",
    ),
    (lambda: ops.cholesky_solve(B, B[0, 0]), r"cholesky_solve: b: expected shape \(..., n, k\), got \(3,\)"),
    (
        lambda: ops.cholesky_solve(B, B.repeat(2, 1, 1)),
        r"cholesky_solve: b: expected a batch that broadcasts with \(2,\)",
    ),
    (lambda: ops.robust_cholesky_inverse([B], growth=1.0), r"growth: expected a finite number above 1, got 1"),
    (lambda: ops.robust_cholesky_inverse([B], bound=0.0), r"bound: expected a positive finite number, got 0"),
    (lambda: ops.diagonal_blocks(B, 0), r"diagonal_blocks: block_size: expected at least 1, got 0"),
    (
        lambda: ops.diagonal_blocks(B[:, :2], 2),
        r"diagonal_blocks: matrix: expected shape \(..., D, D\), got \(2, 2, 3\)",
    ),
    (lambda: ops.block_diagonal_matmul(B[0], B[0]), r"blocks\[0\]: expected shape \(g, s, s\), got \(3, 3\)"),
    (lambda: ops.block_diagonal_matmul(B, B[0]), r"x: expected 6 rows, as the blocks have, got shape \(3, 3\)"),
]


@pytest.mark.parametrize(("call", "message"), WRONG)
def test_wrappers_say_what_is_wrong(call, message):
    with pytest.raises(RuntimeError, match=message):
        call()


def test_damping_may_lie_in_out(device):
    """A float64 damping is not copied for its type."""
    blocks = torch.eye(4, dtype=torch.float64).repeat(50, 1, 1) * torch.arange(1, 51)[:, None, None]
    blocks = blocks.to(device)
    want = ops.cholesky_inverse(blocks, float(blocks[0, 0, 0]))
    assert torch.equal(ops.cholesky_inverse(blocks, blocks[0, 0, 0], out=blocks), want)


def test_one_block_with_many_dampings_is_no_part_of_out(device):
    blocks = torch.eye(4).repeat(5, 1, 1).to(device)
    with pytest.raises(RuntimeError, match="or memory apart from it, got a part of it"):
        ops.cholesky_inverse(blocks[0], torch.ones(5, device=device), out=blocks)
    assert torch.equal(blocks.cpu(), torch.eye(4).repeat(5, 1, 1))


@pytest.mark.parametrize("growth", [1e160, 1e308])
def test_dampings_that_grow_without_measure(growth, device):
    bad = torch.diag(torch.tensor([1.0, -1e-3])).to(device)
    found = ops.robust_cholesky_inverse([bad[None]], 1e-8, growth=growth)
    assert bool(found.inverses[0].isfinite().all()) or int(found.attempts[0]) < 0
