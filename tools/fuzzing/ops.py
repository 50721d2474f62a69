"""mfac_kernels.ops: right arguments of every op, one of them then perhaps not."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from fuzzing.draw import Arguments, Draw, Work
from fuzzing.outcome import REFUSED, attempt, expect, expect_finite, tensors
from fuzzing.surface import surface
from mfac_kernels import ops

Make = Callable[[Draw], Arguments]


def op(name: str, sound: Iterable[str] = ()) -> Callable[[Make], Make]:
    """A surface: ``ops.name`` of the arguments made, whose results and writings are finite if the arguments were."""

    def register(make: Make) -> Make:
        @surface(f"ops.{name}")
        def _(draw: Draw) -> None:
            arguments = draw.flawed(make(draw), sound)
            call = getattr(ops, name)
            result = attempt(lambda: call(**arguments), tensors(arguments))
            if result is REFUSED:
                return
            if name.endswith("_ex"):
                check_codes(draw, name, *result)
            elif draw.tame and not name.startswith("robust"):
                expect_finite(name, (result, list(arguments.values())))

        return make

    return register


def check_codes(draw: Draw, name: str, result: Any, info: Any) -> None:
    """Blocks with a code are NaN; others are finite if the arguments were."""
    many = isinstance(result, list)
    for x, codes in zip(result if many else [result], info if many else [info], strict=True):
        expect(codes.dtype == torch.int32 and codes.shape == x.shape[:-2], f"{name}: expected a code for each block")
        if x.numel():
            failed = codes != 0
            expect(bool(x[failed].isnan().all()) or "factor" in name or "triangular" in name, f"{name}: expected NaN")
            if draw.tame:
                expect_finite(name, x[~failed])


# ---- M-FAC, sliding window ------------------------------------------------------------------------------------------


def rows(draw: Draw, m: int, d: int, dtype: torch.dtype) -> Tensor:
    """(m, d), rows contiguous, the matrix not always."""
    wide = draw.valued(draw.normal(m, d + draw.pick((0, 3)), dtype=dtype))
    return wide[:, :d]


def counters(draw: Draw, m: int) -> Tensor:
    return torch.tensor([draw.pick((0, 1, m, 2 * m + 1)), 0])


def core(draw: Draw, m: int) -> Arguments:
    """Of a window whose Gram matrix is well conditioned."""
    root = draw.normal(m, m, dtype=torch.float64)
    gram, state = root @ root.mT, counters(draw, m)
    shift, per_gradient = draw.positive(), draw.bool()
    factor = torch.zeros_like(gram)
    ops.core_refactor_(gram, factor, state, shift, per_gradient)
    return {"gram": gram, "factor": factor, "state": state, "shift": shift, "per_gradient": per_gradient}


@op("window_insert_")
def _(draw: Draw) -> Arguments:
    m, d = draw.size(), draw.size()
    window = rows(draw, m, d, draw.dtype())
    return {"window": window, "state": counters(draw, m), "g": draw.tensor(d, dtype=draw.dtype())}


@op("window_dots")
def _(draw: Draw) -> Arguments:
    m, d = draw.size(), draw.size()
    x = rows(draw, draw.size(), d, draw.dtype())
    return {"window": rows(draw, m, d, draw.dtype()), "x": x, "block_size": draw.pick((1, 7, 200))}


@op("window_combine")
def _(draw: Draw) -> Arguments:
    m, k, d, size = draw.size(), draw.size(), draw.size(), draw.pick((1, 7, 200))
    arguments: Arguments = {
        "window": rows(draw, m, d, draw.dtype()),
        "coefficients": draw.tensor(math.ceil(d / size), k, m, dtype=torch.float64, strided=False),
        "beta": 0.5,
        "alpha": 1.5,
        "block_size": size,
        # 16-bit results of ordinary numbers may well overflow
        "dtype": draw.dtype((torch.float32, torch.float64)),
    }
    if draw.bool():
        arguments["x"] = rows(draw, k, d, draw.dtype())
    return arguments


@op("core_insert_")
def _(draw: Draw) -> Arguments:
    m = draw.int(1, 9)
    return {**core(draw, m), "dots": draw.normal(m, dtype=torch.float64).abs() + 1}


@op("core_solve")
def _(draw: Draw) -> Arguments:
    m = draw.int(1, 9)
    arguments = core(draw, m)
    del arguments["gram"]
    return {**arguments, "b": draw.tensor(draw.size(), m, dtype=torch.float64, strided=False)}


@op("core_refactor_")
def _(draw: Draw) -> Arguments:
    return core(draw, draw.int(1, 9))


# ---- M-FAC, fixed gradients -----------------------------------------------------------------------------------------


@op("gram")
def _(draw: Draw) -> Arguments:
    return {"g": rows(draw, draw.size(), draw.size(), draw.dtype()), "double_precision": draw.bool()}


@op("block_gram")
def _(draw: Draw) -> Arguments:
    g = rows(draw, draw.size(), draw.size(), draw.dtype())
    return {"g": g, "block_size": draw.pick((1, 7, 200)), "double_precision": draw.bool()}


@op("inverse_diagonal")
def _(draw: Draw) -> Arguments:
    m = draw.size()
    transform = draw.tensor(m, m, dtype=torch.float64, strided=False) / 100
    return {"g": rows(draw, m, draw.size(), draw.dtype()), "transform": transform, "damping": draw.positive()}


@op("block_inverse")
def _(draw: Draw) -> Arguments:
    g = rows(draw, draw.size(), draw.size(), draw.dtype())
    return {"g": g, "block_size": draw.pick((1, 7, 200)), "damping": draw.positive(), "count": 5.0}


# ---- batches of blocks ----------------------------------------------------------------------------------------------


def batch_shape(draw: Draw) -> tuple[int, ...]:
    return draw.pick(((), (1,), (3,), (2, 2), (0,), (40,)))


def blocks(draw: Draw, *, out: bool = True, damping: bool = True) -> Arguments:
    shape, n = batch_shape(draw), draw.size()
    if draw.chance(10):
        shape, n = (2,), 140
    dtype = draw.dtype()
    arguments: Arguments = {"blocks": draw.spd(*shape, n, dtype=dtype)}
    if damping:
        each = torch.full(shape, draw.positive(), dtype=torch.float64).to(draw.dtype((torch.float32, torch.float64)))
        arguments["damping"] = each if draw.chance(3) else draw.positive()
    if out and draw.chance(3):
        arguments["out"] = draw.laid(torch.zeros(*shape, n, n, dtype=draw.dtype((torch.float32, torch.float64))))
    elif draw.chance(3):
        arguments["dtype"] = draw.dtype((torch.float32, torch.float64))
    if out and draw.chance(8) and dtype in (torch.float32, torch.float64):
        arguments.pop("dtype", None)
        arguments["out"] = arguments["blocks"]
    if dtype in (torch.bfloat16, torch.float16):
        draw.tame = False  # rounding makes blocks indefinite, or inverses large
    return arguments


def batches(draw: Draw) -> Arguments:
    several = [draw.spd(*batch_shape(draw), draw.size(), dtype=draw.dtype()) for _ in range(draw.int(0, 4))]
    return {"batches": several, "damping": draw.positive()}


def with_factor_options(draw: Draw, arguments: Arguments) -> Arguments:
    return {**arguments, "upper": draw.bool(), "relative": draw.bool(), "dead": draw.pick((None, True, False))}


for name in ("cholesky_inverse_ex", "cholesky_inverse"):
    op(name)(blocks)
for name in ("cholesky_factor_ex", "cholesky_factor"):
    op(name)(lambda draw: {**blocks(draw), "upper": draw.bool()})
for name in ("cholesky_inverse_factor_ex", "cholesky_inverse_factor"):
    op(name)(lambda draw: with_factor_options(draw, blocks(draw)))
for name in ("triangular_inverse_ex", "triangular_inverse"):
    op(name)(lambda draw: {**blocks(draw, damping=False), "upper": draw.bool()})
op("grouped_cholesky_inverse_ex")(batches)
op("grouped_cholesky_inverse_factor_ex")(lambda draw: with_factor_options(draw, batches(draw)))
op("robust_cholesky_inverse")(lambda draw: {**batches(draw), "growth": 10.0, "bound": 1.0})
op("robust_cholesky_inverse_factor")(lambda draw: {**with_factor_options(draw, batches(draw)), "growth": 2.0})


@op("cholesky_solve")
def _(draw: Draw) -> Arguments:
    shape, n = batch_shape(draw), draw.size()
    dtype = draw.dtype((torch.float32, torch.float64))
    factor = draw.normal(*shape, n, n, dtype=dtype) / 10 + 2 * torch.eye(n, dtype=dtype)
    return {"factor": draw.laid(factor), "b": draw.tensor(*shape, n, draw.size(), dtype=dtype)}


@op("diagonal_blocks")
def _(draw: Draw) -> Arguments:
    n = draw.size()
    return {"matrix": draw.tensor(*batch_shape(draw), n, n, dtype=draw.dtype()), "block_size": draw.pick((1, 4, 200))}


def block_diagonal(draw: Draw) -> tuple[list[Tensor], int, torch.dtype]:
    dtype = draw.dtype()
    sizes = [(draw.int(0, 3), draw.int(0, 5)) for _ in range(draw.int(0, 3))]
    return [draw.tensor(g, s, s, dtype=dtype) for g, s in sizes], sum(g * s for g, s in sizes), dtype


@op("block_diagonal_matmul")
def _(draw: Draw) -> Arguments:
    several, dim, dtype = block_diagonal(draw)
    return {"blocks": several, "x": draw.tensor(dim, draw.size(), dtype=dtype)}


@op("matmul_block_diagonal")
def _(draw: Draw) -> Arguments:
    several, dim, dtype = block_diagonal(draw)
    return {"x": draw.tensor(draw.size(), dim, dtype=dtype), "blocks": several}


# ---- Kronecker factors ----------------------------------------------------------------------------------------------


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def factor_of(draw: Draw, width: int, dtype: torch.dtype) -> Tensor:
    """Dense, or its block diagonal."""
    if draw.chance(3) and width:
        size = draw.int(1, width)
        return torch.zeros(math.ceil(width / size), size, size, dtype=dtype)
    return torch.zeros(width, width, dtype=dtype)


def scales(draw: Draw) -> Arguments:
    return {"beta": draw.pick((0.0, 0.9, 1.0)), "alpha": draw.pick((0.0, 0.1, -1.0)), "check_finite": draw.bool()}


@op("linear_factor_")
def _(draw: Draw) -> Arguments:
    n, d, dtype, bias = draw.size(), draw.size(), draw.dtype(), draw.bool()
    kind = accumulator(dtype)
    arguments: Arguments = {"factor": factor_of(draw, d + bias, kind), "bias": bias, **scales(draw)}
    arguments["x"] = draw.tensor(*draw.pick(((n, d), (2, n, d))), dtype=dtype)
    if draw.bool():
        arguments["weights"] = draw.tensor(*arguments["x"].shape[:-1], dtype=kind)
    if draw.chance(3):
        cuts = sorted(draw.int(0, n) for _ in range(draw.int(1, 4)))
        arguments["x"] = draw.tensor(n, d, dtype=dtype)
        arguments["offsets"] = torch.tensor(cuts, dtype=draw.pick((torch.int32, torch.int64)))
        arguments["factor"] = torch.zeros(len(cuts) - 1, d + bias, d + bias, dtype=kind)
        arguments.pop("weights", None)
    if draw.chance(3):
        arguments["beta"] = torch.tensor(0.5, dtype=torch.float64)
    return arguments


@op("grouped_linear_factor_")
def _(draw: Draw) -> Arguments:
    xs = [draw.tensor(draw.size(), draw.size(), dtype=draw.dtype()) for _ in range(draw.int(0, 3))]
    bias = [draw.bool() for _ in xs]
    factors = [factor_of(draw, x.shape[1] + b, accumulator(x.dtype)) for x, b in zip(xs, bias, strict=True)]
    return {"factors": factors, "xs": xs, "bias": bias, **scales(draw)}


def convolution(draw: Draw, dims: int, *, strides: bool = True) -> Arguments:
    groups, channels = draw.int(1, 2), draw.int(1, 4)
    sizes = [draw.int(1, 9) for _ in range(dims)]
    kernel = [draw.int(1, 3) for _ in range(dims)]
    arguments: Arguments = {
        "x": draw.tensor(draw.int(0, 3), groups * channels, *sizes, dtype=draw.dtype()),
        "kernel_size": kernel,
        "padding": draw.pick((Work(0), Work(1), Work(2), "valid", "same")),
        "dilation": draw.int(1, 2),
        "groups": groups,
        "bias": draw.bool(),
    }
    if strides:
        arguments["stride"] = draw.int(1, 3)
    return arguments


def conv_factor(draw: Draw, dims: int) -> Arguments:
    arguments = convolution(draw, dims)
    spatial = draw.pick(("full", "full", "sua"))
    channels = arguments["x"].shape[1] // arguments["groups"]
    width = channels * (1 if spatial == "sua" else math.prod(arguments["kernel_size"])) + arguments["bias"]
    kind = accumulator(arguments["x"].dtype)
    factor = torch.zeros(arguments["groups"], width, width, dtype=kind)
    arguments["factor"] = factor if arguments["groups"] > 1 else factor_of(draw, width, kind)
    arguments["approximation"] = draw.pick(("expand", "expand", "reduce"))
    arguments["algorithm"] = draw.pick(("auto", "auto", "tiles", "lags", "fft"))
    return {**arguments, **scales(draw), "spatial": spatial}


for dims in (1, 2, 3):
    op(f"conv{dims}d_factor_")(lambda draw, dims=dims: conv_factor(draw, dims))


@op("conv2d_lags_size")
def _(draw: Draw) -> Arguments:
    arguments = convolution(draw, 2, strides=False)
    return {"channels": arguments.pop("x").shape[1], **arguments}


def lags(draw: Draw) -> tuple[Arguments, tuple[int, int]]:
    arguments = convolution(draw, 2, strides=False)
    form = {name: value for name, value in arguments.items() if name != "x"}
    return arguments, ops.conv2d_lags_size(arguments["x"].shape[1], **form)


@op("conv2d_lags_")
def _(draw: Draw) -> Arguments:
    arguments, size = lags(draw)
    state = torch.zeros(size, dtype=accumulator(arguments["x"].dtype))
    return {**arguments, **scales(draw), "state": state, "algorithm": draw.pick(("auto", "lags", "fft"))}


@op("conv2d_expand_")
def _(draw: Draw) -> Arguments:
    arguments, size = lags(draw)
    x, dtype = arguments.pop("x"), draw.dtype((torch.float32, torch.float64))
    width = x.shape[1] // arguments["groups"] * math.prod(arguments["kernel_size"]) + arguments["bias"]
    many = arguments["groups"] > 1
    factor = torch.zeros(arguments["groups"], width, width, dtype=dtype) if many else factor_of(draw, width, dtype)
    state = draw.tensor(*size, dtype=dtype, strided=False)
    return {**arguments, "factor": factor, "state": state, "beta": 0.5, "alpha": 0.1}


@op("embedding_factor_")
def _(draw: Draw) -> Arguments:
    count = draw.int(1, 40)
    shape = draw.pick(((), (0,), (5,), (3, 50)))
    generator = torch.Generator().manual_seed(draw.int(0, 99))
    indices = torch.randint(0, count, shape, generator=generator).to(draw.pick((torch.int32, torch.int64)))
    factor = torch.zeros(count, dtype=draw.dtype((torch.float32, torch.float64)))
    return {"factor": factor, "indices": indices, "padding_idx": draw.pick((None, 0)), "beta": 0.9, "alpha": 0.1}


@op("cross_factor")
def _(draw: Draw) -> Arguments:
    dtype, shape = draw.dtype(), draw.pick(((5,), (0,), (2, 70), ()))
    x, y = (draw.tensor(*shape, draw.size(), dtype=dtype) for _ in range(2))
    weights = draw.tensor(*shape, dtype=accumulator(dtype)) if draw.bool() else None
    return {"x": x, "y": y, "weights": weights}
