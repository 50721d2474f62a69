"""Factors of inverses, H^-1 = U^T U, against float64 and against the three calls that they stand for.

Bounds. U is the inverse of a Cholesky factor, whose relative error is c n eps cond (Higham, Accuracy and Stability of
Numerical Algorithms, section 10.3); so is that of U^T U = H^-1 (section 14.3). c = 4, as for the inverse.
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
SIZES = [*range(10), 12, 15, 16, 17, 31, 33, 40, 41, 57, 63, 64, 65, 100, 127, 128, 129] + ([] if SIMT else [200, 300])
CONDITION = 100.0

uppers = pytest.mark.parametrize("upper", [True, False])


def spd(*batch: int, n: int, dtype: torch.dtype = torch.float64, cond: float = CONDITION, seed: int = 0) -> Tensor:
    """(*batch, n, n), eigenvalues from 1 down to 1 / cond."""
    generator = torch.Generator().manual_seed(seed + n)
    q = torch.linalg.qr(torch.randn(*batch, n, n, generator=generator, dtype=torch.float64))[0]
    return (q * cond ** -torch.linspace(0, 1, n, dtype=torch.float64) @ q.mT).to(dtype)


def junk_above(blocks: Tensor) -> Tensor:
    """The same lower triangles under NaN, which nothing may read."""
    return blocks.tril() + torch.full_like(blocks, NAN).triu(1)


def assert_near(got: Tensor, want: Tensor, eps: float, cond: float | Tensor = CONDITION) -> None:
    error, scale = torch.linalg.matrix_norm(got.cpu().double() - want), torch.linalg.matrix_norm(want)
    assert bool((error <= 4 * want.shape[-1] * eps * cond * scale).all()), f"{(error / scale / eps).max():g} eps"


def assert_factor(
    got: Tensor, blocks: Tensor, damping: float | Tensor = 0.0, upper: bool = True, cond: float | Tensor = CONDITION
) -> None:
    got = got.cpu()
    assert torch.equal(got, got.triu() if upper else got.tril())
    assert bool((got.diagonal(dim1=-2, dim2=-1) > 0).all())
    assert_near(got, reference.inverse_factor(blocks, damping, upper), EPS[got.dtype], cond)


@functools.cache
def of_size(n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Blocks, up to 64 enough for kernels that interleave them; U, L and the inverse."""
    blocks = spd(2 if SIMT or n > 64 else 17, n=n, dtype=dtype)
    factors = (reference.inverse_factor(blocks, upper=upper) for upper in (True, False))
    return blocks, *factors, reference.inverse(blocks)


@uppers
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n", SIZES)
def test_every_size(n, dtype, upper, device, instruction_set):
    blocks, above, below, inverse = of_size(n, dtype)
    for count in {2, len(blocks)}:
        got, info = ops.cholesky_inverse_factor_ex(junk_above(blocks[:count]).to(device), upper=upper)
        got = got.cpu()
        assert got.dtype == dtype and info.dtype == torch.int32 and info.shape == (count,) and not info.any()
        assert torch.equal(got, got.triu() if upper else got.tril())
        cond = 1.1 * CONDITION  # which rounding has changed
        assert_near(got, (above if upper else below)[:count], EPS[dtype], cond)
        assert_near(got.double().mT @ got.double(), inverse[:count], EPS[dtype], cond)


@pytest.mark.skipif(SIMT, reason="hours in the interpreter; the kernel is that of 129")
@pytest.mark.parametrize("dtype", FLOATS)
def test_size_2049(dtype, device):
    """By a team of threads: U^T U A = I up to c n eps cond."""
    n, generator = 2049, torch.Generator().manual_seed(0)
    v = torch.nn.functional.normalize(torch.randn(n, 1, generator=generator, dtype=torch.float64), dim=0)
    blocks = (torch.eye(n, dtype=torch.float64) - 0.99 * v @ v.mT).to(dtype)  # condition 100
    factor = ops.cholesky_inverse_factor(blocks.to(device)).cpu()
    assert torch.equal(factor, factor.triu())
    residual = factor.double().mT @ (factor.double() @ blocks.double()) - torch.eye(n, dtype=torch.float64)
    assert float(torch.linalg.matrix_norm(residual)) <= 4 * n * EPS[dtype] * CONDITION * n**0.5


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n", [5, 64, 130] if SIMT else [5, 64, 300])
def test_equals_the_three_calls(n, dtype, device, instruction_set):
    a = spd(3, n=n, dtype=dtype).to(device)
    three = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(a)), upper=True)
    want = reference.inverse_factor(a.cpu())
    assert_near(ops.cholesky_inverse_factor(a), want, EPS[dtype], 1.1 * CONDITION)
    assert_near(three, want, EPS[dtype], 2.2 * CONDITION)  # it rounds twice


