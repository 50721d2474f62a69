"""Kronecker factors of convolutions against explicit patches in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kronecker_cases import (
    CONV,
    DTYPES,
    RESNET,
    SIMT,
    Conv,
    assert_factor,
    blocks_of,
    dtypes,
    factor_dtype,
    random,
    seeds,
)

from mfac_kernels import ops


@st.composite
def convs(draw: st.DrawFn, dims: int) -> Conv:
    each = st.tuples(*[st.integers(1, 3)] * dims)
    kernel, stride, dilation = draw(each), draw(each), draw(each)
    spans = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    padding = draw(st.one_of(st.tuples(*[st.integers(0, 3)] * dims), st.sampled_from(["same", "valid"])))
    if padding == "same":
        stride = (1,) * dims
    room = [0] * dims if padding == "valid" else spans if padding == "same" else [2 * p for p in padding]
    largest = {1: 30, 2: 9, 3: 5}[dims]
    image = tuple(draw(st.integers(max(1, span - r), max(largest, span))) for span, r in zip(spans, room, strict=True))
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    return Conv(
        n=draw(st.integers(0, 3)),
        channels=groups * draw(st.integers(1, 3 if SIMT or dims == 3 else 6)),
        groups=groups,
        image=image,
        kernel_size=kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        bias=draw(st.booleans()),
        spatial=draw(st.sampled_from(["full", "sua"])),
        approximation=draw(st.sampled_from(["expand", "reduce"])),
        seed=draw(seeds),
    )


def check_conv(conv: Conv, dtype: torch.dtype, device: str, beta: float = 0.9, block: int | None = None) -> None:
    x, alpha = conv.input(dtype), 0.5
    want, size = conv.reference(x), conv.reference(x.abs())
    old = random(tuple(want.shape), factor_dtype(dtype), conv.seed + 1)
    old = old + old.mT
    if block:
        want, size, old = (blocks_of(t, block) for t in (want, size, old))
    factor = (torch.full_like(old, float("nan")) if beta == 0 else old.clone()).to(device)
    expected = beta * old.double() + alpha * want
    conv.accumulate(factor, x.to(device), beta=beta, alpha=alpha)
    assert_factor(factor.cpu(), expected, beta * old.double().abs() + abs(alpha) * size, conv.terms, dtype)


@given(conv=convs(2), beta=st.sampled_from([0.0, 0.9]), dtype=dtypes)
def test_conv2d_factor(conv, beta, dtype, instruction_set, device):
    check_conv(conv, dtype, device, beta)


@given(conv=convs(1), dtype=dtypes)
def test_conv1d_factor(conv, dtype, instruction_set, device):
    check_conv(conv, dtype, device)


@given(conv=convs(3), dtype=dtypes)
def test_conv3d_factor(conv, dtype, instruction_set, device):
    check_conv(conv, dtype, device)


@given(conv=convs(2), block=st.sampled_from([1, 4, 9, 32]), beta=st.sampled_from([0.0, 1.0]), dtype=dtypes)
def test_block_diagonal_of_conv2d_factor(conv, block, beta, dtype, instruction_set, device):
    check_conv(replace(conv, groups=1), dtype, device, beta, block=block)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "conv",
    [
        RESNET,
        replace(RESNET, bias=True, stride=(2, 2)),
        replace(RESNET, spatial="sua", bias=True),
        replace(RESNET, channels=3, kernel_size=(7, 7), stride=(2, 2), padding=(3, 3), image=(30, 30)),
        replace(RESNET, kernel_size=(1, 1), padding=(0, 0), channels=130),
        replace(RESNET, kernel_size=(1, 1), padding=(0, 0), stride=(2, 2), channels=70),
        replace(RESNET, channels=48, groups=48, image=(9, 9)),
        replace(RESNET, channels=40, groups=4, approximation="reduce"),
    ],
    ids=["3x3", "strided", "sua", "stem", "1x1", "shortcut", "depthwise", "grouped-reduce"],
)
def test_layers_of_networks(conv, dtype, instruction_set, device):
    if SIMT:
        conv = replace(conv, channels=conv.groups * max(1, conv.channels // conv.groups // 4), n=1)
    check_conv(conv, dtype, device)
    check_conv(replace(conv, seed=4), dtype, device)


def test_sua_is_full_for_a_kernel_of_one(instruction_set):
    x = random((3, 5, 6, 7), torch.float32, 1)
    full, sua = torch.zeros(6, 6), torch.zeros(6, 6)
    ops.conv2d_factor_(full, x, 1, bias=True)
    ops.conv2d_factor_(sua, x, 1, bias=True, spatial="sua")
    assert torch.equal(full, sua)


def test_a_kernel_that_covers_the_input_is_a_linear_layer(instruction_set):
    x = random((7, 3, 4, 5), torch.float64, 1)
    conv, linear = torch.zeros(61, 61).double(), torch.zeros(61, 61).double()
    ops.conv2d_factor_(conv, x, (4, 5), bias=True)
    ops.linear_factor_(linear, x.flatten(1), bias=True)
    torch.testing.assert_close(conv, linear, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_kernel_of_one_is_the_factor_of_the_channels(dims, instruction_set):
    x = random((4, 9, *[3] * dims), torch.float64, 1)
    conv, linear = torch.zeros(9, 9).double(), torch.zeros(9, 9).double()
    CONV[dims](conv, x, 1)
    ops.linear_factor_(linear, x.movedim(1, -1))
    torch.testing.assert_close(conv, linear, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "conv",
    [RESNET, replace(RESNET, stride=(2, 2)), replace(RESNET, spatial="sua"), replace(RESNET, approximation="reduce")],
    ids=["full", "strided", "sua", "reduce"],
)
def test_non_finite_images_change_nothing(conv, dtype, instruction_set, device):
    conv = replace(conv, channels=6, image=(7, 7))
    x = conv.input(dtype).contiguous()
    old = conv.reference(x).to(factor_dtype(dtype))
    factor, flag = old.clone().to(device), torch.zeros(1, dtype=torch.int32, device=device)
    bad = x.clone()
    bad[1, 5, 6, 6] = float("nan")
    conv.accumulate(factor, bad.to(device), check_finite=flag)
    assert flag.tolist() == [1] and torch.equal(factor.cpu(), old)
    conv.accumulate(factor, x.to(device), check_finite=flag)
    assert flag.tolist() == [1], "set, never cleared"
    assert not torch.equal(factor.cpu(), old)


@pytest.mark.skipif(SIMT, reason="there are tiles alone")
def test_long_kernels_are_left_to_tiles():
    """What the compressed form costs beside its sums grows with the square of the offsets."""
    x = random((2, 1, 600), torch.float32, 0)
    factors = [torch.zeros(200, 200) for _ in range(2)]
    for factor, algorithm in zip(factors, ("auto", "tiles"), strict=True):
        ops.conv1d_factor_(factor, x, 200, algorithm=algorithm)
    assert torch.equal(*factors)
