"""The batched Cholesky ops at every size where a kernel changes, and between blocks that share a launch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import mfac_kernels as mk
from mfac_kernels.reference import cholesky as reference

ops = torch.ops.mfac_kernels
Op = Callable[[list[Tensor], list[Tensor], list[Tensor]], Tensor]

CONDITION = 100.0
DAMPING = 0.01
# The kernels work on tiles of 8 in steps of 4, several blocks to a warp or to a thread block up to 64.
SIZES = [*range(18), 24, 25, 31, 32, 33, 40, 41, 48, 56, 57, 63, 64, 65, 72, 73, 96, 127, 128]


def blocks_of(b: int, n: int, dtype: torch.dtype, device: str) -> Tensor:
    """(b, n, n): the lower triangles of blocks with eigenvalues 1 / CONDITION to 1, NaN above the diagonal."""
    generator = torch.Generator().manual_seed(n)
    q = torch.linalg.qr(torch.randn(b, n, n, generator=generator, dtype=torch.float64))[0]
    a = q * torch.logspace(-2, 0, n, dtype=torch.float64) @ q.mT
    above = torch.ones(n, n, dtype=torch.bool).triu(1)
    return a.masked_fill(above, torch.nan).to(device, dtype)


def damped(blocks: Tensor, damping: float = DAMPING) -> Tensor:
    """The symmetric float64 matrices that the ops see."""
    lower = blocks.double().tril()
    n = blocks.shape[-1]
    return lower + lower.tril(-1).mT + damping * torch.eye(n, dtype=torch.float64, device=blocks.device)


def one_damping(device: str, value: float = DAMPING) -> Tensor:
    return torch.tensor([value], dtype=torch.float64, device=device)


def assert_inverse(inverse: Tensor, blocks: Tensor, damping: float = DAMPING) -> None:
    """Cholesky is backward stable: |X - A^-1| <= 4 n eps cond(A) |A^-1|, for a factor, its inverse and a product."""
    n = blocks.shape[-1]
    expected = reference.inverse(blocks.cpu(), damping).to(blocks.device)
    bound = 4 * (n + 4) * torch.finfo(inverse.dtype).eps * CONDITION
    assert torch.equal(inverse, inverse.mT)
    error = torch.linalg.matrix_norm(inverse.double() - expected) / torch.linalg.matrix_norm(expected)
    assert n == 0 or error.max() <= bound


def assert_factor(factor: Tensor, blocks: Tensor, damping: float = DAMPING) -> None:
    """|L L^T - A| <= (n + 4) eps |A|, whatever the condition."""
    n = blocks.shape[-1]
    expected = damped(blocks, damping)
    assert torch.equal(factor, factor.tril())
    assert (factor.diagonal(dim1=-2, dim2=-1) > 0).all()
    product = factor.double() @ factor.double().mT
    error = torch.linalg.matrix_norm(product - expected) / torch.linalg.matrix_norm(expected)
    assert n == 0 or error.max() <= (n + 4) * torch.finfo(factor.dtype).eps


CASES = [
    pytest.param(ops.cholesky_inverse_, assert_inverse, id="inverse"),
    pytest.param(ops.cholesky_factor_, assert_factor, id="factor"),
]
Check = Callable[..., None]


@pytest.mark.parametrize(("op", "check"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mixed_list_of_every_size(device: str, op: Op, check: Check, dtype: torch.dtype) -> None:
    blocks = [blocks_of(2 + n % 2, n, dtype, device) for n in SIZES]
    out = [torch.full_like(b, torch.nan) for b in blocks]
    info = op(out, blocks, [one_damping(device)] * len(blocks))
    assert info.dtype == torch.int32 and info.shape == (sum(len(b) for b in blocks),)
    assert (info == 0).all()
    for result, block in zip(out, blocks, strict=True):
        check(result, block)


@pytest.mark.parametrize(("op", "check"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_blocks(device: str, op: Op, check: Check, dtype: torch.dtype) -> None:
    """By squares of 64 on the device; one fails between two, one is not finite, one is in place, column by column."""
    blocks = [blocks_of(3, 129, dtype, device), blocks_of(2, 192, dtype, device), blocks_of(1, 259, dtype, device)]
    blocks[0][1, 125, 125] = -1.0
    blocks[1][0, 191, 0] = torch.inf
    blocks.append(blocks_of(1, 150, dtype, device).mT.contiguous().mT)
    before = [b.clone() for b in blocks]
    out = [*(torch.empty_like(b) for b in blocks[:3]), blocks[3]]
    info = op(out, blocks, [one_damping(device)] * 4)
    assert info.tolist() == [0, 126, 0, -1, 0, 0, 0]
    assert out[0][1].isnan().all() and out[1][0].isnan().all()
    for result, block in (
        (out[0][::2], before[0][::2]),
        (out[1][1], before[1][1]),
        (out[2], before[2]),
        (out[3], before[3]),
    ):
        check(result, block)


def test_large_blocks_chosen(device: str) -> None:
    blocks = blocks_of(3, 140, torch.float32, device)
    out = torch.full_like(blocks, 7.0)
    only = torch.tensor([0, 1, 0], dtype=torch.int32, device=device)
    assert (ops.cholesky_inverse_([out], [blocks], [one_damping(device)], only) == 0).all()
    assert (out[::2] == 7.0).all()
    assert_inverse(out[1], blocks[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_solve(device: str, dtype: torch.dtype) -> None:
    """|x - A^-1 b| <= 2 (n + 4) eps cond(L)^2 |A^-1 b|, cond(L)^2 = CONDITION; many sizes and layouts in one call."""
    factors, x = [], []
    for n, k in [(0, 3), (1, 1), (7, 2), (8, 33), (30, 5), (64, 70), (65, 1), (100, 40), (140, 3), (12, 0)]:
        block = damped(blocks_of(2, n, torch.float64, device))
        factors.append(torch.linalg.cholesky(block).to(dtype))
        x.append(torch.randn(2, n, k, dtype=dtype, generator=torch.Generator().manual_seed(n)).to(device))
    factors[3] = factors[3].mT.contiguous().mT + torch.full((8, 8), torch.nan, device=device).triu(1).nan_to_num(
        5.0
    ).triu(1)
    x[4] = x[4].mT.contiguous().mT
    x[6] = x[6].repeat(1, 1, 3)[..., ::3]
    x[7], factors[7] = (
        x[7].expand(3, 2, 100, 40).transpose(0, 1).contiguous().transpose(0, 1),
        factors[7].expand(3, 2, 100, 100),
    )
    given = [b.clone() for b in x]
    ops.cholesky_solve_(x, factors)
    for result, b, factor in zip(x, given, factors, strict=True):
        expected = torch.cholesky_solve(b.double(), factor.double().tril())
        bound = 2 * (factor.shape[-1] + 4) * torch.finfo(dtype).eps * CONDITION
        error = (result.double() - expected).norm()
        assert result.numel() == 0 or error <= bound * expected.norm()


@pytest.mark.parametrize(("op", "check"), CASES)
@pytest.mark.parametrize("n", [5, 16, 31, 64, 70])
def test_bits_do_not_depend_on_neighbours(device: str, op: Op, check: Check, n: int) -> None:
    blocks = blocks_of(9, n, torch.float32, device)
    together, alone = torch.empty_like(blocks), torch.empty_like(blocks)
    op([together], [blocks], [one_damping(device)])
    for b in range(9):
        op([alone[b]], [blocks[b]], [one_damping(device)])
    check(alone, blocks)
    if device == "cuda" or mk.build_info()["simt"]:  # the CPU has another kernel for a block alone
        assert torch.equal(together, alone)
    check(together, blocks)


@pytest.mark.parametrize(("op", "check"), CASES)
@pytest.mark.parametrize("n", [7, 24, 33, 64, 66])
def test_failing_blocks_at_every_pivot(device: str, op: Op, check: Check, n: int) -> None:
    """Blocks that fail stand between good ones, which get the bits that they get without them."""
    good = blocks_of(3, n, torch.float32, device)
    blocks = good.repeat(n, 1, 1)
    failing = torch.arange(n, device=device) * 3 + 1
    pivot = torch.arange(n, device=device)
    blocks[failing, pivot, pivot] = -1.0
    out = torch.empty_like(blocks)
    info = op([out], [blocks], [one_damping(device)])
    expected = torch.zeros(3 * n, dtype=torch.int32, device=device)
    expected[failing] = pivot.int() + 1
    assert torch.equal(info, expected)
    assert out[failing].isnan().all()
    undisturbed = torch.empty_like(blocks)
    op([undisturbed], [good.repeat(n, 1, 1)], [one_damping(device)])
    assert torch.equal(out[info == 0], undisturbed[info == 0])
    check(undisturbed[:3], good)


@pytest.mark.parametrize(("op", "check"), CASES)
@pytest.mark.parametrize("n", [1, 12, 64, 100])
def test_not_finite(device: str, op: Op, check: Check, n: int) -> None:
    blocks = blocks_of(5, n, torch.float32, device)
    blocks[1, n - 1, 0] = torch.inf
    blocks[2, n // 2, n // 2] = torch.nan
    damping = torch.full((5,), DAMPING, dtype=torch.float64, device=device)
    damping[3] = torch.nan
    out = torch.empty_like(blocks)
    info = op([out], [blocks], [damping])
    assert info.tolist() == [0, -1, -1, -1, 0]
    assert out[1:4].isnan().all()
    check(out[0::4], blocks[0::4])


@pytest.mark.parametrize(("op", "check"), CASES)
@pytest.mark.parametrize("n", [3, 8, 30, 32, 67])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_strides(device: str, op: Op, check: Check, n: int, dtype: torch.dtype) -> None:
    """Column by column, every other row and column, batches out of order, expanded, and in place."""
    computed = torch.float64 if dtype == torch.float64 else torch.float32
    base = (blocks_of(6, n, torch.float64, device).nan_to_num() + torch.eye(n, device=device)).to(dtype)
    sparse = torch.full((6, 2 * n, 3 * n), torch.nan, dtype=dtype, device=device)
    sparse[:, ::2, ::3] = base
    blocks = [
        base.mT.contiguous().mT,
        sparse[:, ::2, ::3],
        base.view(2, 3, n, n).transpose(0, 1),
        base[:1].expand(4, n, n),
        base.view(2, 3, n, n)[:, 1:],
    ]
    out = [torch.full(b.shape, torch.nan, dtype=computed, device=device) for b in blocks]
    out[1] = torch.empty(6, n, 2 * n, dtype=computed, device=device)[..., ::2].mT
    out[2] = torch.empty(2, 3, n, n, dtype=computed, device=device).transpose(0, 1)
    if dtype == computed:
        blocks.append(base.clone())
        out.append(blocks[-1])
    before = [b.clone() for b in blocks]
    info = op(out, blocks, [one_damping(device)] * len(blocks))
    assert (info == 0).all()
    for result, block in zip(out, before, strict=True):
        check(result, block)


def test_only_some(device: str) -> None:
    blocks = [blocks_of(5, 12, torch.float32, device), blocks_of(4, 40, torch.float32, device)]
    only = torch.tensor([1, 0, 0, 1, 1, 0, 1, 0, 2], dtype=torch.int32, device=device)
    blocks[0][1, 0, 0] = -1.0  # not looked at
    out = [torch.full_like(b, 7.0) for b in blocks]
    info = ops.cholesky_inverse_(out, blocks, [one_damping(device)] * 2, only)
    assert (info == 0).all()
    for result, block, chosen in zip(out, blocks, only.bool().split([5, 4]), strict=True):
        assert (result[~chosen] == 7.0).all()
        assert_inverse(result[chosen], block[chosen])


def test_many_batches_in_one_call(device: str) -> None:
    """More batches than one launch takes."""
    blocks = [blocks_of(1 + i % 3, 4 + i % 5, torch.float32, device) for i in range(70)]
    out = [torch.empty_like(b) for b in blocks]
    damping = [torch.full((len(b),), DAMPING, dtype=torch.float64, device=device) for b in blocks]
    assert (ops.cholesky_inverse_(out, blocks, damping) == 0).all()
    for result, block in zip(out, blocks, strict=True):
        assert_inverse(result, block)


def test_offsets_past_32_bits(device: str) -> None:
    if device != "cpu":
        pytest.skip("needs memory that is reserved and not used")
    n, far = 8, 2**31 + 16
    storage = torch.empty(far + n * n, dtype=torch.float32)  # pages that are not touched cost nothing
    blocks = storage.as_strided((2, n, n), (far, n, 1))
    blocks.copy_(blocks_of(2, n, torch.float32, device))
    expected = blocks.clone()
    assert (ops.cholesky_inverse_([blocks], [blocks], [one_damping(device)]) == 0).all()
    assert_inverse(blocks, expected)
