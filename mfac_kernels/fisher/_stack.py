"""The factors of the layers that have one shape, stacked."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mfac_kernels.fisher._layout import KroneckerShape
from mfac_kernels.fisher._pairs import Approximate, Product, direction, probe, product_of, second_product


class Stack:
    """Averages and this batch's sums of L layers: (L, *input_state) and (L, *output_factor).

    ``inputs`` and ``outputs`` are exponential sums; divided by ``weight`` (L,), in [0, 1), they are averages.
    ``called`` (L,), if ranks share a batch: how many of them have sums of each layer.
    ``paired``: the sums are of pairs of rows, see :mod:`mfac_kernels.fisher._pairs`. Those of two products, and their
    averages, have the blocks of the second behind those of the first.
    """

    def __init__(
        self,
        shape: KroneckerShape,
        layers: Sequence[int],
        dtype: torch.dtype,
        device: torch.device | str | None,
        approximate: Approximate = "kfac",
    ) -> None:
        count = len(layers)
        self.shape, self.layers = shape, tuple(layers)
        self.approximate, self.paired = approximate, approximate != "kfac" and not shape.unit
        self._products = 2 if approximate == "deflation" and self.paired else 1
        self.weight = torch.zeros(count, dtype=dtype, device=device)
        self.inputs, self.outputs, self.input_sums, self.output_sums = (
            self.weight.new_zeros(count, self._products * blocks, *size)
            for blocks, *size in (shape.input_state, shape.output_factor, *shape.sums)
        )
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
            of_inputs = self.shape.unit or self.shape.exchanged
            squares = [self.input_sums if of_inputs else self.output_sums]
            for sums in [self.input_sums, self.output_sums] if self.paired else squares:
                sums.mul_(torch.where(take > 0, output_scale, 0))
        inputs, outputs = self._factors(take)
        for average, total in (
            (self.inputs, inputs),
            (self.outputs, outputs),
            (self.weight, torch.ones_like(self.weight)),
        ):
            lerp_rows(average, total, take, self.begun, self.called)
        self.begin()

    def products(self, rows: slice = slice(None)) -> list[Product]:
        """The averages times ``weight``, A and B of each product: views."""
        return self._by_product(self.inputs[rows], self.outputs[rows])

    def sums(self) -> list[Product]:
        """This batch's, as views: A' and B' of each product."""
        return self._by_product(self.input_sums, self.output_sums)

    def _by_product(self, inputs: Tensor, outputs: Tensor) -> list[Product]:
        return list(zip(inputs.chunk(self._products, 1), outputs.chunk(self._products, 1), strict=True))

    def probes(self, row: int | None = None) -> list[Product | None]:
        """U and V of one layer, or of all, for each product; None stands for I."""
        if self.approximate == "tkfac":
            return [None]
        rows, shape = slice(None) if row is None else slice(row, row + 1), self.shape
        (inputs, outputs), *second = self.products(rows)
        first = probe(inputs, self.weight[rows], shape.input_width), probe(outputs, self.weight[rows], shape.outputs)
        return [first, *((direction(a, shape.groups), direction(b, shape.groups)) for a, b in second)]

    def finite(self, output_scale: Tensor | None) -> Tensor | bool:
        """Whether the sums of pairs are, times ``output_scale``, without a synchronisation: products may overflow."""
        rows = [i for i, begun in enumerate(self.begun) if begun or self.called is not None] if self.paired else []
        sums = [total[i].abs().amax() for total in (self.input_sums, self.output_sums) for i in rows]
        if not sums:
            return True
        largest = torch.stack(sums)
        return (largest if output_scale is None else (largest * output_scale).to(largest)).isfinite().all()

    def _factors(self, take: Tensor) -> tuple[Tensor, Tensor]:
        """A and B of this batch."""
        if self.paired:
            (sums, *more), (probes, *directions) = self.sums(), self.probes()
            found = [product_of(self.shape, sums, probes)]
            for others, pair in zip(more, directions, strict=True):
                assert pair is not None
                found.append(second_product(self.shape, others, pair, found[0]))
            a, b = (torch.cat(factors, 1) for factors in zip(*found, strict=True))
            return torch.where(take > 0, a, 0), torch.where(take > 0, b, 0)  # sums that are refused may be no numbers
        return self._of_both_uses() if self.shape.two_uses else (self.input_sums, self.output_sums)

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
