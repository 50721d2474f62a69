"""Inputs for every op of the library: what the fake run, compute-sanitizer and the CUDA-graph tests have in common.

An op that is new needs an entry here: until it has one, tests/ops/test_samples.py and tools/run_ops.py name it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from mfac_kernels.ops.lags import conv2d_lags_size

Arguments = tuple[Any, ...]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
M, D = 37, 8229  # no multiple of a vector, a warp, a tile or a chunk


class Inputs:
    """Random tensors on a device, the same for the same seed. Made by factories alone, so also under FakeTensorMode."""

    def __init__(self, device: str, seed: int) -> None:
        self.device = device
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64).to(self.device, dtype)

    def zeros(self, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.zeros(*shape, dtype=dtype, device=self.device)

    def spd(self, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """(..., n, n), well conditioned"""
        n = shape[-1]
        root = self.normal(*shape, 2 * n, dtype=torch.float64)
        return (root @ root.mT / n + torch.eye(n, device=self.device)).to(dtype)

    def counters(self, seen: int) -> Tensor:
        return torch.tensor([seen, 0], device=self.device)

    def core(self, seen: int) -> tuple[Tensor, Tensor, Tensor]:
        """Gram matrix, factor and state of a full window"""
        gram, factor, state = self.spd(M), self.zeros(M, M), self.counters(seen)
        torch.ops.mfac_kernels.core_refactor_(gram, factor, state, 0.1, False)
        return gram, factor, state


SAMPLES: dict[str, Callable[[Inputs], Iterator[Arguments]]] = {}


def samples_of(op: str) -> Callable[[Callable[[Inputs], Iterator[Arguments]]], None]:
    def register(make: Callable[[Inputs], Iterator[Arguments]]) -> None:
        SAMPLES[op] = make

    return register


def all_ops() -> list[str]:
    """The names of the library's ops on tensors, as torch knows them."""
    prefix = "mfac_kernels::"
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith(prefix)]
    return sorted(name.removeprefix(prefix) for name in names if "Tensor" in str(torch._C._get_schema(name, "")))


def missing() -> list[str]:
    """Ops that have no inputs here"""
    return [op for op in all_ops() if op not in SAMPLES]


def cases() -> list[tuple[str, int]]:
    """(op, index of its arguments), for every op that has some"""
    return [(op, i) for op in all_ops() if op in SAMPLES for i, _ in enumerate(SAMPLES[op](Inputs("cpu", 0)))]


def arguments(op: str, index: int, device: str, seed: int = 0) -> Arguments:
    return list(SAMPLES[op](Inputs(device, seed)))[index]


def has_kernel(op: str, device: str) -> bool:
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(f"mfac_kernels::{op}", device.upper()))


def call(op: str, arguments: Arguments) -> Any:
    return getattr(torch.ops.mfac_kernels, op)(*arguments)


def copied(arguments: Arguments) -> Arguments:
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, arguments)


def results(op: str, arguments: Arguments) -> list[Tensor]:
    """What the op returns and, as some are written, its arguments."""
    returned = call(op, arguments)
    return [leaf for leaf in tree_leaves((returned, arguments)) if isinstance(leaf, Tensor)]


# ---- M-FAC, sliding window ------------------------------------------------------------------------------------------


@samples_of("window_insert_")
def _(inputs: Inputs) -> Iterator[Arguments]:
    for dtype in DTYPES:
        yield inputs.normal(M, D, dtype=dtype), inputs.counters(M + 5), inputs.normal(D)
    yield inputs.normal(M, D), inputs.counters(3), inputs.normal(D, dtype=torch.float64)


@samples_of("window_dots")
def _(inputs: Inputs) -> Iterator[Arguments]:
    for dtype in DTYPES:
        yield inputs.normal(M, D, dtype=dtype), inputs.normal(1, D), D
    yield inputs.normal(M, D), inputs.normal(6, D), 3000


@samples_of("window_combine")
def _(inputs: Inputs) -> Iterator[Arguments]:
    for dtype in DTYPES:
        window, coefficients = inputs.normal(M, D, dtype=dtype), inputs.normal(1, 1, M, dtype=torch.float64)
        yield window, coefficients, D, -0.5, inputs.normal(1, D), 1.5, torch.float32
    yield inputs.normal(M, D), inputs.normal(3, 6, M, dtype=torch.float64), 3000, 2.0, None, 0.0, torch.bfloat16


@samples_of("core_insert_")
def _(inputs: Inputs) -> Iterator[Arguments]:
    for seen, per_gradient in ((M + 5, False), (M, True), (0, False)):
        gram, factor, state = inputs.core(seen)
        yield gram, factor, state, inputs.spd(M)[seen % M].contiguous(), 0.1, per_gradient


@samples_of("core_solve")
def _(inputs: Inputs) -> Iterator[Arguments]:
    for seen in (M + 5, M - 7):
        _, factor, state = inputs.core(seen)
        yield factor, state, inputs.normal(3, M, dtype=torch.float64), 0.1, False