@given(
    b=st.integers(0, 20),
    n=st.sampled_from([0, 1, 2, 5, 16, 33] + ([] if SIMT else [70, 140])),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["contiguous", "transposed", "spread", "batch last"]),
    out_layout=st.sampled_from(["contiguous", "transposed", "spread", "batch last"]),
    upper=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_strides(b, n, dtype, layout, out_layout, upper, seed, device, instruction_set):
    blocks = spd(b, n=n, dtype=dtype, cond=10.0, seed=seed).to(device)
    want, info = ops.cholesky_inverse_factor_ex(blocks, 0.5, upper=upper)
    assert not info.any()
    assert_factor(want, blocks.cpu(), 0.5, upper, 3.0)

    def laid_out(values: Tensor, how: str) -> Tensor:
        if how == "transposed":
            return values.mT.contiguous().mT
        if how == "spread":
            wide = torch.full((2 * b, n + 3, 2 * n), NAN, dtype=values.dtype, device=device)
            wide[::2, 3:, ::2] = values
            return wide[::2, 3:, ::2]
        return values.permute(1, 2, 0).contiguous().permute(2, 0, 1) if how == "batch last" else values.clone()

    strided = laid_out(junk_above(blocks), layout)
    out = laid_out(torch.zeros_like(want), out_layout)
    got, _ = ops.cholesky_inverse_factor_ex(strided, 0.5, upper=upper, out=out)
    assert got is out and torch.equal(out, want)
    ops.cholesky_inverse_factor_ex(strided, 0.5, upper=upper, out=strided)
    assert torch.equal(strided, want.to(dtype))


@pytest.mark.parametrize("n", [130, 300])
def test_in_place_between_other_blocks(n, device):
    """Blocks too large for one thread block are read and written by many: in place, next to memory that stays."""
    memory = torch.full((3, n, n), 7.0, device=device)
    memory[1] = junk_above(spd(n=n, dtype=torch.float32)).to(device)
    want, _ = ops.cholesky_inverse_factor_ex(memory[1])
    ops.cholesky_inverse_factor_ex(memory[1], out=memory[1])
    assert torch.equal(memory[1], want) and bool((memory[::2] == 7).all())


# ---- dampings, dead rows


