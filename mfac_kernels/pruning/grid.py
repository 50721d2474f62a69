"""Rounding to the nearest value of a grid: 2^bits evenly spaced values for each row and group of columns.

    code = clamp(round(w / scale) + zero, 0, 2^bits - 1),    w ~ (code - zero) scale

Asymmetric: scale = (high - low) / (2^bits - 1) and zero = round(-low / scale), with low = min(0, min w) and high =
max(0, max w). Symmetric: high = -low = max |w| and zero = 2^(bits - 1). 0 is on every grid.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mfac_kernels.fisher import _checks
from mfac_kernels.pruning import _layers

__all__ = ["Quantized", "round_to_nearest"]

_BITS = (2, 16)


class Quantized(NamedTuple):
    """What a weight has become, in the order of ``weight.flatten(1)`` (for transformers' Conv1D: of ``weight.T``).

    Attributes:
        codes: (rows, columns) int32, from 0 to 2^bits - 1.
        scale, zero: (rows, groups), one for each ``group_size`` consecutive columns; zero has integers.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor


def round_to_nearest(
    layer: _layers.Layer, bits: int, *, group_size: int | None = None, symmetric: bool = False
) -> Quantized:
    """Round the layer's weight, in place, without a Hessian. Arguments and errors are those of :func:`gptq`."""
    weights = _layers.matrix(layer)
    scale, zero = grid(weights, bits, group_size, symmetric)
    n = weights.shape[-1]
    codes = encode(weights, spread(scale, group_size, n), spread(zero, group_size, n), bits)
    return assign(layer, codes, scale, zero, group_size)


def grid(weights: Tensor, bits: int, group_size: int | None, symmetric: bool) -> tuple[Tensor, Tensor]:
    """scale and zero (..., groups) of weights (..., columns)."""
    least, most = _BITS
    if not least <= _checks.positive_int("bits", bits) <= most:
        raise ValueError(f"bits: expected {least} to {most}, got {bits}")
    n = weights.shape[-1]
    size = n if group_size is None else _checks.positive_int("group_size", group_size)
    groups = F.pad(weights, (0, -n % size)).reshape(*weights.shape[:-1], -1, size)  # 0 is on the grid in any case
    low, high = groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    scale = (high - low) / (2**bits - 1)
    scale = torch.where(scale > 0, scale, 1)
    return scale, torch.full_like(scale, 2 ** (bits - 1)) if symmetric else (-low / scale).round()


def spread(per_group: Tensor, group_size: int | None, n: int) -> Tensor:
    """(..., groups) -> (..., n): for each column."""
    return per_group.repeat_interleave(n if group_size is None else group_size, -1)[..., :n]


def encode(weights: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """The codes, in floating point."""
    return ((weights / scale).round() + zero).clamp(0, 2**bits - 1)


@torch.no_grad()
def assign(layer: _layers.Layer, codes: Tensor, scale: Tensor, zero: Tensor, group_size: int | None) -> Quantized:
    """The layer's weight <- (codes - zero) scale; codes (groups, rows, n), scale and zero (groups, rows, ..)."""
    n = codes.shape[-1]
    values = (codes - spread(zero, group_size, n)) * spread(scale, group_size, n)
    _layers.assign(layer, values)
    return Quantized(codes.flatten(0, 1).to(torch.int32), scale.flatten(0, 1), zero.flatten(0, 1))