@samples_of("core_refactor_")
def _(inputs: Inputs) -> Iterator[Arguments]:
    yield inputs.spd(M), inputs.zeros(M, M), inputs.counters(M + 5), 0.1, False


# ---- M-FAC, fixed gradients -----------------------------------------------------------------------------------------


@samples_of("gram")
def _(inputs: Inputs) -> Iterator[Arguments]:
    for dtype in DTYPES:
        for double_precision in (False, True):
            yield inputs.normal(M, D, dtype=dtype), double_precision


@samples_of("block_gram")
def _(inputs: Inputs) -> Iterator[Arguments]:
    yield inputs.normal(M, D), 100, False


@samples_of("inverse_diagonal")
def _(inputs: Inputs) -> Iterator[Arguments]:
    for dtype in DTYPES:
        yield inputs.normal(M, D, dtype=dtype), inputs.normal(M, M, dtype=torch.float64).tril() / 100, 0.1


@samples_of("block_inverse")
def _(inputs: Inputs) -> Iterator[Arguments]:
    for dtype in (torch.float32, torch.float64):
        yield inputs.normal(M, 333, dtype=dtype), 50, 0.1, float(M)


# ---- batches of symmetric positive definite blocks ------------------------------------------------------------------


def batches(inputs: Inputs, dtype: torch.dtype) -> list[Tensor]:
    return [inputs.spd(*shape, dtype=dtype) for shape in ((40, 16), (3, 5, 33), (2, 100))]


def damped(inputs: Inputs) -> Iterator[Arguments]:
    """What is written, blocks, damping: one for each batch, one for each block, none"""
    for dtype in (torch.float32, torch.float64):
        blocks = batches(inputs, dtype)
        damping = [inputs.zeros(1) + 0.1, inputs.zeros(15) + 0.2, inputs.zeros(1)]
        yield [torch.zeros_like(block) for block in blocks], blocks, damping


@samples_of("cholesky_inverse_ex")
def _(inputs: Inputs) -> Iterator[Arguments]:
    for dtype in DTYPES:
        yield inputs.spd(3, 5, 21, dtype=dtype).mT, 0.1
    yield inputs.spd(4), 1


SAMPLES["cholesky_factor_ex"] = SAMPLES["cholesky_inverse_ex"]


@samples_of("cholesky_inverse_")
def _(inputs: Inputs) -> Iterator[Arguments]:
    for out, blocks, damping in damped(inputs):
        yield out, blocks, damping, None
        yield [torch.zeros_like(t) for t in out], blocks, damping, torch.arange(57).int().to(inputs.device) % 2


@samples_of("cholesky_factor_")
def _(inputs: Inputs) -> Iterator[Arguments]:
    for arguments in damped(inputs):
        yield *arguments, None


@samples_of("cholesky_inverse_factor_")
def _(inputs: Inputs) -> Iterator[Arguments]:
    for upper in (True, False):
        for dtype in (torch.float32, torch.float64):
            blocks = [*batches(inputs, dtype), inputs.spd(1, 140, dtype=dtype)]
            damping = [inputs.zeros(1) + 0.1, inputs.zeros(15) + 0.2, inputs.zeros(1), inputs.zeros(1)]
            yield [torch.zeros_like(block) for block in blocks], blocks, damping, upper, None


@samples_of("triangular_inverse_")
def _(inputs: Inputs) -> Iterator[Arguments]:
    for upper in (True, False):
        for dtype in (torch.float32, torch.float64):
            blocks = [*batches(inputs, dtype), inputs.spd(1, 140, dtype=dtype)]
            yield [torch.zeros_like(block) for block in blocks], blocks, upper


@samples_of("cholesky_solve_")
def _(inputs: Inputs) -> Iterator[Arguments]:
    for dtype in (torch.float32, torch.float64):
        factors = [block.tril() for block in batches(inputs, dtype)]
        yield [inputs.normal(*factor.shape[:-1], 7, dtype=dtype) for factor in factors], factors


# ---- Kronecker factors ----------------------------------------------------------------------------------------------


@samples_of("linear_factor_")
def _(inputs: Inputs) -> Iterator[Arguments]:
    for dtype in DTYPES:
        accumulator = torch.float64 if dtype == torch.float64 else torch.float32
        factor, weights = inputs.spd(130, dtype=accumulator), inputs.normal(7, 50, dtype=accumulator)
        refused = inputs.zeros(1, dtype=torch.int32)
        yield factor, inputs.normal(7, 50, 129, dtype=dtype), weights, True, 0.9, 0.1, refused
    yield inputs.spd(3, 50, dtype=torch.float32), inputs.normal(333, 129), None, False, 0.9, 0.1, None
    for dtype, integer in zip(
        DTYPES, (torch.int64, torch.int32, torch.int64, torch.int32), strict=True
    ):  # ragged groups
        accumulator = torch.float64 if dtype == torch.float64 else torch.float32
        x, weights = inputs.normal(1200, 72, dtype=dtype), inputs.normal(1200, dtype=accumulator)
        offsets = torch.tensor([3, 40, 40, 1180, 1190], dtype=integer).to(inputs.device)
        scales = inputs.zeros(4) + 0.9, inputs.zeros(1) + 0.1
        factors, refused = inputs.spd(4, 73, dtype=accumulator), inputs.zeros(4, dtype=torch.int32)
        yield factors, x, weights, True, 1.0, 1.0, refused, False, offsets, *scales