def gptq(h: Tensor, damping: float) -> Tensor:
    """As GPTQ's code has it, in float64."""
    h = h.double().clone()
    dead = h.diagonal() == 0
    h[dead, dead] = 1
    h.diagonal().add_(damping * h.diagonal().mean())
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 4, 20, 70])
def test_dead_rows_and_relative_damping_are_those_of_gptq(n, dtype, device, instruction_set):
    x = torch.randn(2, 3 * n + 1, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    x[..., ::3] = 0
    x[1] = 0  # a layer that was never active
    h = (x.mT @ x / len(x[0])).to(dtype)
    before = h.clone()
    want = torch.stack([gptq(block, 0.01) for block in h])
    dead = h.diagonal(dim1=-2, dim2=-1) == 0
    assert bool(dead[:, ::3].all())
    cond = 1e3  # 1 / 0.01, times what the samples have
    for given_dead in (True, dead.to(device)):
        got, info = ops.cholesky_inverse_factor_ex(h.to(device), 0.01, relative=True, dead=given_dead)
        assert not info.any()
        assert_near(got, want, EPS[dtype], cond)
    assert torch.equal(h, before)
    out = h.clone().to(device)
    ops.cholesky_inverse_factor_ex(out, 0.01, relative=True, dead=True, out=out)
    assert torch.equal(out, got.to(dtype))
    one, _ = ops.cholesky_inverse_factor_ex(
        h[0].to(device), torch.tensor(0.01, dtype=torch.float64, device=device), relative=True, dead=True
    )
    assert_near(one, want[0], EPS[dtype], cond)
    if n > 1:
        assert ops.cholesky_inverse_factor_ex(h.to(device), 0.0, dead=False)[1].bool().all()


def test_a_mask_chooses_rows_whatever_their_diagonal(device):
    blocks = spd(2, 3, n=6)
    mask = torch.zeros(3, 6, dtype=torch.bool)
    mask[1, [0, 4]] = True
    got, info = ops.cholesky_inverse_factor_ex(blocks.to(device), 0.5, dead=mask.to(device))
    revived = reference.revived(blocks, mask)
    assert not info.any() and bool((revived[:, 1].diagonal(dim1=-2, dim2=-1)[:, [0, 4]] == 1).all())
    assert_factor(got, revived, 0.5, cond=4.0)
    assert torch.equal(got[:, 0], ops.cholesky_inverse_factor(blocks[:, 0].to(device), 0.5))


@pytest.mark.parametrize("damping", [torch.tensor([0.5, 0.0, 2.0]), torch.tensor([[0.5], [1.0]]), 0.25])
@uppers
def test_damping_broadcasts(damping, upper, device):
    blocks = spd(3, n=9)
    moved = damping.to(device) if isinstance(damping, Tensor) else damping
    got, info = ops.cholesky_inverse_factor_ex(blocks.to(device), moved, upper=upper, relative=True)
    means = blocks.diagonal(dim1=-2, dim2=-1).mean(-1)
    shift = (damping * means).double()
    assert info.shape == got.shape[:-2] == shift.shape and not info.any()
    assert_factor(got, blocks.expand(*shift.shape, 9, 9), shift, upper)


# ---- blocks that fail


def indefinite(n: int, pivot: int, upper: bool) -> Tensor:
    """The minor of order pivot + 1, trailing or leading, is the first that is not positive."""
    lower = torch.randn(n, n, generator=torch.Generator().manual_seed(pivot), dtype=torch.float64).tril(-1) / max(1, n)
    lower += torch.eye(n, dtype=torch.float64)
    signs = torch.ones(n, dtype=torch.float64)
    signs[pivot] = -1
    a = (lower * signs) @ lower.mT
    return a.flip(0, 1) if upper else a


@uppers
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n", [1, 2, 5, 16, 33] if SIMT else [1, 2, 5, 16, 33, 70, 130])
def test_failure_at_many_pivots_between_good_blocks(n, dtype, upper, device, instruction_set):
    pivots = sorted({p for p in (0, 1, 3, 4, 15, 16, 31, 32, 63, 64, 127, 128, n - 2, n - 1) if 0 <= p < n})
    good = spd(2 * len(pivots) + 1, n=n, dtype=dtype)
    want, _ = ops.cholesky_inverse_factor_ex(good.to(device), upper=upper)
    mixed = good.clone()
    mixed[1::2] = torch.stack([indefinite(n, p, upper) for p in pivots]).to(dtype)
    got, info = ops.cholesky_inverse_factor_ex(mixed.to(device), upper=upper)
    assert info[::2].eq(0).all() and info[1::2].tolist() == [p + 1 for p in pivots]
    assert bool(got[1::2].isnan().all()) and torch.equal(got[::2], want[::2])


@uppers
@pytest.mark.parametrize("value", [NAN, float("inf"), -float("inf")])
@pytest.mark.parametrize("n", [1, 7, 40, 70])
def test_blocks_that_are_not_finite(n, value, upper, device, instruction_set):
    blocks = spd(20, n=n, dtype=torch.float32) + torch.eye(n)
    clean, _ = ops.cholesky_inverse_factor_ex(blocks.to(device), 1.0, upper=upper)
    blocks[3, n - 1, 0], blocks[11, n // 2, n // 2] = value, value
    damping = torch.ones(20)
    damping[17] = value
    got, info = ops.cholesky_inverse_factor_ex(blocks.to(device), damping.to(device), upper=upper)
    bad = torch.zeros(20, dtype=torch.bool)
    bad[[3, 11, 17]] = True
    assert info.tolist() == [-1 if b else 0 for b in bad]
    assert bool(got[bad].isnan().all()) and torch.equal(got[~bad], clean[~bad])


@uppers
def test_raising_form_says_what_failed(upper, device):
    blocks = spd(2, 3, n=5)
    blocks[1, 0] = indefinite(5, 2, upper)
    minor = "trailing" if upper else "leading"
    failure = rf"block \(1, 0\): the {minor} minor of order 3 is not positive, with damping 0.0001; .* 1 of 6"
    with pytest.raises(torch.linalg.LinAlgError, match=f"^cholesky_inverse_factor: {failure}$"):
        ops.cholesky_inverse_factor(blocks.to(device), 1e-4, upper=upper)
    with pytest.raises(torch.linalg.LinAlgError, match=r"^cholesky_inverse_factor: the block: not finite, .* nan; "):
        ops.cholesky_inverse_factor(blocks[0, 0].to(device), NAN, upper=upper)


# ---- lists, the robust form


@uppers
def test_grouped_is_each_batch_alone(upper, device, instruction_set):
    shapes = [(3, 5), (0, 7), (20, 33), (1, 64), (2, 0), (17, 16), (2, 100), (40, 1), (1, 3)]
    batches = [spd(b, n=n, dtype=DTYPES[i % 4], cond=10.0).to(device) for i, (b, n) in enumerate(shapes)]
    batches[5][4, 3] = 0
    batches[5][4, :, 3] = 0
    dampings = [0.1, 0.5, torch.linspace(0.1, 1, 20).to(device), 0.5, 0.0, 0.3, 1, 0.2, 0.0]
    dead = [None, True, False, None, None, True, None, None, None]
    options = {"upper": upper, "relative": True}
    factors, infos = ops.grouped_cholesky_inverse_factor_ex(batches, dampings, dead=dead, **options)
    for blocks, damping, rows, got, info in zip(batches, dampings, dead, factors, infos, strict=True):
        want, want_info = ops.cholesky_inverse_factor_ex(blocks, damping, dead=rows, **options)
        assert not info.any() and torch.equal(info, want_info) and got.dtype == want.dtype and torch.equal(got, want)
    assert ops.grouped_cholesky_inverse_factor_ex([], 0.1) == ([], [])


@uppers
def test_robust_repeats_what_fails(upper, device, instruction_set):
    n = 12
    blocks = spd(5, n=n, dtype=torch.float32, cond=4.0)
    blocks[1] = torch.ones(n, n)  # definite with 1e-9 in float64, not in float32
    blocks[2] -= 0.26 * torch.eye(n)  # eigenvalue -0.01: the damping has to grow to it
    blocks[3, 2, 1] = NAN
    blocks[4, 3] = blocks[4, :, 3] = 0
    before = blocks.clone()
    found = ops.robust_cholesky_inverse_factor([blocks.to(device)], 1e-9, upper=upper, dead=True)
    attempts, used, factors = (values[0].cpu() for values in (found.attempts, found.dampings, found.factors))
    assert attempts.tolist()[:2] == [0, 1] and int(attempts[2]) > 1 and attempts.tolist()[3:] == [-1, 0]
    assert 0.01 <= float(used[2]) <= 0.11 and torch.equal(blocks.nan_to_num(9), before.nan_to_num(9))
    assert_factor(factors[[0, 4]], reference.revived(blocks[[0, 4]], True), 1e-9, upper, 5.0)
    again, info = ops.cholesky_inverse_factor_ex(blocks[:3].double().to(device), used[:3].to(device), upper=upper)
    assert not info.any() and torch.equal(factors[1:3], again[1:].float().cpu()) and bool(factors[3].isnan().all())


def test_robust_relative_damping(device):
    batches = [spd(3, n=8, dtype=torch.float32).to(device), 4 * spd(n=5).to(device)]
    found = ops.robust_cholesky_inverse_factor(batches, 0.01, relative=True)
    want, _ = ops.grouped_cholesky_inverse_factor_ex(batches, 0.01, relative=True)
    for batch, got, expected, damping in zip(batches, found.factors, want, found.dampings, strict=True):
        assert torch.equal(got, expected)
        torch.testing.assert_close(damping, 0.01 * batch.diagonal(dim1=-2, dim2=-1).double().mean(-1))


# ---- compilation, threads, bad arguments


@pytest.mark.parametrize("dtype", DTYPES)
@uppers
def test_opcheck(dtype, upper, device):
    computed = torch.float64 if dtype == torch.float64 else torch.float32
    blocks = [spd(4, n=3, dtype=dtype).to(device), spd(2, 1, n=20, dtype=dtype).mT.to(device)]
    out = [torch.zeros_like(b, dtype=computed) for b in blocks]
    damping = [torch.ones(4, device=device).double(), torch.ones(1, device=device).double()]
    only = torch.tensor([1, 0, 0, 2, -1, 0], dtype=torch.int32, device=device)
    for arguments in ((out, blocks, damping, upper), (out, blocks, damping, upper, only)):
        torch.library.opcheck(torch.ops.mfac_kernels.cholesky_inverse_factor_.default, arguments)


def test_compiles_to_one_graph(device):
    def everything(a: Tensor, b: Tensor, damping: Tensor) -> list[Tensor]:
        factors, infos = ops.grouped_cholesky_inverse_factor_ex([a, b], [damping, 0.5], relative=True, dead=True)
        robust = ops.robust_cholesky_inverse_factor([a, b], 0.0, upper=False, dead=True)
        return [*factors, *infos, *robust.factors, *robust.attempts, *robust.dampings]

    a, b = spd(4, n=5, dtype=torch.float32).to(device), spd(2, n=7).to(device)
    a[1] = 0
    damping = torch.tensor([0.1, 0.2, 0.3, 0.0], device=device)
    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(a, b, damping), everything(a, b, damping), strict=True):
        assert torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0))


