"""The compressed form by way of the frequencies: errors, and where they are not left to them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from kronecker_cases import dtypes, factor_dtype
from lags_cases import LAYERS, RESNET, Conv, assert_sums, convs, cpu_only


def check_fft(conv: Conv, dtype: torch.dtype) -> None:
    """The error of an entry (c, c') is relative to the norms of the two channels over the whole plane: per transform of
    n points about 4 log2(n) eps (Higham, Theorem 24.2, with its constants in float32), there are two; sums of products
    over N samples, then over the rows and columns of frequencies; the border, sums over N rows or columns."""
    x = conv.input(dtype)
    state = torch.full_like(conv.state(factor_dtype(dtype)), float("nan"))
    conv.lags_(state, x, 0.0, 1.0, fft=True)
    c = conv.channels // conv.groups
    extent = sum(2 * (i + d * (k - 1)) for i, d, k in zip(conv.image, conv.dilation, conv.kernel_size, strict=True))
    terms = 8 * max(1, extent).bit_length() * 2 + 2 * conv.n + extent * (1 + conv.n)
    norms = x.double().square().sum((0, 2, 3)).sqrt().reshape(conv.groups, c)
    bound = terms * torch.finfo(state.dtype).eps * norms[:, :, None] * norms[:, None, :]
    error = (state.double() - conv.reference(x)).abs()
    products = error.shape[1] - (conv.kernel_size[0] * conv.kernel_size[1] * c + 1 if conv.bias else 0)
    assert bool((error[:, :products].reshape(conv.groups, -1, c, c) <= bound[:, None]).all())
    if conv.bias:
        size = conv.reference(x.abs())
        assert_sums(state[:, products:], conv.reference(x)[:, products:], size[:, products:], conv.pixels)


@cpu_only
@given(conv=convs(), dtype=dtypes)
def test_fft(conv, dtype, instruction_set):
    check_fft(conv, dtype)


@cpu_only
@pytest.mark.parametrize("conv", LAYERS.values(), ids=LAYERS)
def test_fft_of_layers(conv, instruction_set):
    check_fft(conv, torch.float32)


@cpu_only
def test_fft_is_accurate_in_norm(instruction_set):
    conv = replace(RESNET, n=40, channels=40, image=(16, 16))
    x = conv.input(torch.float32)
    direct, fft = conv.state(torch.float32), conv.state(torch.float32)
    conv.lags_(direct, x)
    conv.lags_(fft, x, fft=True)
    want = conv.reference(x)
    assert not torch.equal(fft, direct), "the frequencies were taken"
    assert float((fft - want).norm() / want.norm()) <= 1e-6


@cpu_only
@pytest.mark.parametrize("at", [(0, 3), (8, 3), (4, 0), (4, 9)])
def test_outliers_on_the_border_are_not_left_to_the_frequencies(at, instruction_set):
    """An entry whose region leaves out the border would drown in the rounding errors of what it leaves out."""
    conv = replace(RESNET, channels=40)
    x = conv.input(torch.float32).contiguous()
    x[1, 17, at[0], at[1]] = 1e6
    direct, fft = conv.state(torch.float32), conv.state(torch.float32)
    conv.lags_(direct, x)
    conv.lags_(fft, x, fft=True)
    assert torch.equal(fft, direct)
    assert_sums(fft, conv.reference(x), conv.reference(x.abs()), conv.pixels)