@samples_of("grouped_linear_factor_")
def _(inputs: Inputs) -> Iterator[Arguments]:
    sizes, dtypes = [(1100, 20), (3, 65), (7, 129), (0, 5), *[(40, 8)] * 10], DTYPES * 4
    for scales in ((None, None), (inputs.zeros(14) + 0.9, inputs.zeros(1) + 0.1)):
        x = [inputs.normal(*size, dtype=dtype) for size, dtype in zip(sizes, dtypes, strict=False)]
        kinds = [torch.float64 if t.dtype == torch.float64 else torch.float32 for t in x]
        bias, pairs = [True, False] * 7, list(zip(x, kinds, strict=True))
        factors = [inputs.spd(t.shape[1] + one, dtype=kind) for (t, kind), one in zip(pairs, bias, strict=True)]
        weights = [None if i % 3 else inputs.normal(len(t), dtype=kind) for i, (t, kind) in enumerate(pairs)]
        refused = inputs.zeros(14, dtype=torch.int32)
        yield factors, x, weights, bias, 0.9, 0.1, None if scales[0] is None else refused, False, *scales


@samples_of("conv_factor_")
def _(inputs: Inputs) -> Iterator[Arguments]:
    square = [3, 3], [1, 1], [1, 1], [1, 1], [1, 1]
    strided = [3, 2], [2, 1], [0, 1], [1, 0], [1, 2]
    for dtype in DTYPES:
        accumulator = torch.float64 if dtype == torch.float64 else torch.float32
        x, refused = inputs.normal(2, 6, 9, 11, dtype=dtype), inputs.zeros(1, dtype=torch.int32)
        yield inputs.spd(55, dtype=accumulator), x, *square, 1, True, False, False, 0.9, 0.1, refused
    x = inputs.normal(2, 6, 9, 11)
    yield inputs.spd(2, 18, dtype=torch.float32), x, *strided, 2, False, False, False, 0.9, 0.1, None
    yield inputs.spd(7, dtype=torch.float32), x, *square, 1, True, True, False, 0.9, 0.1, None
    yield inputs.spd(54, dtype=torch.float32), x, *square, 1, False, False, True, 0.9, 0.1, None
    line = inputs.normal(2, 6, 50)
    yield inputs.spd(18, dtype=torch.float32), line, [3], [1], [1], [1], [1], 1, False, False, False, 0.9, 0.1, None


LAGS = [3, 3], [1, 1], [1, 1], [1, 1]


@samples_of("conv_lags_")
def _(inputs: Inputs) -> Iterator[Arguments]:
    for dtype in DTYPES:
        accumulator = torch.float64 if dtype == torch.float64 else torch.float32
        x, refused = inputs.normal(2, 6, 9, 11, dtype=dtype), inputs.zeros(1, dtype=torch.int32)
        state = inputs.normal(*conv2d_lags_size(6, 3, padding=1, bias=True), dtype=accumulator)
        yield state, x, *LAGS, 1, True, False, 0.9, 0.1, refused
    state = inputs.normal(*conv2d_lags_size(6, 3, padding=1, groups=2))
    yield state, inputs.normal(2, 6, 9, 11), *LAGS, 2, False, False, 0.9, 0.1, None


@samples_of("conv_expand_")
def _(inputs: Inputs) -> Iterator[Arguments]:
    for dtype in (torch.float32, torch.float64):
        state = inputs.normal(*conv2d_lags_size(6, 3, padding=1, bias=True), dtype=dtype)
        yield inputs.spd(55, dtype=dtype), state, *LAGS, 1, True, 0.9, 0.1
    state = inputs.normal(*conv2d_lags_size(6, 3, padding=1, groups=2))
    yield inputs.spd(2, 27, dtype=torch.float32), state, *LAGS, 2, False, 0.9, 0.1


@samples_of("embedding_factor_")
def _(inputs: Inputs) -> Iterator[Arguments]:
    indices = (inputs.normal(3, 500, dtype=torch.float64).abs() * 10).clamp(max=40).to(torch.int64)
    yield inputs.zeros(41, dtype=torch.float32) + 1, indices, 3, 0.9, 0.1


@samples_of("cross_factor")
def _(inputs: Inputs) -> Iterator[Arguments]:
    for dtype in DTYPES:
        accumulator = torch.float64 if dtype == torch.float64 else torch.float32
        weights = inputs.normal(7, 50, dtype=accumulator)
        yield inputs.normal(7, 50, 65, dtype=dtype), inputs.normal(7, 50, 33, dtype=dtype), weights
