"""Masks of the positions that count: padding and ignored targets are no samples of the loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mfac_kernels.preconditioners.layers.base import Add


@dataclass
class ValidRows:
    """The rows of one call that count: (samples, positions), 1 or 0, of its inputs and of its output gradients.

    ``fill`` (), on the device: the share of all positions that are valid; ``none`` (), bool: that there is none.
    """

    inputs: Tensor
    outputs: Tensor
    fill: Tensor
    none: Tensor


@dataclass
class Ways:
    """How one call enters its sums, with ``rows`` that count or None for all.

    The numbers of samples and positions in what alpha is given are those of all rows: here they become those of the
    valid ones.
    """

    refused: Tensor
    rows: ValidRows | None
    by_position: bool
    reduced: bool

    def inputs(self, beta: float, alpha: float) -> Add:
        if self.rows is None:
            return Add(beta, alpha, self.refused)
        return Add(beta, alpha, self.refused, self.rows.inputs, 1 / self.rows.fill if self.by_position else None)

    def outputs(self, beta: float, alpha: float) -> Add:
        if self.rows is None:
            return Add(beta, alpha, self.refused)
        factor = self.rows.fill if self.by_position else None if self.reduced else 1 / self.rows.fill
        return Add(beta, alpha, self.refused, self.rows.outputs, factor)

    def both(self, beta: float, alpha: float) -> Add:
        """Of products of a gradient with an input."""
        if self.rows is None:
            return Add(beta, alpha, self.refused)
        return Add(beta, alpha, self.refused, self.rows.outputs, self.rows.fill if self.by_position else None)


class Valid:
    """A mask (samples, positions) on the device of the factors, and how it fits the calls of layers."""

    def __init__(self, mask: Tensor, device: torch.device) -> None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"valid: mask: expected a bool tensor, got {got}")
        if mask.dim() < 2 or mask.numel() == 0:
            raise ValueError(f"valid: mask: expected shape (samples, positions), got {tuple(mask.shape)}")
        # Known without waiting for a device, or None
        self.empty = not bool(mask.any()) if mask.device.type == "cpu" else None
        rows = mask.detach().flatten(1).to(device, torch.float64, non_blocking=True)
        self._none = rows.amax() == 0
        self._rows, self._fill = rows, rows.mean().clamp_min(1 / rows.numel())

    def of_call(self, name: str, samples: int, positions: int) -> ValidRows | None:
        """For a call with these samples and positions; None: it has one position, of all that are valid."""
        n, s = self._rows.shape
        if (samples, positions) == (n, s):
            return ValidRows(self._rows, self._rows, self._fill, self._none)
        if (samples, positions) == (n * s, 1):
            rows = self._rows.reshape(-1, 1)
            return ValidRows(rows, rows, self._fill, self._none)
        if (samples, positions) == (1, s) or ((samples, positions) == (s, 1) and s != n):  # broadcast over the batch
            share = self._rows.mean(0).reshape(samples, positions)
            return ValidRows(share, torch.ones_like(share), self._fill, self._none)
        if (samples, positions) == (n, 1):
            return None
        raise ValueError(
            f"valid: mask: expected shape ({samples}, {positions}), the samples and positions of {name}, got ({n}, {s})"
        )
