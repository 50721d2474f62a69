"""Kronecker factors accumulated in place: ``factor <- beta * factor + alpha * sum_r w_r row_r row_r^T``.

The rows are those of a linear layer's inputs or the patches of a convolution, straight from the activations: no im2col,
no transposed copy, no column of ones, half of a matrix product's flops. ``beta`` and ``alpha`` are those of
``torch.addmm``; with ``beta=0`` the factor is not read. What comes out is exactly symmetric.

Factors are float32, or float64 for float64 rows. Products of 16-bit rows are exact and summed in float32; on CUDA,
float32 rows are rounded to TF32 where ``torch.backends.cuda.matmul.allow_tf32`` has it. A factor is dense (D, D) or, to
keep only its block diagonal, (g, s, s) with g = ceil(D / s): the rows and columns of the last block past D are zero.

``check_finite=True`` looks for NaN and Inf while reading: such a batch leaves the factor as it is and the flag that is
returned, int32 (1,) on the factor's device, becomes 1. Pass a flag of your own to collect several calls in one: it is
set, never cleared. Nothing synchronises with the device. Where ``beta`` and ``alpha`` may be tensors, as a running mean
wants them, their values are read on the device: only ``check_finite`` looks whether they are finite.

Sources: Grosse, Martens, "A Kronecker-factored approximate Fisher matrix for convolution layers", ICML 2016; Laurent et
al., "An evaluation of Fisher approximations beyond Kronecker factorization", ICLR workshop 2018 (spatially uncorrelated
activations, channel groups); Eschenhagen et al., "Kronecker-factored approximate curvature for modern neural network
architectures", NeurIPS 2023 (expand, reduce).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from mfac_kernels.ops import _conv_cost, _kronecker_fakes, _lags_form
from mfac_kernels.ops._checks import check
from mfac_kernels.ops._geometry import Geometry, Sizes, geometry_of

__all__ = [
    "conv1d_factor_",
    "conv2d_factor_",
    "conv3d_factor_",
    "cross_factor",
    "embedding_factor_",
    "grouped_linear_factor_",
    "linear_factor_",
]

_ops = torch.ops.mfac_kernels

Scale = float | Tensor
P = ParamSpec("P")
R = TypeVar("R")


def linear_factor_(
    factor: Tensor,
    x: Tensor,
    *,
    offsets: Tensor | None = None,
    beta: Scale = 1.0,
    alpha: Scale = 1.0,
    bias: bool = False,
    weights: Tensor | None = None,
    check_finite: bool | Tensor = False,
) -> Tensor | None:
    """Rows are the last dimension of x (..., D), any strides; ``bias`` appends a 1 to each.

    Args:
        factor: (D + bias, D + bias), or its block diagonal (g, s, s); with ``offsets`` (E, D + bias, D + bias).
        offsets: (E + 1,), int32 or int64: rows ``offsets[e]:offsets[e + 1]`` of x (T, D) go to ``factor[e]``, as the
            experts of a mixture want them, and those outside to none. Offsets that descend or leave 0 to T raise an
            error on the CPU; on CUDA, where they are never read back, a device-side assertion. Each factor has the bits
            of a call of its own (TF32 aside, whose use depends on how a slice is aligned).
        beta, alpha: numbers or 0-d tensors; with ``offsets`` also (E,), one for each factor.
        weights: (...), one for each row.
        check_finite: as above; with ``offsets`` flags are (E,) and each factor is refused by itself.
    """
    count = 1 if offsets is None else max(0, offsets.numel() - 1)
    flag = _flag(factor, check_finite, count)
    (before, betas), (added, alphas) = _scale(beta), _scale(alpha)
    _ops.linear_factor_(factor, x, weights, bias, before, added, flag, _allow_tf32(), offsets, betas, alphas)
    return flag


def grouped_linear_factor_(
    factors: Sequence[Tensor],
    xs: Sequence[Tensor],
    *,
    beta: Scale = 1.0,
    alpha: Scale = 1.0,
    bias: bool | Sequence[bool] = False,
    weights: Sequence[Tensor | None] | None = None,
    check_finite: bool | Tensor = False,
) -> Tensor | None:
    """:func:`linear_factor_` of each of ``factors`` and ``xs``, the layers of a model, in one call, with the same bits.

    Sizes and dtypes may differ from pair to pair; all tensors are on one device, and no two factors share memory.

    Args:
        beta, alpha: numbers or 0-d tensors for all, or (N,) tensors with a value for each of N pairs.
        bias: for all, or a list with one for each.
        weights: a list with those of each pair, or None where it has none.
        check_finite: as above; flags are (N,) and each pair is refused by itself.
    """
    if not factors and not xs:
        return None
    count = len(factors)
    flag = _flag(xs[0], check_finite, count) if xs else None
    (before, betas), (added, alphas) = _scale(beta), _scale(alpha)
    of_each = [bias] * count if isinstance(bias, bool) else list(bias)
    rows = [None] * count if weights is None else list(weights)
    _ops.grouped_linear_factor_(
        list(factors), list(xs), rows, of_each, before, added, flag, _allow_tf32(), betas, alphas
    )
    return flag


def conv_factor_(
    dims: int,
    factor: Tensor,
    x: Tensor,
    kernel_size: Sizes,
    *,
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    bias: bool = False,
    spatial: str = "full",
    approximation: str = "expand",
    beta: float = 1.0,
    alpha: float = 1.0,
    check_finite: bool | Tensor = False,
    algorithm: str = "auto",
) -> Tensor | None:
    """Rows are the patches of x (N, C, H, W), of any strides, in the order of ``weight.flatten(1)``.

    The geometry is that of ``torch.nn.Conv2d``. A patch's columns are (channel, kh, kw) and, with ``bias``, a 1:
    with k the number of offsets of the kernel, the factor is (C k + bias)^2 or its block diagonal (g, s, s); with
    ``groups`` it is (groups, C / groups k + bias, ...), one for each group. ``kernel_size=1`` gives the factor of the
    output gradients.

    Args:
        spatial: ``"full"``; or ``"sua"``: pixels of one patch are taken for uncorrelated, (C + bias)^2, the Frobenius
            projection of the full factor onto I (x) C: the mean over the offsets of its diagonal blocks (each with the
            bias column). Right at any stride, padding and dilation.
        approximation: ``"expand"``, a row for each output position; or ``"reduce"``, one for each sample: its summed
            patches.
        algorithm: ``"tiles"`` for any geometry; ``"lags"`` and ``"fft"`` for stride 1, full, expand, see
            :mod:`mfac_kernels.ops.lags`; ``"auto"`` picks the fastest that is exact enough.
    """
    op = f"conv{dims}d_factor_"
    geometry = geometry_of(op, dims, kernel_size, stride, padding, dilation)
    check(spatial in ("full", "sua"), f'{op}: spatial: expected "full" or "sua", got "{spatial}"')
    check(
        approximation in ("expand", "reduce"),
        f'{op}: approximation: expected "expand" or "reduce", got "{approximation}"',
    )
    sua, reduce = spatial == "sua", approximation == "reduce"
    compressible = dims < 3 and set(geometry.stride) == {1} and not sua and not reduce
    # What a refused batch leaves as it is would be the state, which is no factor yet.
    compressible = compressible and check_finite is False
    way = _way(op, factor, x, geometry, groups, bias, compressible, algorithm)
    if way != "tiles":
        state = factor.new_empty(groups, _lags_form.state_size(x.shape[1] // groups, geometry, bias))
        _ops.conv_lags_(state, x, *geometry.form, groups, bias, way == "fft", 0.0, 1.0, None)
        _ops.conv_expand_(factor, state, *geometry.form, groups, bias, beta, alpha)
        return None
    flag = _flag(factor, check_finite)
    _ops.conv_factor_(factor, x, *geometry, groups, bias, sua, reduce, beta, alpha, flag, _allow_tf32())
    return flag


def _way(
    op: str, factor: Tensor, x: Tensor, geometry: Geometry, groups: int, bias: bool, compressible: bool, algorithm: str
) -> str:
    """``"tiles"``, ``"lags"`` or ``"fft"``."""
    check(
        algorithm in ("auto", "tiles", "lags", "fft"),
        f'{op}: algorithm: expected "auto", "tiles", "lags" or "fft", got "{algorithm}"',
    )
    if algorithm == "tiles":
        return algorithm
    check(
        compressible or algorithm == "auto",
        f'{op}: algorithm: expected "tiles" unless one or two dimensions, stride 1, full, expand and without '
        f'check_finite, got "{algorithm}"',
    )
    long = geometry.offsets > _conv_cost.MOST_OFFSETS
    if not compressible or (algorithm == "auto" and (long or not _conv_cost.runs_on(x))):
        return "tiles"
    # In the words of the one op that the user knows, before another sees them.
    _kronecker_fakes.check_conv("conv_factor_", x, geometry, groups)
    _kronecker_fakes.check_factor("conv_factor_", factor, x, groups, x.shape[1] // groups * geometry.offsets, bias)
    _lags_form.check_offsets("conv_factor_", geometry)
    if algorithm != "auto":
        return algorithm
    return _fastest(x, geometry, groups)


@_conv_cost.cached
def _fastest(shape: tuple[int, ...], geometry: Geometry, groups: int) -> str:
    cost = _conv_cost.of(shape, geometry, groups, expanded=True)
    return min(cost, key=cost.__getitem__)


def _for_dims(conv: Callable[Concatenate[int, P], R], dims: int, doc: str | None) -> Callable[P, R]:
    """``conv`` for one number of dimensions, a function with a name, a signature and a docstring of its own."""

    def for_dims(*args: P.args, **kwargs: P.kwargs) -> R:
        return conv(dims, *args, **kwargs)

    signature = inspect.signature(conv)
    _, *parameters = signature.parameters.values()
    for_dims.__name__ = for_dims.__qualname__ = f"conv{dims}d_factor_"
    for_dims.__doc__ = doc
    for_dims.__annotations__ = {name: kind for name, kind in conv.__annotations__.items() if name != "dims"}
    for_dims.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return for_dims


conv1d_factor_ = _for_dims(conv_factor_, 1, ":func:`conv2d_factor_` of x (N, C, L).")
conv2d_factor_ = _for_dims(conv_factor_, 2, conv_factor_.__doc__)
conv3d_factor_ = _for_dims(conv_factor_, 3, ":func:`conv2d_factor_` of x (N, C, D, H, W).")


def embedding_factor_(
    factor: Tensor, indices: Tensor, *, padding_idx: int | None = None, beta: float = 1.0, alpha: float = 1.0
) -> None:
    """Rows are one-hot, so factor (num_embeddings,) holds the diagonal alone: how often each index occurs.

    indices: int64 or int32, any shape. ``padding_idx`` is not counted, as ``torch.nn.Embedding`` gives it no gradient.
    """
    _ops.embedding_factor_(factor, indices, padding_idx, beta, alpha)


def cross_factor(x: Tensor, y: Tensor, weights: Tensor | None = None) -> Tensor:
    """``sum_r w_r x_r y_r^T`` of x (..., D) and y (..., E) with the same leading shape, that of weights -> (D, E)."""
    product: Tensor = _ops.cross_factor(x, y, weights)
    return product


def _allow_tf32() -> bool:
    return bool(torch.backends.cuda.matmul.allow_tf32)


def _scale(value: Scale) -> tuple[float, Tensor | None]:
    """The number, and the values that take its place."""
    if isinstance(value, float) or not isinstance(value, Tensor):  # what is a tensor takes longer to tell
        return value, None
    return 1.0, value.to(torch.float64).contiguous()


def _flag(factor: Tensor, check_finite: bool | Tensor, count: int = 1) -> Tensor | None:
    if check_finite is False:
        return None
    if isinstance(check_finite, Tensor):
        return check_finite
    return factor.new_zeros(count, dtype=torch.int32) if check_finite else None
