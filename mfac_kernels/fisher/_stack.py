"""The factors of the layers that have one shape, stacked."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mfac_kernels.fisher._layout import KroneckerShape


class Stack:
    """Averages and this batch's sums of L layers: (L, *input_state) and (L, *output_factor).

    ``inputs`` and ``outputs`` are exponential sums; divided by ``weight`` (L,), in [0, 1), they are averages.
    ``called`` (L,), if ranks share a batch: how many of them have sums of each layer.
    """

    def __init__(
        self, shape: KroneckerShape, layers: Sequence[int], dtype: torch.dtype, device: torch.device | str | None
    ) -> None:
        count = len(layers)
        self.shape, self.layers = shape, tuple(layers)
        self.inputs = torch.zeros(count, *shape.input_state, dtype=dtype, device=device)
        self.outputs = torch.zeros(count, *shape.output_factor, dtype=dtype, device=device)
        self.weight = torch.zeros(count, dtype=dtype, device=device)
        self.input_sums, self.output_sums = (self.weight.new_zeros(count, *size) for size in shape.sums)
        self.called: Tensor | None = None
        self.begin()

    def begin(self) -> None:
        """No layer has sums of this batch."""
        self.inputs_begun, self.outputs_begun = [False] * len(self.layers), [False] * len(self.layers)
        self.called = None

    @property
    def begun(self) -> list[bool]:
        """Which layers have both sums of this batch."""
        return [a and b for a, b in zip(self.inputs_begun, self.outputs_begun, strict=True)]

    def add(self, row: int, write: Callable[[Tensor, float], object], *, gradients: bool) -> None:
        """To a layer's sum over inputs, or over output gradients: A and B, unless they are exchanged."""
        of_inputs = gradients == self.shape.exchanged
        sums, begun = (self.input_sums, self.inputs_begun) if of_inputs else (self.output_sums, self.outputs_begun)
        total = sums[row]
        write(total[0] if total.dim() == 3 and len(total) == 1 else total, 1.0 if begun[row] else 0.0)
        begun[row] = True

    def merge(self, take: Tensor, output_scale: Tensor | None) -> None:
        """average <- (1 - take) average + take sums, for the layers that have both sums.

        ``output_scale`` is that of squared gradients: of B, of a unit-wise block, which is all in A, of an A exchanged.
        """
        take = take.to(self.weight.dtype)
        if output_scale is not None:
            # Refused sums are not used, but 0 * inf is no number.
            squares = self.input_sums if self.shape.unit or self.shape.exchanged else self.output_sums
            squares.mul_(torch.where(take > 0, output_scale, 0))
        inputs, outputs = self._of_both_uses() if self.shape.two_uses else (self.input_sums, self.output_sums)
        for average, total in (
            (self.inputs, inputs),
            (self.outputs, outputs),
            (self.weight, torch.ones_like(self.weight)),
        ):
            lerp_rows(average, total, take, self.begun, self.called)
        self.begin()

    def _of_both_uses(self) -> tuple[Tensor, Tensor]:
        """A and B, from the sums of two uses."""
        a_size, b_size = self.shape.input_factor, self.shape.output_factor
        cut = math.prod(a_size)
        sums = self.input_sums, self.output_sums
        inputs = [total[:, :cut].view(-1, *a_size) for total in sums]
        outputs = [total[:, cut:].view(-1, *b_size) for total in reversed(sums)]
        of_inputs, of_outputs = ([_trace(factor) for factor in factors] for factors in (inputs, outputs))
        trace = of_inputs[0] * of_outputs[0] + of_inputs[1] * of_outputs[1]
        root = torch.where(trace > 0, trace, torch.inf).sqrt()
        ratio = (self.shape.input_width / self.shape.outputs) ** 0.5
        return _combined(inputs, of_outputs, ratio / root), _combined(outputs, of_inputs, 1 / (ratio * root))

    def gather_rows(self, tensors: Sequence[Tensor]) -> Tensor:
        """Those of this stack's layers -> (L, ...), in the factors' dtype."""
        own = [tensors[layer].to(self.inputs.dtype) for layer in self.layers]
        return own[0][None] if len(own) == 1 else torch.stack(own)

    def state_dict(self) -> dict[str, Tensor]:
        return {"inputs": self.inputs, "outputs": self.outputs, "weight": self.weight}


def lerp_rows(average: Tensor, total: Tensor, take: Tensor, begun: list[bool], called: Tensor | None) -> None:
    """average <- (1 - take) average + take total, in the rows that have begun, or that have been called on any rank."""
    if called is not None:
        each = torch.where(called > 0, take, 0).view(-1, *[1] * (average.dim() - 1))
        average.lerp_(total, each)
        return
    rows = [slice(None)] if all(begun) else [slice(i, i + 1) for i, b in enumerate(begun) if b]
    for row in rows:
        average[row].lerp_(total[row], take)


def _trace(factor: Tensor) -> Tensor:
    """(layers,) float64, of (layers, blocks, s, s)."""
    return factor.diagonal(dim1=-2, dim2=-1).sum((1, 2), dtype=torch.float64)


def _combined(factors: Sequence[Tensor], weights: Sequence[Tensor], scale: Tensor) -> Tensor:
    """scale times the weighted sum of factors (layers, blocks, s, s); weights and scale (layers,)."""
    first, second = (
        factor * (weight * scale).to(factor.dtype).view(-1, 1, 1, 1)
        for factor, weight in zip(factors, weights, strict=True)
    )
    return first.add_(second)
