"""Checks that the curvature objects share. Messages name the argument, what was expected and what came."""

from __future__ import annotations

import math
from typing import SupportsFloat, SupportsIndex

import torch
from torch import Tensor

from mfac_kernels.ops._checks import FLOATS


def _int(name: str, value: object) -> int:
    if type(value) is int:  # a protocol is slow to ask
        return value
    if isinstance(value, bool) or not isinstance(value, SupportsIndex):
        raise TypeError(f"{name}: expected an int, got {value!r}")
    return value.__index__()


def positive_int(name: str, value: object) -> int:
    """``value`` as an int >= 1, else TypeError or ValueError."""
    number = _int(name, value)
    if number < 1:
        raise ValueError(f"{name}: expected at least 1, got {number}")
    return number


def one_of(name: str, value: object, values: tuple[object, ...]) -> None:
    """ValueError unless ``value`` is one of ``values``."""
    if value not in values:
        raise ValueError(f"{name}: expected one of {', '.join(map(str, values))}, got {value!r}")


def positive_float(name: str, value: object) -> float:
    """``value`` as a positive finite float, else TypeError or ValueError."""
    if isinstance(value, (bool, str)) or not isinstance(value, SupportsFloat):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    number = float(value)
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"{name}: expected a positive finite number, got {value}")
    return number


def floating(name: str, dtype: torch.dtype) -> torch.dtype:
    """``dtype`` if the kernels store it, else TypeError."""
    if dtype not in FLOATS:
        raise TypeError(f"{name}: expected float32, float64, bfloat16 or float16, got {dtype}")
    return dtype


def vectors(name: str, x: Tensor, dim: int, device: torch.device, *, batch: bool) -> Tensor:
    """``x``, (dim,) or (if ``batch``) (k, dim) on ``device``, as (k, dim) rows; else TypeError or ValueError."""
    shapes = f"({dim},) or (k, {dim})" if batch else f"({dim},)"
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor of shape {shapes}, got {type(x).__name__}")
    floating(name, x.dtype)
    if x.shape[-1:] != (dim,) or x.dim() > 1 + batch:
        raise ValueError(f"{name}: expected shape {shapes}, got {tuple(x.shape)}")
    if x.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, got one on {x.device}")
    return x.detach().reshape(-1, dim).contiguous()


def finite(name: str, x: Tensor) -> None:
    """ValueError unless ``x`` is finite. On the CPU only: elsewhere it would synchronise."""
    if x.device.type == "cpu" and not bool(x.isfinite().all()):
        raise ValueError(f"{name}: expected finite values, got NaN or infinity")


def index(name: str, value: object, dim: int) -> int:
    """``value`` as an index into ``dim`` coordinates, negative ones from the end, else TypeError or IndexError."""
    number = _int(name, value)
    if not -dim <= number < dim:
        raise IndexError(f"{name}: expected an index in [{-dim}, {dim}), got {number}")
    return number % dim


def indices(name: str, value: Tensor, dim: int, device: torch.device) -> Tensor:
    """``value`` (k,) as int64 indices in [0, dim) on ``device``, else TypeError, ValueError or IndexError.

    Out-of-range indices are found on the CPU only: elsewhere torch's own indexing asserts on the device.
    """
    if not isinstance(value, Tensor) or value.dtype not in (torch.int64, torch.int32):
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name}: expected an int64 or int32 tensor, got {got}")
    if value.dim() != 1:
        raise ValueError(f"{name}: expected shape (k,), got {tuple(value.shape)}")
    index = value.to(device, torch.int64)
    if device.type == "cpu" and not bool(((index >= -dim) & (index < dim)).all()):
        raise IndexError(f"{name}: expected indices in [{-dim}, {dim}), got one outside")
    return index % dim
