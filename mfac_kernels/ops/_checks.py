"""The argument checks of csrc/common/checks.h, for the fake implementations: same conditions, same words."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_NAMES = {
    torch.float32: "Float",
    torch.float64: "Double",
    torch.bfloat16: "BFloat16",
    torch.float16: "Half",
    torch.int64: "Long",
    torch.int32: "Int",
    torch.bool: "Bool",
}


def check(condition: bool, message: str) -> None:
    """Raise RuntimeError(message) unless condition holds."""
    if condition is not True:  # a symbolic one, or False
        torch._check(condition, lambda: message)  # type: ignore[no-untyped-call]


def shape_text(shape: Sequence[int]) -> str:
    if torch.compiler.is_compiling():
        return "(...)"  # sizes may be symbols, which a graph cannot spell
    return f"({', '.join(map(str, shape))}{',)' if len(shape) == 1 else ')'}"


def type_text(dtype: torch.dtype) -> str:
    return _NAMES.get(dtype, str(dtype))


def check_dtype(op: str, name: str, t: Tensor) -> None:
    check(
        t.dtype in FLOATS,
        f"{op}: {name}: expected float32, float64, bfloat16 or float16, got {type_text(t.dtype)}",
    )


def check_rows(op: str, name: str, t: Tensor) -> None:
    check(t.dim() == 2, f"{op}: {name}: expected 2 dimensions, got shape {shape_text(t.shape)}")
    check(
        t.shape[1] <= 1 or t.stride(1) == 1,
        f"{op}: {name}: expected contiguous rows, got stride {t.stride(1)}",
    )
    check_dtype(op, name, t)


def check_shape(op: str, name: str, t: Tensor, expected: Sequence[int]) -> None:
    check(
        tuple(t.shape) == tuple(expected),
        f"{op}: {name}: expected shape {shape_text(expected)}, got {shape_text(t.shape)}",
    )


def check_state(op: str, name: str, t: Tensor, dtype: torch.dtype, expected: Sequence[int]) -> None:
    check(
        t.dtype == dtype,
        f"{op}: {name}: expected {type_text(dtype)}, got {type_text(t.dtype)}",
    )
    check_shape(op, name, t, expected)
    check(t.is_contiguous(), f"{op}: {name}: expected a contiguous tensor")