@uppers
def test_same_bits_for_any_number_of_threads(upper, device, threads, instruction_set):
    shapes = [(40, 16), (2, 64), (1, 100)] if SIMT else [(200, 16), (40, 33), (20, 64), (5, 130), (1, 600)]
    batches = [spd(b, n=n, dtype=torch.float32).to(device) for b, n in shapes]
    threads(1)
    once = ops.grouped_cholesky_inverse_factor_ex(batches, 0.01, upper=upper)[0]
    for count in (2, 3):
        threads(count)
        for got, want in zip(ops.grouped_cholesky_inverse_factor_ex(batches, 0.01, upper=upper)[0], once, strict=True):
            assert torch.equal(got, want)


B = torch.eye(3).repeat(2, 1, 1)
OUT = torch.zeros(2, 3, 3)
D = torch.ones(2, dtype=torch.float64)
BAD = [
    (([OUT, OUT], [B], [D]), r"out: expected 1 tensors, as blocks has, got 2"),
    (([OUT], [B[:, :2]], [D]), r"blocks\[0\]: expected shape \(..., n, n\), got \(2, 2, 3\)"),
    (([OUT.bfloat16()], [B], [D]), r"out\[0\]: expected float32 or float64, got BFloat16"),
    (([OUT[:1]], [B], [D]), r"out\[0\]: expected shape \(2, 3, 3\), got \(1, 3, 3\)"),
    (([OUT], [B], [D.repeat(2)]), r"damping\[0\]: expected 1 or 2 values, got 4"),
]


