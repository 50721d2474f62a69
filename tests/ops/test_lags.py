"""The compressed form of a stride-1 convolution's factor against its definition and against explicit patches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kronecker_cases import SIMT, dtypes, factor_dtype, random
from lags_cases import LAYERS, Conv, assert_sums, convs

from mfac_kernels import ops
from mfac_kernels.reference import kronecker
from mfac_kernels.reference import lags as reference


@given(conv=convs())
def test_reference_is_the_dense_factor(conv):
    conv = replace(conv, n=max(1, conv.n))
    x = conv.input(torch.float64)
    torch.testing.assert_close(conv.expanded(conv.reference(x)), conv.dense(x), rtol=1e-12, atol=1e-12)


@given(conv=convs())
def test_never_more_than_half_of_the_blocks(conv):
    slots = sum(1 for _ in reference.slots(conv.kernel_size, conv.padding, conv.dilation))
    offsets = conv.kernel_size[0] * conv.kernel_size[1]
    assert offsets <= slots <= offsets * (offsets + 1) // 2


def test_29_of_81_blocks():
    assert ops.conv2d_lags_size(10, 3, padding=1) == (1, 2900)
    assert ops.conv2d_lags_size(20, 3, padding="same", groups=2, bias=True) == (2, 2900 + 91)


def check_lags(conv: Conv, dtype: torch.dtype, device: str, beta: float = 0.9, alpha: float = 0.5) -> None:
    x = conv.input(dtype)
    old = conv.reference(random((1, conv.channels, *conv.image), torch.float64, conv.seed + 1)).to(factor_dtype(dtype))
    state = (torch.full_like(old, float("nan")) if beta == 0 else old.clone()).to(device)
    conv.lags_(state, x.to(device), beta, alpha)
    want = beta * old.double() + alpha * conv.reference(x)
    size = abs(beta) * old.double().abs() + abs(alpha) * conv.reference(x.abs())
    assert_sums(state.cpu(), want, size, conv.pixels)


@given(conv=convs(), beta=st.sampled_from([0.0, 0.9]), alpha=st.sampled_from([1.0, -0.25]), dtype=dtypes)
def test_lags(conv, beta, alpha, dtype, instruction_set, device):
    check_lags(conv, dtype, device, beta, alpha)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("conv", LAYERS.values(), ids=LAYERS)
def test_lags_of_layers(conv, dtype, instruction_set, device):
    if SIMT:
        conv = replace(conv, channels=conv.groups * max(1, conv.channels // conv.groups // 4))
    check_lags(conv, dtype, device)


def check_expand(conv: Conv, dtype: torch.dtype, device: str, beta: float, block: int | None = None) -> None:
    # Whole numbers: sums without rounding, so that the state of lag 0 is symmetric as that of the op is.
    state = conv.reference(conv.input(torch.float64).mul(8).round()).to(dtype)
    want = conv.expanded(state)
    if conv.groups == 1:
        want = want[0]
        if block:
            parts = kronecker.block_diagonal(want, block)
            want = want.new_zeros(len(parts), block, block)
            for out, part in zip(want, parts, strict=True):
                out[: len(part), : len(part)] = part
    old = random(tuple(want.shape), dtype, conv.seed)
    old = torch.where(want == 0, 0, old + old.mT) if block else old + old.mT
    factor = (torch.full_like(old, float("nan")) if beta == 0 else old.clone()).to(device)
    conv.expand_(factor, state.to(device), beta, 2.0)
    got = factor.cpu()
    assert torch.equal(got, got.mT)
    # Two products and their sum, or their sum in one step
    eps = torch.finfo(dtype).eps
    size = abs(beta) * old.abs() + 2 * want.abs()
    assert bool(((got - (beta * old + 2 * want)).abs() <= 2 * eps * size).all())


@given(
    conv=convs(),
    beta=st.sampled_from([0.0, 0.5]),
    block=st.sampled_from([None, 1, 4, 9, 50]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_expand(conv, beta, block, dtype, instruction_set, device):
    check_expand(conv, dtype, device, beta, block)


@pytest.mark.parametrize("block", [None, 32, 100])
@pytest.mark.parametrize("conv", LAYERS.values(), ids=LAYERS)
def test_expand_of_layers(conv, block, instruction_set, device):
    if SIMT:
        conv = replace(conv, channels=conv.groups * max(1, conv.channels // conv.groups // 4))
    check_expand(conv, torch.float32, device, 0.5, block)
