"""Rows and convolutions for the Kronecker factors, and what a factor is held to."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

import mfac_kernels as mk
from mfac_kernels import ops
from mfac_kernels.reference import kronecker as reference

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SIMT = mk.build_info()["simt"]
CONV = {1: ops.conv1d_factor_, 2: ops.conv2d_factor_, 3: ops.conv3d_factor_}

dtypes = st.sampled_from(DTYPES)
seeds = st.integers(0, 2**31)


@contextmanager
def tf32(allowed: bool = True) -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def factor_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def random(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Normal entries, mean 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) + seed % 2).to(dtype)


def strided(x: Tensor, seed: int) -> Tensor:
    """The same values: as they are, transposed in memory, every second element, or a window of something wider."""
    kind = seed % 4
    if x.dim() < 2 or kind == 0:
        return x
    if kind == 1:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if kind == 2:
        wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"))
        wide[..., ::2] = x
        return wide[..., ::2]
    wide = x.new_full((x.shape[0], x.shape[1] + 3, *x.shape[2:]), float("nan"))
    wide[:, 1:-2] = x
    return wide[:, 1:-2]


def assert_factor(got: Tensor, want: Tensor, size: Tensor, terms: float, dtype: torch.dtype) -> None:
    """Entry by entry: a sum of n products in any order errs by at most n eps sum |products|; the scaling and the
    sum with the old factor add a few. `size` is that sum of absolute values."""
    assert got.dtype == factor_dtype(dtype)
    assert got.shape == want.shape
    assert torch.equal(got, got.mT)
    eps = torch.finfo(got.dtype).eps
    error = (got.double() - want).abs()
    assert bool((error <= (terms + 6) * eps * size).all()), (
        f"{(error / size.clamp_min(1e-300)).max() / eps:g} eps, {terms} terms"
    )


def blocks_of(dense: Tensor, size: int) -> Tensor:
    """(g, size, size), zero past the ragged end."""
    parts = reference.block_diagonal(dense, size)
    out = dense.new_zeros(len(parts), size, size)
    for block, part in zip(out, parts, strict=True):
        block[: len(part), : len(part)] = part
    return out


@dataclass
class Conv:
    """A random geometry."""

    n: int
    channels: int
    groups: int
    image: tuple[int, ...]
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    bias: bool
    spatial: str
    approximation: str
    seed: int

    @property
    def dims(self) -> int:
        return len(self.image)

    @property
    def ends(self) -> list[tuple[int, int]]:
        """Padding before and after."""
        if self.padding == "valid":
            return [(0, 0)] * self.dims
        if self.padding == "same":
            total = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
            return [(t // 2, t - t // 2) for t in total]
        return [(p, p) for p in self.padding]

    @property
    def positions(self) -> int:
        sizes = zip(self.image, self.kernel_size, self.stride, self.ends, self.dilation, strict=True)
        return math.prod((i + sum(p) - d * (k - 1) - 1) // s + 1 for i, k, s, p, d in sizes)

    def input(self, dtype: torch.dtype) -> Tensor:
        x = random((self.n, self.channels, *self.image), dtype, self.seed)
        if self.seed % 5 == 4 and self.dims > 1:
            return x.contiguous(memory_format=torch.channels_last if self.dims == 2 else torch.channels_last_3d)
        return strided(x, self.seed % 5)

    def reference(self, x: Tensor) -> Tensor:
        return reference.conv_factor(
            x,
            self.kernel_size,
            stride=self.stride,
            padding=self.ends,
            dilation=self.dilation,
            groups=self.groups,
            bias=self.bias,
            spatial=self.spatial,
            approximation=self.approximation,
        )

    def accumulate(self, factor: Tensor, x: Tensor, **scales: object) -> Tensor | None:
        return CONV[self.dims](
            factor,
            x,
            self.kernel_size,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            bias=self.bias,
            spatial=self.spatial,
            approximation=self.approximation,
            **scales,
        )

    @property
    def terms(self) -> int:
        """Of the longest sum, and of the sums that its factors are under "reduce"."""
        return self.n + 2 * self.positions if self.approximation == "reduce" else self.n * self.positions


RESNET = Conv(2, 24, 1, (16, 16), (3, 3), (1, 1), (1, 1), (1, 1), False, "full", "expand", 0)
