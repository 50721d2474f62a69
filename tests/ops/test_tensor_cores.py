"""Kronecker factors on tensor cores: 16-bit rows, and float32 rows where TF32 is allowed. CPU kernels know no TF32."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from kronecker_cases import blocks_of, tf32
from torch import Tensor

import mfac_kernels as mk
from mfac_kernels import ops
from mfac_kernels.reference import kronecker as reference

SIMT = mk.build_info()["simt"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def allow_tf32() -> Iterator[None]:
    with tf32():
        yield


def random(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + 0.5).to(dtype)


def as_multiplied(x: Tensor, device: str) -> Tensor:
    """float32 rounded to TF32: 13 bits of 23 go, halves away from zero."""
    if x.dtype != torch.float32 or not (SIMT or device == "cuda"):
        return x
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def assert_factor(got: Tensor, want: Tensor, size: Tensor, terms: int) -> None:
    """Products are exact; a sum of n errs by at most n eps sum |products|, in runs of 512 rows. TF32's eps is 8192
    times larger: without the rounding, or with one too many, this fails."""
    assert torch.equal(got, got.mT)
    error = (got.double() - want).abs()
    assert bool((error <= (min(terms, 512) + 6) * torch.finfo(torch.float32).eps * size).all())


# Ragged chunks, slabs and runs of rows; several tiles, ragged vectors; blocks with the bias in the last one or alone.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "d", "bias", "block"),
    [
        (0, 8, True, None),
        (1, 8, False, None),
        (70, 40, True, None),
        (1300, 24, False, None),
        (530, 260, True, None),
        (33, 64, True, 16),
        (50, 56, True, 24),
    ],
)
def test_linear(rows, d, bias, block, dtype, allow_tf32, device):
    x = random((rows, d + 8), dtype).to(device)[:, :d]  # a copy of a view would have other strides
    exact = as_multiplied(x.contiguous().cpu(), device)
    want, size = reference.linear_factor(exact, bias=bias), reference.linear_factor(exact.abs(), bias=bias)
    if block:
        want, size = blocks_of(want, block), blocks_of(size, block)
    factor = torch.full(want.shape, float("nan"), device=device)
    ops.linear_factor_(factor, x, bias=bias, beta=0.0)
    assert_factor(factor.cpu(), want, size, rows)


def test_weights_are_multiplied_before_rounding(allow_tf32, device):
    x, weights = random((100, 12), torch.float32), random((100,), torch.float32, 1).abs()
    left, right = as_multiplied(x * weights[:, None], device).double(), as_multiplied(x, device).double()
    product = (left.mT @ right).tril()
    factor = torch.zeros(12, 12, device=device)
    ops.linear_factor_(factor, x.to(device), weights=weights.to(device))
    # The reference's rounding of the product x w is that of the device.
    assert_factor(factor.cpu(), product + product.tril(-1).mT, left.abs().mT @ right.abs(), 100)


# channels, kernel, stride, padding, dilation, groups, bias; offsets < 4 stay off tensor cores unless channels come last
CONVS = [
    (8, (3, 3), (1, 1), (1, 1), (1, 1), 1, True),
    (16, (3, 3), (2, 2), (1, 0), (1, 2), 2, True),
    (24, (2, 2), (1, 3), (0, 2), (2, 1), 1, False),
    (11, (3, 2), (2, 1), (2, 1), (1, 1), 1, True),
    (8, (1, 1), (2, 1), (0, 0), (1, 1), 1, False),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("conv", CONVS)
def test_convolution(conv, channels_last, dtype, allow_tf32, device):
    channels, kernel_size, stride, padding, dilation, groups, bias = conv
    wide = random((2, channels + -channels % 8, 8, 9), dtype).to(device)
    if channels_last:  # rows of channels begin at multiples of 16 bytes, whatever their number
        x = wide.contiguous(memory_format=torch.channels_last)[:, :channels]
        exact = as_multiplied(x.contiguous().cpu(), device)
    else:
        x = wide[:, :channels].contiguous()
        rounded = kernel_size[0] * kernel_size[1] >= 4 and channels // groups % 4 == 0
        exact = as_multiplied(x.cpu(), device) if rounded else x.cpu()
    geometry = {"stride": stride, "dilation": dilation, "groups": groups, "bias": bias}
    ends = [(p, p) for p in padding]
    want = reference.conv_factor(exact, kernel_size, padding=ends, **geometry)
    size = reference.conv_factor(exact.abs(), kernel_size, padding=ends, **geometry)
    factor = torch.full(want.shape, float("nan"), device=device)
    ops.conv2d_factor_(factor, x, kernel_size, padding=padding, beta=0.0, **geometry)
    assert_factor(factor.cpu(), want, size, 200)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_rows_change_nothing(value, dtype, allow_tf32, device):
    x, old = random((40, 32), dtype), torch.eye(33)
    x[37, 31] = value
    factor = old.clone().to(device)
    flag = ops.linear_factor_(factor, x.to(device), bias=True, beta=0.5, check_finite=True)
    assert flag is not None
    assert flag.tolist() == [1]
    assert torch.equal(factor.cpu(), old)


def test_off_by_default(device):
    x = random((100, 16), torch.float32)
    factor = torch.zeros(16, 16, device=device)
    ops.linear_factor_(factor, x.to(device))
    assert_factor(factor.cpu(), reference.linear_factor(x), reference.linear_factor(x.abs()), 100)
