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
from mfac_kernels.reference import kronecker
from mfac_kernels.reference import lags as reference

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


# ---- by way of the frequencies ---------------------------------------------------------------------------------------

cpu_only = pytest.mark.skipif(SIMT, reason="the frequencies are for the CPU alone")


def check_fft(conv: Conv, dtype: torch.dtype) -> None:
    """The error of an entry (c, c') is relative to the norms of the two channels over the whole plane: per transform of
    n points about 4 log2(n) eps (Higham, Theorem 24.2, with its constants in float32), there are two; sums of products
    over N samples, then over the rows and columns of frequencies; the border, sums over N rows or columns."""
    x = conv.input(dtype)
    state = torch.full_like(conv.state(sums_dtype(dtype)), float("nan"))
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


# ---- what holds for both ---------------------------------------------------------------------------------------------

WAYS = [False] if SIMT else [False, True]


@pytest.mark.parametrize("fft", WAYS)
def test_an_average_of_states_is_that_of_factors(fft, instruction_set, device):
    """Over batches of several sizes."""
    conv = replace(RESNET, channels=6, bias=True)
    state, want = conv.state(torch.float64).to(device), torch.zeros(1, 55, 55).double()
    for step, image in enumerate([(9, 10), (4, 7), (12, 5)]):
        batch = replace(conv, image=image, seed=5 * step, n=step + 1)
        x = batch.input(torch.float64)
        batch.lags_(state, x.to(device), 0.9, 0.1, fft=fft)
        want = 0.9 * want + 0.1 * batch.dense(x)
    factor = torch.empty(55, 55, device=device, dtype=torch.float64)
    conv.expand_(factor, state)
    torch.testing.assert_close(factor.cpu(), want[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("fft", WAYS)
@pytest.mark.parametrize(
    ("value", "dtype"), [*((float("nan"), dtype) for dtype in DTYPES), (float("inf"), torch.float32)]
)
def test_non_finite_images_change_nothing(value, dtype, fft, instruction_set, device):
    conv = replace(RESNET, channels=35, bias=True)
    x = conv.input(dtype).contiguous()
    bad = x.clone()
    bad[1, 34, 8, 9] = value
    old = conv.reference(x).to(sums_dtype(dtype))
    state, flag = old.clone().to(device), torch.zeros(1, dtype=torch.int32, device=device)
    conv.lags_(state, bad.to(device), 0.5, refused=flag, fft=fft)
    assert flag.tolist() == [1] and torch.equal(state.cpu(), old)
    flag.zero_()
    conv.lags_(state, x.to(device), 0.5, refused=flag, fft=fft)
    assert flag.tolist() == [0] and not torch.equal(state.cpu(), old)


@pytest.mark.parametrize("fft", WAYS)
def test_samples_far_apart(fft, device):
    """Offsets beyond 2^31; the memory between the samples is never touched."""
    conv = replace(RESNET, channels=3, seed=0)
    x = conv.input(torch.bfloat16)
    far = torch.empty(2**31 + 512, dtype=torch.bfloat16, device=device)
    far = far.as_strided(x.shape, (2**31 + 5, *x.stride()[1:])).copy_(x)
    states = [conv.state(torch.float32).to(device) for _ in range(2)]
    conv.lags_(states[0], x.to(device), fft=fft)
    conv.lags_(states[1], far, fft=fft)
    assert torch.equal(*states)


@pytest.mark.skipif(SIMT, reason="too long for an interpreter")
@pytest.mark.parametrize("fft", WAYS)
def test_chunks_of_samples(fft, instruction_set):
    """More than the panels hold at a time: 16 MiB, or 16 samples."""
    conv = replace(RESNET, n=40, channels=34, image=(40, 60), bias=True, seed=0)
    x = conv.input(torch.float32)
    whole, parts = conv.state(torch.float32), conv.state(torch.float32)
    flag = torch.zeros(1, dtype=torch.int32)
    conv.lags_(whole, x, 0.0, refused=flag, fft=fft)
    for part in x.split(5):
        conv.lags_(parts, part, fft=fft)
    assert not flag.any()
    assert float((whole - parts).norm() / whole.norm()) <= 1e-6
    x[39, 33, 39, 59] = float("nan")
    before = whole.clone()
    conv.lags_(whole, x, refused=flag, fft=fft)
    assert flag.all() and torch.equal(whole, before)


@pytest.mark.parametrize("fft", WAYS)
@pytest.mark.parametrize("image", [(5, 0), (0, 5), (0, 0)])
@pytest.mark.parametrize("samples", [0, 1])
def test_images_without_pixels(samples, image, fft, device):
    """Patches of padding alone: no products, and as many ones as there are patches."""
    x = torch.zeros(samples, 3, *image, device=device)
    state = torch.full(ops.conv2d_lags_size(3, 3, padding=2, bias=True), float("nan"), device=device)
    flag = torch.zeros(1, dtype=torch.int32, device=device)
    ops.conv2d_lags_(state, x, 3, padding=2, bias=True, beta=0.0, check_finite=flag, algorithm="fft" if fft else "lags")
    factor = torch.zeros(28, 28, device=device)
    ops.conv2d_expand_(factor, state, 3, padding=2, bias=True)
    want = torch.zeros(28, 28)
    want[27, 27] = samples * (image[0] + 2) * (image[1] + 2)
    assert torch.equal(factor.cpu(), want) and not flag.any()
    for algorithm in ("auto", "tiles"):
        again = torch.full((28, 28), float("nan"), device=device)
        ops.conv2d_factor_(again, x, 3, padding=2, bias=True, beta=0.0, algorithm=algorithm)
        assert torch.equal(again.cpu(), want)


@pytest.mark.parametrize("fft", WAYS)
@pytest.mark.parametrize("layout", ["channels first", "channels last", "strided"])
@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
def test_the_ends_of_many_samples_are_looked_at(last, layout, fft, instruction_set, device):
    """More samples than the frequencies take at a time, a ragged number of elements."""
    conv = replace(RESNET, n=17, channels=3, image=(5, 7), seed=0)
    x = conv.input(torch.float32)
    if layout == "channels last":
        x = x.contiguous(memory_format=torch.channels_last)
    if layout == "strided":
        around = torch.full((17, 3, 5, 9), float("nan"))
        around[..., 1:8] = x
        x = around[..., 1:8]
    state = conv.state(torch.float32).to(device)
    for spoiled in (False, True):
        if spoiled:
            x[(-1 if last else 0,) * 4] = float("inf")
        flag = torch.zeros(1, dtype=torch.int32, device=device)
        conv.lags_(state, x.to(device), refused=flag, fft=fft)
        assert flag.tolist() == [int(spoiled)]
        assert bool(state.isfinite().all())


@pytest.mark.skipif(SIMT, reason="threads of the CPU")
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_any_number_of_threads(dtype, threads, instruction_set):
    def results() -> list[Tensor]:
        found = []
        for conv in (RESNET, replace(RESNET, n=20, channels=18, groups=2, image=(20, 20), bias=True)):
            for fft in (False, True):
                state = conv.state(sums_dtype(dtype))
                conv.lags_(state, conv.input(dtype), fft=fft)
                factor = torch.zeros_like(conv.expanded(state))
                conv.expand_(factor if conv.groups > 1 else factor[0], state)
                found += [state, factor]
        return found

    threads(1)
    once = results()
    for count in (2, 3):
        threads(count)
        assert all(map(torch.equal, results(), once))


def test_python_surface(instruction_set, device):
    x = random((2, 6, 7, 8), torch.float32, 0).to(device)
    for how in ({"padding": 1}, {"padding": "same", "dilation": 2, "groups": 2}, {"bias": True}):
        bias, groups = how.get("bias", False), how.get("groups", 1)
        state = torch.zeros(ops.conv2d_lags_size(6, 3, **how), device=device)
        flag = ops.conv2d_lags_(state, x, 3, **how, beta=0.0, check_finite=True)
        size = 6 // groups * 9 + bias
        got = torch.empty(*([groups] if groups > 1 else []), size, size, device=device)
        ops.conv2d_expand_(got, state, 3, **how)
        want = torch.zeros_like(got)
        ops.conv2d_factor_(want, x, 3, **how, algorithm="tiles")
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)
        assert flag.tolist() == [0]
    with pytest.raises(RuntimeError, match='conv2d_lags_: algorithm: expected "auto", "lags" or "fft", got "tiles"'):
        ops.conv2d_lags_(state, x, 3, bias=True, algorithm="tiles")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fft", WAYS)
def test_opcheck(dtype, fft, device):
    conv = replace(RESNET, channels=4, groups=2, bias=True)
    state = conv.state(sums_dtype(dtype)).to(device)
    flag = torch.zeros(1, dtype=torch.int32, device=device)
    for refused in (None, flag):
        arguments = (state, conv.input(dtype).to(device), *conv.form, 2, True, fft, 0.5, 2.0, refused)
        torch.library.opcheck(torch.ops.mfac_kernels.conv_lags_.default, arguments)
    factor = torch.zeros(2, 19, 19, dtype=state.dtype, device=device)
    torch.library.opcheck(torch.ops.mfac_kernels.conv_expand_.default, (factor, state, *conv.form, 2, True, 0.5, 2.0))


def test_compiles_to_one_graph(device):
    def step(factor: Tensor, state: Tensor, x: Tensor) -> None:
        ops.conv2d_lags_(state, x, 3, padding=1, beta=0.9, alpha=0.1)
        ops.conv2d_expand_(factor, state, 3, padding=1)

    x = random((2, 4, 6, 6), torch.float32, 0).to(device)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    factors = [torch.zeros(36, 36, device=device) for _ in range(2)]
    states = [torch.zeros(1, 29 * 16, device=device) for _ in range(2)]
    step(factors[0], states[0], x)
    compiled(factors[1], states[1], x)
    assert torch.equal(*factors) and torch.equal(*states)


# ---- what is refused ------------------------------------------------------------------------------------------------

STATE, X, FACTOR = torch.zeros(1, 29 * 16), torch.zeros(2, 4, 5, 5), torch.zeros(36, 36)
FORM = {"kernel_size": [3, 3], "padding_before": [1, 1], "padding_after": [1, 1], "dilation": [1, 1]}
LAGS = {"state": STATE, "x": X, **FORM, "groups": 1, "bias": False, "fft": False, "beta": 1.0, "alpha": 1.0}
EXPAND = {"factor": FACTOR, "state": STATE, **FORM, "groups": 1, "bias": False, "beta": 0.0, "alpha": 1.0}
FLOATS = "expected float32, float64, bfloat16 or float16, got"
BAD = [
    ("conv_lags_", {"x": X[0]}, r"kernel_size: expected 1 numbers, got 2"),
    ("conv_lags_", {"x": X.int()}, rf"x: {FLOATS} Int"),
    ("conv_lags_", {"kernel_size": [3, 3, 3]}, "kernel_size: expected 1 or 2 numbers, got 3"),
    ("conv_lags_", {"kernel_size": [3, 0]}, "kernel_size: expected at least 1, got 0"),
    ("conv_lags_", {"padding_before": [1, -1]}, "padding_before: expected at least 0, got -1"),
    ("conv_lags_", {"padding_after": [1]}, "padding_after: expected 2 numbers, got 1"),
    ("conv_lags_", {"dilation": [0, 1]}, "dilation: expected at least 1, got 0"),
    ("conv_lags_", {"dilation": [4, 1]}, "kernel_size: expected a kernel that fits into the padded input, got one of"),
    ("conv_lags_", {"groups": 3}, "groups: expected a divisor of 4 channels, got 3"),
    ("conv_lags_", {"groups": 2}, r"state: expected shape \(2, 116\), got \(1, 464\)"),
    ("conv_lags_", {"bias": True}, r"state: expected shape \(1, 501\), got \(1, 464\)"),
    ("conv_lags_", {"state": STATE.double()}, "state: expected Float, got Double"),
    ("conv_lags_", {"state": torch.zeros(116, 2).mT, "groups": 2}, "state: expected a contiguous tensor"),
    ("conv_lags_", {"beta": float("nan")}, "beta: expected a finite number, got nan"),
    ("conv_lags_", {"alpha": float("inf")}, "alpha: expected a finite number, got inf"),
    ("conv_lags_", {"refused": torch.zeros(1)}, "refused: expected Int, got Float"),
    (
        "conv_expand_",
        {"state": STATE[:, :463]},
        r"state: expected the sums of a kernel of 9 offsets, got shape \(1, 463\)",
    ),
    ("conv_expand_", {"state": STATE[0]}, r"state: expected 2 dimensions, got shape \(464,\)"),
    ("conv_expand_", {"state": STATE.half()}, "state: expected Float or Double, got Half"),
    ("conv_expand_", {"groups": 0}, "groups: expected at least 1, got 0"),
    ("conv_expand_", {"factor": FACTOR[1:]}, r"factor: expected shape \(36, 36\), got \(35, 36\)"),
    ("conv_expand_", {"factor": FACTOR.double()}, "factor: expected Float, got Double"),
    ("conv_expand_", {"beta": float("inf")}, "beta: expected a finite number, got inf"),
]


@pytest.mark.parametrize("fake", [False, True], ids=["real", "fake"])
@pytest.mark.parametrize(("name", "changed", "message"), BAD)
def test_errors_name_argument_expected_and_got(name, changed, message, fake):
    arguments = (LAGS | {"refused": None} if name == "conv_lags_" else EXPAND) | changed
    if fake:
        arguments = {key: a.to("meta") if isinstance(a, Tensor) else a for key, a in arguments.items()}
    with pytest.raises(RuntimeError, match=f"{name}: {message}"):
        getattr(torch.ops.mfac_kernels, name)(**arguments)
