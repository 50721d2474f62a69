"""Sliding-window M-FAC as five ops: two passes over the window and the m x m core between them.

With K = shift I + G G^T and shift = n damping, F = damping I + G^T G / n has (Woodbury; push-through for a row g of G)

    F^-1 x = (x - G^T K^-1 G x) / damping          window_dots, core_solve, window_combine
    F^-1 g = n G^T K^-1 e_g                        window_insert_, core_insert_, window_combine

Every op works on the current device without a host round trip. The state of a window is four tensors:

    window (m, d)   the gradients, a ring, any floating dtype, rows contiguous
    gram   (m, m)   float64, in slot order: gram[p, q] = g_p . g_q for slots p newer than q, or p = q; stale elsewhere
    factor (m, m)   float64, the Cholesky factor of K in the order of age: factor[q, p] = L[p, q], slots p newer than q;
                    on a GPU its inverse in the other half, factor[p, q] = L^-1[p, q]: core_refactor_ makes it anew for
                    a state that comes from a CPU
    state  (2,)     int64, gradients seen and gradients refused; the next slot is seen % m

Arithmetic is float64 throughout: at memory speed it is free, and it is what the subtraction in F^-1 x needs.
"""

from __future__ import annotations

import torch
from torch import Tensor

import mfac_kernels._library  # noqa: F401  (loads the ops)
from mfac_kernels.ops._blocks import block_count
from mfac_kernels.ops._checks import FLOATS, check, check_dtype, check_rows, check_shape, check_state, type_text

__all__ = [
    "core_insert_",
    "core_refactor_",
    "core_solve",
    "window_combine",
    "window_dots",
    "window_insert_",
]

_ops = torch.ops.mfac_kernels


def window_insert_(window: Tensor, state: Tensor, g: Tensor) -> Tensor:
    """Write gradient ``g`` over the oldest row of ``window`` and take its dot products with every row, in one pass.

    ``g`` (d,), any floating dtype, is rounded to the window's dtype; the dots are those of the rounded gradient.
    Returns the dots (m,) in float64, entry ``state[0] % m`` being the squared norm. A gradient that is not finite
    after rounding leaves the window unchanged and returns NaN dots, which :func:`core_insert_` refuses in turn.
    ``state`` is read, not written.
    """
    dots: Tensor = _ops.window_insert_(window, state, g)
    return dots


def window_dots(window: Tensor, x: Tensor, block_size: int | None = None) -> Tensor:
    """``x @ window.T`` per block of ``block_size`` columns: window (m, d), x (k, d) -> (blocks, k, m) float64."""
    dots: Tensor = _ops.window_dots(window, x, block_size)
    return dots


def window_combine(
    window: Tensor,
    coefficients: Tensor,
    *,
    beta: float = 1.0,
    x: Tensor | None = None,
    alpha: float = 0.0,
    dtype: torch.dtype | None = None,
    block_size: int | None = None,
) -> Tensor:
    """``alpha * x + beta * coefficients @ window`` per block of columns, rounded once at the end.

    window (m, d); coefficients (blocks, k, m) float64; x (k, d) -> (k, d) in ``dtype`` (default: the window's).
    """
    out: Tensor = _ops.window_combine(window, coefficients, block_size, beta, x, alpha, dtype or window.dtype)
    return out


def core_insert_(gram: Tensor, factor: Tensor, state: Tensor, dots: Tensor, shift: float, per_gradient: bool) -> Tensor:
    """Replace the oldest gradient of the core by one with Gram row ``dots`` (m,): O(m^2), no drift.

    Writes gram, factor and state; returns ``K^-1 e_newest`` (m,) float64 with K = shift I + gram. ``per_gradient``
    multiplies the shift by the number of gradients held, which costs O(m^3) a step until the window is full.
    Dots that are not finite change nothing but the count of refused gradients and return zeros.
    """
    coefficients: Tensor = _ops.core_insert_(gram, factor, state, dots, shift, per_gradient)
    return coefficients


def core_solve(factor: Tensor, state: Tensor, b: Tensor, shift: float, per_gradient: bool) -> Tensor:
    """``K^-1 b`` for each row of b (k, m) float64."""
    x: Tensor = _ops.core_solve(factor, state, b, shift, per_gradient)
    return x


