"""The compressed form of a stride-1 convolution's factor against its definition and against explicit patches."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import mfac_kernels as mk
from mfac_kernels import ops
from mfac_kernels.reference import conv_lags as reference
from mfac_kernels.reference import kronecker

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SIMT = mk.build_info()["simt"]

dtypes = st.sampled_from(DTYPES)
seeds = st.integers(0, 2**31)


def sums_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def random(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Normal entries, mean 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) + seed % 2).to(dtype)


def strided(x: Tensor, seed: int) -> Tensor:
    """The same images: as they are, channels last, every second column, a window of larger ones, channels reversed."""
    kind = seed % 5
    if kind == 1:
        return x.contiguous(memory_format=torch.channels_last)
    if kind == 2:
        wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"))
        wide[..., ::2] = x
        return wide[..., ::2]
    if kind == 3:
        wide = x.new_full((x.shape[0], x.shape[1] + 3, x.shape[2] + 2, x.shape[3] + 1), float("nan"))
        wide[:, 1:-2, 1:-1, 1:] = x
        return wide[:, 1:-2, 1:-1, 1:]
    if kind == 4:
        return x.permute(2, 1, 3, 0).contiguous().permute(3, 1, 0, 2)
    return x


@dataclass
class Conv:
    """A convolution of stride 1 and a batch for it."""

    n: int
    channels: int
    groups: int
    image: tuple[int, int]
    kernel_size: tuple[int, int]
    padding: tuple[tuple[int, int], tuple[int, int]]
    dilation: tuple[int, int]
    bias: bool
    seed: int

    def input(self, dtype: torch.dtype) -> Tensor:
        return strided(random((self.n, self.channels, *self.image), dtype, self.seed), self.seed)

    @property
    def form(self) -> tuple[list[int], list[int], list[int], list[int]]:
        before, after = ([p[i] for p in self.padding] for i in range(2))
        return list(self.kernel_size), before, after, list(self.dilation)

    @property
    def pixels(self) -> int:
        return self.n * self.image[0] * self.image[1]

    def reference(self, x: Tensor) -> Tensor:
        return reference.lags(
            x, self.kernel_size, padding=self.padding, dilation=self.dilation, groups=self.groups, bias=self.bias
        )

    def dense(self, x: Tensor) -> Tensor:
        """(groups, D, D)"""
        factor = kronecker.conv_factor(
            x,
            self.kernel_size,
            stride=(1, 1),
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            bias=self.bias,
        )
        return factor if self.groups > 1 else factor[None]

    def expanded(self, state: Tensor) -> Tensor:
        return reference.expand(
            state,
            self.channels // self.groups,
            self.kernel_size,
            padding=self.padding,
            dilation=self.dilation,
            bias=self.bias,
        )

    def state(self, dtype: torch.dtype) -> Tensor:
        return self.reference(torch.zeros(1, self.channels, *self.image)).to(dtype)

    def lags_(
        self,
        state: Tensor,
        x: Tensor,
        beta: float = 1.0,
        alpha: float = 1.0,
        refused: Tensor | None = None,
        fft: bool = False,
    ) -> None:
        torch.ops.mfac_kernels.conv_lags_(state, x, *self.form, self.groups, self.bias, fft, beta, alpha, refused)

    def expand_(self, factor: Tensor, state: Tensor, beta: float = 0.0, alpha: float = 1.0) -> None:
        torch.ops.mfac_kernels.conv_expand_(factor, state, *self.form, self.groups, self.bias, beta, alpha)


@st.composite
def convs(draw: st.DrawFn) -> Conv:
    def axis() -> tuple[int, int, tuple[int, int], int]:
        kernel, dilation = draw(st.integers(1, 4)), draw(st.integers(1, 3))
        padding = (draw(st.integers(0, 4)), draw(st.integers(0, 4)))
        least = max(1, dilation * (kernel - 1) + 1 - sum(padding))
        return draw(st.integers(least, least + draw(st.sampled_from([0, 2, 5, 12])))), kernel, padding, dilation

    image, kernel, padding, dilation = zip(axis(), axis(), strict=True)
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    return Conv(
        n=draw(st.integers(0, 3)),
        channels=groups * draw(st.integers(1, 3 if SIMT else 6)),
        groups=groups,
        image=image,
        kernel_size=kernel,
        padding=padding,
        dilation=dilation,
        bias=draw(st.booleans()),
        seed=draw(seeds),
    )


RESNET = Conv(2, 70, 1, (9, 10), (3, 3), ((1, 1), (1, 1)), (1, 1), False, 0)
LAYERS = {
    "3x3": RESNET,
    "bias": replace(RESNET, bias=True, channels=33, seed=1),
    "large images": replace(RESNET, channels=20, image=(40, 70), seed=2),
    "many small images": replace(RESNET, n=70, channels=36, image=(4, 4), seed=3),
    "valid": replace(RESNET, channels=20, padding=((0, 0), (0, 0)), seed=4),
    "5x5": replace(RESNET, channels=40, kernel_size=(5, 5), padding=((2, 2), (2, 2)), seed=1),
    "1x7": replace(RESNET, channels=40, kernel_size=(1, 7), padding=((0, 0), (3, 3)), seed=2),
    "dilated": replace(RESNET, channels=24, padding=((2, 2), (2, 2)), dilation=(2, 2), seed=3),
    "depthwise": replace(RESNET, channels=24, groups=24, seed=0),
    "1d": replace(RESNET, channels=40, kernel_size=(1, 4), image=(1, 90), padding=((0, 0), (1, 2)), seed=1),
    "smaller than the kernel": replace(RESNET, image=(2, 1), kernel_size=(5, 5), padding=((2, 2), (2, 2)), seed=0),
}


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


def assert_sums(got: Tensor, want: Tensor, size: Tensor, terms: int) -> None:
    """Entry by entry: a sum of n products in any order errs by at most n eps sum |products|; the scaling and the sum
    with the old state add a few. `size` is that sum of absolute values."""
    eps = torch.finfo(got.dtype).eps
    error = (got.double() - want).abs()
    assert bool((error <= (terms + 6) * eps * size).all()), f"{(error / size.clamp_min(1e-300)).max() / eps:g} eps"


def check_lags(conv: Conv, dtype: torch.dtype, device: str, beta: float = 0.9, alpha: float = 0.5) -> None:
    x = conv.input(dtype)
    old = conv.reference(random((1, conv.channels, *conv.image), torch.float64, conv.seed + 1)).to(sums_dtype(dtype))
    state = (torch.full_like(old, float("nan")) if beta == 0 else old.clone()).to(device)
    conv.lags_(state, x.to(device), beta, alpha)
    want = beta * old.double() + alpha * conv.reference(x)
    size = abs(beta) * old.double().abs() + abs(alpha) * conv.reference(x.abs())
    assert_sums(state.cpu(), want, size, conv.pixels)


@given(conv=convs(), beta=st.sampled_from([0.0, 0.9]), alpha=st.sampled_from([1.0, -0.25]), dtype=dtypes)
def test_lags(conv, beta, alpha, dtype, instruction_set, device):
    check_lags(conv, dtype, device, beta, alpha)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("conv", LAYERS.values(), ids=LAYERS)
def test_lags_of_layers(conv, dtype, instruction_set, device):
    if SIMT:
        conv = replace(conv, channels=conv.groups * max(1, conv.channels // conv.groups // 4))
    check_lags(conv, dtype, device)


def check_expand(conv: Conv, dtype: torch.dtype, device: str, beta: float, block: int | None = None) -> None:
    state = conv.reference(conv.input(torch.float64)).to(dtype)
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
