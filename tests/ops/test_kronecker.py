"""Kronecker factors against explicit rows in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import example, given
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


# ---- linear ---------------------------------------------------------------------------------------------------------

features = st.one_of(
    st.integers(0, 40), st.sampled_from([63, 64, 65, 100] if SIMT else [63, 64, 65, 127, 129, 200, 257])
)


@given(
    lead=st.lists(st.integers(0, 9), min_size=0, max_size=3),
    d=features,
    bias=st.booleans(),
    weighted=st.booleans(),
    block=st.sampled_from([None, 1, 7, 32]),
    beta=st.sampled_from([0.0, 0.9, 1.0]),
    alpha=st.sampled_from([1.0, 0.25, -1.0]),
    dtype=dtypes,
    seed=seeds,
)
@example(  # rows of a bias alone
    lead=[1], d=0, bias=True, weighted=False, block=None, beta=0.9, alpha=1.0, dtype=torch.bfloat16, seed=0
)
def test_linear_factor(lead, d, bias, weighted, block, beta, alpha, dtype, seed, instruction_set, device):
    x = strided(random((*lead, d), dtype, seed), seed)
    weights = random(tuple(lead), factor_dtype(dtype), seed + 2) if weighted else None
    width = d + bias
    want = reference.linear_factor(x, weights, bias)
    size = reference.linear_factor(x.abs(), None if weights is None else weights.abs(), bias)
    old = random((width, width), factor_dtype(dtype), seed + 1)
    old = old + old.mT
    if block:
        want, size, old = (blocks_of(t, block) for t in (want, size, old))
    expected = beta * old.double() + alpha * want
    factor = (torch.full_like(old, float("nan")) if beta == 0 else old.clone()).to(device)
    ops.linear_factor_(
        factor, x.to(device), beta=beta, alpha=alpha, bias=bias, weights=None if weights is None else weights.to(device)
    )
    assert_factor(factor.cpu(), expected, beta * old.double().abs() + abs(alpha) * size, math.prod(lead), dtype)


# Many rows; many columns; both kinds of blocks.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "d", "block"), [(20_000, 9, None), (70, 600, None), (1100, 130, 64), (33, 1000, 100)])
def test_linear_factor_sizes(rows, d, block, dtype, instruction_set, device):
    if SIMT:
        rows, d = rows // 10, d // 4
    x = random((rows, d), dtype, 1)
    want, size = reference.linear_factor(x, bias=True), reference.linear_factor(x.abs(), bias=True)
    if block:
        want, size = blocks_of(want, block), blocks_of(size, block)
    factor = torch.zeros(want.shape, dtype=factor_dtype(dtype), device=device)
    ops.linear_factor_(factor, x.to(device), bias=True)
    assert_factor(factor.cpu(), want, size, min(rows, 512), dtype)


@pytest.mark.skipif(SIMT, reason="too long for an interpreter")
def test_long_sums_keep_their_digits(instruction_set):
    """300,000 rows of mean 1: a float32 sum in sequence loses 1e-3."""
    x = random((300_000, 8), torch.float32, 1)
    factor = torch.zeros(8, 8)
    ops.linear_factor_(factor, x)
    want = reference.linear_factor(x)
    assert float((factor - want).norm() / want.norm()) <= 1e-6


def test_rows_far_apart(device):
    """Offsets beyond 2^31; the memory between the rows is never touched."""
    far = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=device).as_strided((2, 50), (2**31 + 5, 1))
    far.copy_(random((2, 50), torch.bfloat16, 0))
    factors = [torch.zeros(50, 50, device=device) for _ in range(2)]
    for factor, x in zip(factors, (far, far.contiguous()), strict=True):
        ops.linear_factor_(factor, x)
    assert torch.equal(*factors)


# ---- convolution ----------------------------------------------------------------------------------------------------


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


def check_conv(
    conv: Conv,
    dtype: torch.dtype,
    device: str,
    beta: float = 0.9,
    alpha: float = 0.5,
    block: int | None = None,
    **how: object,
) -> None:
    x = conv.input(dtype)
    want, size = conv.reference(x), conv.reference(x.abs())
    old = random(tuple(want.shape), factor_dtype(dtype), conv.seed + 1)
    old = old + old.mT
    if block:
        want, size, old = (blocks_of(t, block) for t in (want, size, old))
    factor = (torch.full_like(old, float("nan")) if beta == 0 else old.clone()).to(device)
    expected = beta * old.double() + alpha * want
    conv.accumulate(factor, x.to(device), beta=beta, alpha=alpha, **how)
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


RESNET = Conv(2, 24, 1, (16, 16), (3, 3), (1, 1), (1, 1), (1, 1), False, "full", "expand", 0)


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


# ---- embedding, cross -----------------------------------------------------------------------------------------------


@given(
    shape=st.lists(st.integers(0, 8), min_size=0, max_size=3),
    count=st.integers(1, 50),
    padding=st.booleans(),
    dtype=st.sampled_from([torch.int64, torch.int32]),
    seed=seeds,
)
def test_embedding_factor(shape, count, padding, dtype, seed, device):
    indices = torch.randint(0, count, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    padding_idx = seed % count if padding else None
    old = torch.arange(count, dtype=torch.float32)
    factor = old.clone().to(device)
    ops.embedding_factor_(factor, strided(indices, seed % 2).to(device), padding_idx=padding_idx, beta=0.5, alpha=2.0)
    want = 0.5 * old + 2 * reference.embedding_factor(indices, count, padding_idx)
    torch.testing.assert_close(factor.cpu().double(), want.double(), rtol=1e-6, atol=0)


@given(
    lead=st.lists(st.integers(0, 12), min_size=1, max_size=2),
    d=st.integers(0, 70),
    e=st.integers(0, 70),
    weighted=st.booleans(),
    dtype=dtypes,
    seed=seeds,
)
def test_cross_factor(lead, d, e, weighted, dtype, seed, instruction_set, device):
    x, y = (strided(random((*lead, k), dtype, seed + k), seed) for k in (d, e))
    weights = random(tuple(lead), factor_dtype(dtype), seed) if weighted else None
    got = ops.cross_factor(x.to(device), y.to(device), None if weights is None else weights.to(device)).cpu()
    want = reference.cross_factor(x, y, weights)
    size = reference.cross_factor(x.abs(), y.abs(), None if weights is None else weights.abs())
    assert got.dtype == factor_dtype(dtype)
    assert got.shape == (d, e)
    assert bool(((got - want).abs() <= (math.prod(lead) + 4) * torch.finfo(got.dtype).eps * size).all())


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_rows_change_nothing(value, dtype, instruction_set, device):
    x = random((2, 40, 33), dtype, 1)
    x[1, 37, 31] = value
    old = random((34, 34), factor_dtype(dtype), 1)
    old = old + old.mT
    factor = old.clone().to(device)
    flag = ops.linear_factor_(factor, x.to(device), bias=True, beta=0.5, check_finite=True)
    assert flag.tolist() == [1] and torch.equal(factor.cpu(), old)
    flag = ops.linear_factor_(factor, x[:1].to(device), bias=True, beta=0.5, check_finite=True)
    assert flag.tolist() == [0] and not torch.equal(factor.cpu(), old)


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


@pytest.mark.skipif(SIMT, reason="threads of the CPU")
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_any_number_of_threads(dtype, threads, instruction_set):
    x, images = random((3000, 70), dtype, 0), random((4, 40, 12, 12), dtype, 0)

    def results() -> list[Tensor]:
        kind = factor_dtype(dtype)
        linear, conv = torch.zeros(71, 71, dtype=kind), torch.zeros(360, 360, dtype=kind)
        depthwise, sua = torch.zeros(40, 9, 9, dtype=kind), torch.zeros(40, 40, dtype=kind)
        ops.linear_factor_(linear, x, bias=True)
        ops.conv2d_factor_(conv, images, 3, padding=1)
        ops.conv2d_factor_(depthwise, images, 3, stride=2, groups=40)
        ops.conv2d_factor_(sua, images, 3, padding=1, spatial="sua")
        return [linear, conv, depthwise, sua, ops.cross_factor(x[:, :30], x[:, 30:])]

    threads(1)
    once = results()
    for count in (1, 2, 3):
        threads(count)
        for got, want in zip(results(), once, strict=True):
            assert torch.equal(got, want)


# ---- the ops themselves ----------------------------------------------------------------------------------------------

ROWS, IMAGES = torch.ones(6, 5), torch.ones(2, 4, 5, 5)
GEOMETRY = ([3, 3], [1, 1], [1, 1], [1, 1], [1, 1])  # kernel_size, stride, padding before and after, dilation


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    kind = factor_dtype(dtype)
    x, images = random((6, 5), dtype, 0), random((2, 4, 5, 5), dtype, 1)
    refused = torch.zeros(1, dtype=torch.int32)
    for name, arguments in (
        ("linear_factor_", (torch.zeros(6, 6, dtype=kind), x, torch.ones(6, dtype=kind), True, 0.5, 2.0, refused)),
        ("linear_factor_", (torch.zeros(2, 3, 3, dtype=kind), x, None, False, 0.0, 1.0, None)),
        (
            "conv_factor_",
            (torch.zeros(37, 37, dtype=kind), images, *GEOMETRY, 1, True, False, False, 0.5, 1.0, refused),
        ),
        ("conv_factor_", (torch.zeros(2, 2, 2, dtype=kind), images, *GEOMETRY, 2, False, True, True, 0.5, 1.0, None)),
        ("embedding_factor_", (torch.zeros(5, dtype=kind), torch.arange(5), 0, 0.5, 1.0)),
        ("cross_factor", (x, random((6, 3), dtype, 2), None)),
    ):
        torch.library.opcheck(getattr(torch.ops.mfac_kernels, name).default, arguments)


def test_compiles_to_one_graph():
    def accumulate(x: Tensor, images: Tensor) -> tuple[Tensor, ...]:
        linear, conv = x.new_zeros(6, 6), x.new_zeros(37, 37)
        flag = ops.linear_factor_(linear, x, bias=True, check_finite=True)
        ops.conv2d_factor_(conv, images, 3, padding="same", bias=True, beta=0.5, check_finite=flag, algorithm="tiles")
        return linear, conv, flag, ops.cross_factor(x, x)

    x, images = random((6, 5), torch.float32, 0), random((2, 4, 5, 5), torch.float32, 1)
    compiled = torch.compile(accumulate, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(x, images), accumulate(x, images), strict=True):
        assert torch.equal(got, want)


FLOATS = "expected float32, float64, bfloat16 or float16, got"
END = (1, False, False, False, 1.0, 1.0, None)  # groups, bias, sua, reduce, beta, alpha, refused
BAD = [
    ("linear_factor_", (torch.zeros(5, 5), ROWS.int(), None, False, 1.0, 1.0, None), rf"x: {FLOATS} Int"),
    (
        "linear_factor_",
        (torch.zeros(5, 5), torch.ones(()), None, False, 1.0, 1.0, None),
        r"x: expected at least 1 dimension, got shape \(\)",
    ),
    (
        "linear_factor_",
        (torch.zeros(5, 5), ROWS, None, True, 1.0, 1.0, None),
        r"factor: expected shape \(6, 6\), got \(5, 5\)",
    ),
    (
        "linear_factor_",
        (torch.zeros(5, 5).double(), ROWS, None, False, 1.0, 1.0, None),
        "factor: expected Float, got Double",
    ),
    (
        "linear_factor_",
        (torch.zeros(2, 2, 2), ROWS, None, False, 1.0, 1.0, None),
        r"factor: expected shape \(3, 2, 2\), got \(2, 2, 2\)",
    ),
    (
        "linear_factor_",
        (torch.zeros(5, 5).mT, ROWS, None, False, 1.0, 1.0, None),
        "factor: expected a contiguous tensor",
    ),
    (
        "linear_factor_",
        (torch.zeros(5, 5), ROWS, torch.ones(5), False, 1.0, 1.0, None),
        r"weights: expected the leading shape of x, got \(5,\) for x of shape \(6, 5\)",
    ),
    (
        "linear_factor_",
        (torch.zeros(5, 5), ROWS, torch.ones(6).double(), False, 1.0, 1.0, None),
        "weights: expected Float, got Double",
    ),
    (
        "linear_factor_",
        (torch.zeros(5, 5), ROWS, None, False, float("nan"), 1.0, None),
        "beta: expected a finite number, got nan",
    ),
    (
        "linear_factor_",
        (torch.zeros(5, 5), ROWS, None, False, 1.0, 1.0, torch.zeros(1)),
        "refused: expected Int, got Float",
    ),
    (
        "conv_factor_",
        (torch.zeros(36, 36), IMAGES[0, 0], *GEOMETRY, *END),
        r"x: expected 3 to 5 dimensions, got shape \(5, 5\)",
    ),
    ("conv_factor_", (torch.zeros(36, 36), IMAGES, [3], *GEOMETRY[1:], *END), "kernel_size: expected 2 numbers, got 1"),
    (
        "conv_factor_",
        (torch.zeros(36, 36), IMAGES, [3, 3], [1, 0], *GEOMETRY[2:], *END),
        "stride: expected at least 1, got 0",
    ),
    (
        "conv_factor_",
        (torch.zeros(36, 36), IMAGES, [3, 9], *GEOMETRY[1:], *END),
        "kernel_size: expected a kernel that fits into the padded input, got one of extent 9 for 7 in dimension 3",
    ),
    (
        "conv_factor_",
        (torch.zeros(36, 36), IMAGES, *GEOMETRY, 3, *END[1:]),
        "groups: expected a divisor of 4 channels, got 3",
    ),
    (
        "conv_factor_",
        (torch.zeros(36, 36), IMAGES, *GEOMETRY, 2, *END[1:]),
        r"factor: expected shape \(2, 18, 18\), got \(36, 36\)",
    ),
    (
        "embedding_factor_",
        (torch.zeros(5, 1), torch.arange(5), None, 1.0, 1.0),
        r"counts: expected 1 dimension, got shape \(5, 1\)",
    ),
    ("embedding_factor_", (torch.zeros(5), ROWS, None, 1.0, 1.0), "indices: expected int32 or int64, got Float"),
    ("cross_factor", (ROWS, ROWS.long(), None), rf"y: {FLOATS} Long"),
    ("cross_factor", (ROWS, ROWS.double(), None), "y: expected Float, as x has, got Double"),
    ("cross_factor", (ROWS, ROWS[:1], None), "y: expected the leading shape of x, got"),
]


@pytest.mark.parametrize("fake", [False, True], ids=["real", "fake"])
@pytest.mark.parametrize(("name", "arguments", "message"), BAD, ids=lambda v: v if isinstance(v, str) else "")
def test_errors_name_argument_expected_and_got(name, arguments, message, fake):
    kept = arguments[0].clone()
    given = tuple(a.to("meta") if fake and isinstance(a, Tensor) else a for a in arguments)
    with pytest.raises(RuntimeError, match=f"{name}: {message}"):
        getattr(torch.ops.mfac_kernels, name)(*given)
    assert torch.equal(arguments[0], kept)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"spatial": "half"}, 'spatial: expected "full" or "sua", got "half"'),
        ({"approximation": "sum"}, 'approximation: expected "expand" or "reduce", got "sum"'),
        ({"padding": "half"}, 'padding: expected numbers, "same" or "valid", got "half"'),
        ({"padding": "same", "stride": 2}, "padding: expected numbers with a stride"),
        ({"dilation": (1, 1, 1)}, r"dilation: expected 1 or 2 numbers, got \(1, 1, 1\)"),
        ({"algorithm": "magic"}, "algorithm: expected"),
        ({"algorithm": "fft", "stride": 2}, "algorithm: expected"),
    ],
)
def test_errors_of_the_python_surface(arguments, message):
    with pytest.raises(RuntimeError, match=f"conv2d_factor_: {message}"):
        ops.conv2d_factor_(torch.zeros(36, 36), IMAGES, 3, **arguments)


def test_a_dilation_without_end():
    with pytest.raises(RuntimeError, match="kernel_size: expected a kernel that fits into the padded input"):
        ops.conv2d_factor_(torch.zeros(25, 25), torch.zeros(1, 1, 4, 4), 5, dilation=2**62, algorithm="tiles")


@pytest.mark.skipif(SIMT, reason="there are tiles alone")
def test_long_kernels_are_left_to_tiles():
    """What the compressed form costs beside its sums grows with the square of the offsets."""
    x = random((2, 1, 600), torch.float32, 0)
    factors = [torch.zeros(200, 200) for _ in range(2)]
    for factor, algorithm in zip(factors, ("auto", "tiles"), strict=True):
        ops.conv1d_factor_(factor, x, 200, algorithm=algorithm)
    assert torch.equal(*factors)


def test_an_index_out_of_range():
    counts = torch.zeros(5)
    message = "out of range" if SIMT else "expected 0 to 4, got 5"  # a device assertion has no values to show
    with pytest.raises(RuntimeError, match=f"embedding_factor_: indices: {message}"):
        ops.embedding_factor_(counts, torch.tensor([0, 5]))
    assert not counts.any()
