"""The factors of the layers that have one shape, stacked."""

from __future__ import annotations

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
        self.input_sums, self.output_sums = torch.zeros_like(self.inputs), torch.zeros_like(self.outputs)
        self.weight = torch.zeros(count, dtype=dtype, device=device)
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

        ``output_scale`` is that of squared gradients.
        """
        take = take.to(self.weight.dtype)
        if output_scale is not None:
            # Refused sums are not used, but 0 * inf is no number.
            for squares in self._squares():
                squares.mul_(torch.where(take > 0, output_scale, 0))
        if self.shape.joint:
            self._divide_by_root()
        for average, total in (
            (self.inputs, self.input_sums),
            (self.outputs, self.output_sums),
            (self.weight, torch.ones_like(self.weight)),
        ):
            lerp_rows(average, total, take, self.begun, self.called)
        self.begin()

    def _squares(self) -> list[Tensor]:
        """Sums of squared gradients."""
        if self.shape.joint:
            return [self.input_sums, self.output_sums]
        return [self.input_sums if self.shape.unit or self.shape.exchanged else self.output_sums]

    def _divide_by_root(self) -> None:
        """A and B from partial traces of one matrix."""
        trace = self.output_sums.diagonal(dim1=-2, dim2=-1).sum((1, 2)).double()
        width = self.shape.input_width / self.shape.outputs
        for total, ratio in ((self.input_sums, width), (self.output_sums, 1 / width)):
            scale = torch.where(trace > 0, (ratio / trace).sqrt(), 0)
            total.mul_(scale.to(total.dtype)[:, None, None, None])

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