@pytest.mark.parametrize("place", ["cpu", "meta"])
@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_errors_name_argument_expected_and_got(arguments, message, place):
    tensors = [[t.to(place) for t in values] for values in arguments]
    with pytest.raises(RuntimeError, match=f"^cholesky_inverse_factor_: {message}"):
        torch.ops.mfac_kernels.cholesky_inverse_factor_(*tensors, True)
    assert not OUT.any()


WRONG = [
    (lambda: ops.cholesky_inverse_factor_ex(B, dead=torch.ones(3)), r"_ex: dead: expected bool, got Float"),
    (
        lambda: ops.cholesky_inverse_factor_ex(B, dead=torch.ones(4).bool()),
        r"_ex: dead: expected a batch that broadcasts with \(2, 3\), got \(4,\)",
    ),
    (
        lambda: ops.cholesky_inverse_factor_ex(B, dead=torch.ones(5, 2, 3).bool()),
        r"_ex: dead: expected a shape that expands to \(2, 3\), got \(5, 2, 3\)",
    ),
    (
        lambda: ops.cholesky_inverse_factor_ex(B[:, :2], dead=True, out=OUT[:, :2]),
        r"_ex: blocks: expected shape \(..., n, n\), got \(2, 2, 3\)",
    ),
    (lambda: ops.grouped_cholesky_inverse_factor_ex([B], dead=[True, None]), r"dead: expected 1, one per batch, got 2"),
    (lambda: ops.robust_cholesky_inverse_factor([B], growth=1.0), r"growth: expected a finite number above 1, got 1"),
    (lambda: ops.cholesky_inverse_factor_ex(B.clone().requires_grad_()), r"_ex: not differentiable"),
    (lambda: ops.robust_cholesky_inverse_factor([B.clone().requires_grad_()]), r"_factor: not differentiable"),
]


@pytest.mark.parametrize(("call", "message"), WRONG)
def test_wrappers_say_what_is_wrong(call, message):
    with pytest.raises(RuntimeError, match=message):
        call()
    assert not OUT.any()
