"""Convolutions of stride 1 for the compressed form of their factors, and what its sums are held to."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import strategies as st
from kronecker_cases import SIMT, random, seeds
from torch import Tensor

from mfac_kernels.reference import kronecker
from mfac_kernels.reference import lags as reference

cpu_only = pytest.mark.skipif(SIMT, reason="the frequencies are for the CPU alone")
WAYS = [False] if SIMT else [False, pytest.param(True, marks=pytest.mark.not_on_cuda)]  # of the argument fft


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
        return self.reference(torch.zeros(1, self.channels, *self.image)).to(dtype).zero_()

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
    n, channels = draw(st.integers(0, 3)), groups * draw(st.integers(1, 3 if SIMT else 6))
    return Conv(n, channels, groups, image, kernel, padding, dilation, draw(st.booleans()), draw(seeds))


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


def assert_sums(got: Tensor, want: Tensor, size: Tensor, terms: int) -> None:
    """Entry by entry: a sum of n products in any order errs by at most n eps sum |products|; the scaling and the sum
    with the old state add a few. `size` is that sum of absolute values."""
    eps = torch.finfo(got.dtype).eps
    error = (got.double() - want).abs()
    assert bool((error <= (terms + 6) * eps * size).all()), f"{(error / size.clamp_min(1e-300)).max() / eps:g} eps"
