"""The batched Cholesky ops in any memory, dtype and list: the numbers are those of contiguous blocks alone."""

from __future__ import annotations

import pytest
import torch
from cholesky_cases import (
    DTYPES,
    FLOATS,
    MIXED,
    NAN,
    SIMT,
    assert_factor,
    assert_inverse,
    dtypes,
    junk_above,
    seeds,
    sizes,
    spd,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mfac_kernels import ops
from mfac_kernels.reference import cholesky as reference


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
