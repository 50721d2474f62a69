"""The factors of the layers that have one shape, stacked."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mfac_kernels.fisher._layout import KroneckerShape


class Stack:
    """Averages and this batch's sums of L layers: (L, *input_state) and (L, *output_factor).

    ``inputs`` and ``outputs`` are exponential sums; divided by ``weight`` (L,), in [0, 1), they are averages.
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
        self.begin()

    def begin(self) -> None:
        """No layer has sums of this batch."""
        self.inputs_begun, self.outputs_begun = [False] * len(self.layers), [False] * len(self.layers)

    @staticmethod
    def add(sums: Tensor, begun: list[bool], row: int, write: Callable[[Tensor, float], object]) -> None:
        total = sums[row]
        write(total[0] if total.dim() == 3 and len(total) == 1 else total, 1.0 if begun[row] else 0.0)
        begun[row] = True

    def merge(self, take: Tensor, output_scale: Tensor | None) -> None:
        """average <- (1 - take) average + take sums, for the layers that have both sums."""
        called = [a and b for a, b in zip(self.inputs_begun, self.outputs_begun, strict=True)]
        take = take.to(self.weight.dtype)
        if output_scale is not None:
            # Refused sums are not used, but 0 * inf is no number.
            self.output_sums.mul_(torch.where(take > 0, output_scale, 0))
        one = torch.ones((), dtype=take.dtype, device=take.device)
        rows = [slice(None)] if all(called) else [slice(i, i + 1) for i, c in enumerate(called) if c]
        for row in rows:
            self.inputs[row].lerp_(self.input_sums[row], take)
            self.outputs[row].lerp_(self.output_sums[row], take)
            self.weight[row].lerp_(one, take)
        self.begin()

    def gather_rows(self, tensors: Sequence[Tensor]) -> Tensor:
        """Those of this stack's layers -> (L, ...), in the factors' dtype."""
        own = [tensors[layer].to(self.inputs.dtype) for layer in self.layers]
        return own[0][None] if len(own) == 1 else torch.stack(own)

    def state_dict(self) -> dict[str, Tensor]:
        return {"inputs": self.inputs, "outputs": self.outputs, "weight": self.weight}