def core_refactor_(gram: Tensor, factor: Tensor, state: Tensor, shift: float, per_gradient: bool) -> None:
    """Rebuild ``factor`` from ``gram`` after the shift has changed: O(m^3), never fails."""
    _ops.core_refactor_(gram, factor, state, shift, per_gradient)


@torch.library.register_fake("mfac_kernels::window_insert_")
def _(window: Tensor, state: Tensor, g: Tensor) -> Tensor:
    op = "window_insert_"
    check_rows(op, "window", window)
    check(
        window.numel() > 0,
        f"{op}: window: expected at least one row and one column, got shape {tuple(window.shape)}",
    )
    check_state(op, "state", state, torch.int64, (2,))
    check_shape(op, "g", g, (window.shape[1],))
    check_dtype(op, "g", g)
    return window.new_empty(window.shape[0], dtype=torch.float64)


@torch.library.register_fake("mfac_kernels::window_dots")
def _(window: Tensor, x: Tensor, block_size: int | None = None) -> Tensor:
    op = "window_dots"
    check_rows(op, "window", window)
    check_rows(op, "x", x)
    check(
        x.shape[1] == window.shape[1],
        f"{op}: x: expected {window.shape[1]} columns, as window has, got {x.shape[1]}",
    )
    blocks = block_count(op, window, block_size)
    return window.new_empty(blocks, x.shape[0], window.shape[0], dtype=torch.float64)


@torch.library.register_fake("mfac_kernels::window_combine")
def _(
    window: Tensor,
    coefficients: Tensor,
    block_size: int | None,
    beta: float,
    x: Tensor | None,
    alpha: float,
    dtype: torch.dtype,
) -> Tensor:
    op = "window_combine"
    check_rows(op, "window", window)
    blocks = block_count(op, window, block_size)
    check(
        coefficients.dim() == 3,
        f"{op}: coefficients: expected 3 dimensions, got shape {tuple(coefficients.shape)}",
    )
    check(dtype in FLOATS, f"{op}: dtype: expected float32, float64, bfloat16 or float16, got {type_text(dtype)}")
    vectors = coefficients.shape[1]
    check_state(op, "coefficients", coefficients, torch.float64, (blocks, vectors, window.shape[0]))
    if x is not None:
        check_rows(op, "x", x)
        check_shape(op, "x", x, (vectors, window.shape[1]))
    return window.new_empty(vectors, window.shape[1], dtype=dtype)


def _check_core(op: str, factor: Tensor, state: Tensor, shift: float) -> int:
    check(
        factor.dim() == 2 and factor.shape[0] > 0,
        f"{op}: factor: expected shape (m, m) with m >= 1, got {tuple(factor.shape)}",
    )
    m = factor.shape[0]
    check_state(op, "factor", factor, torch.float64, (m, m))
    check_state(op, "state", state, torch.int64, (2,))
    check(
        0 < shift < float("inf"),
        f"{op}: shift: expected a positive finite number, got {shift:g}",
    )
    return m


@torch.library.register_fake("mfac_kernels::core_insert_")
def _(gram: Tensor, factor: Tensor, state: Tensor, dots: Tensor, shift: float, per_gradient: bool) -> Tensor:
    op = "core_insert_"
    m = _check_core(op, factor, state, shift)
    check_state(op, "gram", gram, torch.float64, (m, m))
    check_state(op, "dots", dots, torch.float64, (m,))
    return torch.empty_like(dots)


@torch.library.register_fake("mfac_kernels::core_solve")
def _(factor: Tensor, state: Tensor, b: Tensor, shift: float, per_gradient: bool) -> Tensor:
    op = "core_solve"
    m = _check_core(op, factor, state, shift)
    check(b.dim() == 2, f"{op}: b: expected 2 dimensions, got shape {tuple(b.shape)}")
    check_state(op, "b", b, torch.float64, (b.shape[0], m))
    return torch.empty_like(b)


@torch.library.register_fake("mfac_kernels::core_refactor_")
def _(gram: Tensor, factor: Tensor, state: Tensor, shift: float, per_gradient: bool) -> None:
    op = "core_refactor_"
    m = _check_core(op, factor, state, shift)
    check_state(op, "gram", gram, torch.float64, (m, m))
