"""Blocks that are not positive definite or not finite, one among good ones; and the form that repeats them."""

from __future__ import annotations

import functools

import pytest
import torch
from cholesky_cases import DTYPES, FLOATS, MIXED, NAN, SIMT, assert_inverse, indefinite, spd
from torch import Tensor

from mfac_kernels import ops
from mfac_kernels.reference import cholesky as reference


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
    blocks[3, n - 1, 0], blocks[11, n // 2, n // 2], blocks[13, n - 1, n - 1] = value, value, value
    if n > 1:
        blocks[5, 0, 1] = value  # above the diagonal
    damping = torch.ones(20)
    damping[17] = value
    got, info = run(blocks.to(device), damping.to(device))
    bad = torch.zeros(20, dtype=torch.bool)
    bad[[3, 11, 13, 17]] = True  # 13: no pivot comes after it
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
    torch.testing.assert_close(result.inverses[0][0].cpu().double(), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("growth", [1e160, 1e308])
def test_dampings_that_grow_without_measure(growth, device):
    bad = torch.diag(torch.tensor([1.0, -1e-3])).to(device)
    found = ops.robust_cholesky_inverse([bad[None]], 1e-8, growth=growth)
    assert bool(found.inverses[0].isfinite().all()) or int(found.attempts[0]) < 0
