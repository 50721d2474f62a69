"""The batch that the exact Fisher matrix is of: what every call gives to the gradients of samples, kept until the step.

That is a layer's inputs and output gradients, or, where it is less, the gradients of the samples themselves: of a
convolution of 3 to 8 channels on 32 x 32 pixels they are 216 numbers in place of 11,264, and a product with them takes
no pass through the layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mfac_kernels.fisher.jacobian import Call, JacobianProduct, Rows
from mfac_kernels.preconditioners._passes import Pass
from mfac_kernels.preconditioners._sizes import Counting
from mfac_kernels.preconditioners.layers.base import Layer
from mfac_kernels.preconditioners.layers.maps import SampleMap


@dataclass
class _Samples:
    """Those of J that a pass has: ``scale`` of each, so that F is their weighted sum; a number or () on the device."""

    first: int
    samples: int
    scale: float | Tensor


class FisherBatch:
    """Keeps what the passes of a step reach, and makes J of it.

    With c what arrives as a sample's output gradient, g = steps N c for a mean and g = c for a sum, as for the factors.
    The positions of a sample share a row: g a^T is summed over them, exactly as the sample's gradient is. With
    ``loss_average="positions"`` a row is that of M / N terms of the loss, M the samples times the positions (the valid
    ones) of the layer that a pass reaches first: F = M sum c c^T, the Fisher matrix where the terms are independent
    given the inputs, as labels drawn from the model are.

    A layer with a call that has not a row for each sample (its input is shared by all) is left out of the step.

    Args:
        owner: whose it is, for messages.
        fraction: of the samples of each pass that are kept, at least one.
        rows: the dtype in which gradients of samples are kept; None: inputs and output gradients are, of every call.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        counting: Counting,
        fraction: float,
        owner: str,
        rows: torch.dtype | None = None,
    ) -> None:
        self._owner, self._dtype = owner, rows
        self._layers, self._counting, self.fraction = list(layers), counting, fraction
        self.maps = [layer.linear_map() for layer in layers]
        self.clear()

    def clear(self) -> None:
        self._calls: list[tuple[Call, int]] = []  # with the positions of a row of inputs
        self._rows: list[Rows] = []
        self._versions: list[tuple[Layer, Tensor, int]] = []
        self._passes: dict[Pass, _Samples] = {}
        self._homes: set[Pass] = set()
        self._left_out: set[int] = set()

    @property
    def empty(self) -> bool:
        return not (self._calls or self._rows)

    def keep(
        self,
        i: int,
        x: Tensor,
        gradient: Tensor,
        samples: int,
        positions: int,
        passes: tuple[Pass, Pass],
        fill: Tensor | None,
    ) -> None:
        """A call that a pass has reached.

        ``samples``: N of the batch; ``passes``: the one that counts the call, and the present one; ``fill``: the share
        of positions that are valid.
        """
        home, current = passes
        layer, repeats, own_map = self._layers[i], len(x) // samples, self.maps[i]
        if own_map is None or len(x) != samples * repeats or repeats == 0:
            self._left_out.add(i)
            return
        kept = min(samples, math.ceil(self.fraction * samples))
        mine = self._passes.get(current)
        if mine is None:
            mine = _Samples(self.samples, kept, self._scale(samples, kept, positions * repeats, fill))
            self._passes[current] = mine
        self._homes.add(home)
        x = layer.features(x)
        if kept < samples:
            x, gradient = x[: kept * repeats], gradient[: kept * repeats]
        if self._dtype is not None and kept * math.prod(own_map.shape) < x.numel() + gradient.numel():
            self._rows.append(Rows(i, _sample_gradients(own_map, x, gradient, repeats, self._dtype), mine.first))
            return
        if kept < samples:  # a view would hold the whole
            x, gradient = x.clone(), gradient.clone()
        self._versions += [(layer, tensor, tensor._version) for tensor in (x, gradient)]
        self._calls.append((Call(i, x, gradient, mine.first, repeats), positions * repeats))

    @property
    def samples(self) -> int:
        """Rows of J."""
        return sum(rows.samples for rows in self._passes.values())

    def present(self, device: torch.device) -> Tensor:
        """(layers,): 1 where the step has all calls of a layer, else 0."""
        called = {call.layer for call, _ in self._calls} | {part.layer for part in self._rows}
        called -= self._left_out
        present = torch.ones(len(self._layers), device=device)
        for i in set(range(len(self._layers))) - called:
            present[i].zero_()
        return present

    @property
    def positions(self) -> list[int]:
        """Of a sample, for each call of :meth:`jacobian`."""
        return [positions for call, positions in self._calls if call.layer not in self._left_out]

    def jacobian(self, output_scale: Tensor | None, dtype: torch.dtype, device: torch.device) -> JacobianProduct:
        """J, whose weights make J^T diag(w) J the Fisher matrix of the mean loss, averaged over the passes.

        Raises:
            RuntimeError: inputs were written to since the forward pass.
        """
        for layer, tensor, version in self._versions:
            if tensor._version != version:
                raise RuntimeError(
                    f"{self._owner}: the input of {layer.title}, or its output's gradient, was written to in place "
                    "between its backward pass and step()"
                )
        parts = [
            torch.ones(rows.samples, dtype=torch.float64, device=device) * rows.scale for rows in self._passes.values()
        ]
        weights = torch.cat(parts) / len(self._homes) if parts else torch.zeros(0, dtype=torch.float64, device=device)
        if output_scale is not None:
            weights = weights * output_scale
        maps = [_Nothing(_shape(layer)) if m is None else m for m, layer in zip(self.maps, self._layers, strict=True)]
        calls = [call for call, _ in self._calls if call.layer not in self._left_out]
        rows = [part for part in self._rows if part.layer not in self._left_out]
        return JacobianProduct(
            maps, calls, rows=rows, weights=weights, samples=self.samples, dtype=dtype, device=device
        )

    def _scale(self, samples: int, kept: int, positions: int, fill: Tensor | None) -> float | Tensor:
        """Of a row, apart from the number of passes: the square of c's factor over the rows that there are."""
        steps = self._counting.accumulation_steps
        if self._counting.loss_average == "sum":
            return 1 / kept
        if not self._counting.by_position:
            return (steps * samples) ** 2 / kept
        scale = steps**2 * samples * positions * samples / kept
        return scale if fill is None else scale * fill


def _sample_gradients(own: SampleMap, x: Tensor, gradient: Tensor, repeats: int, dtype: torch.dtype) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        x = x.to(dtype) if x.is_floating_point() else x
        each = own.sample_gradients(x, gradient.to(dtype))
    return each if repeats == 1 else each.view(-1, repeats, each.shape[1]).sum(1)


def _shape(layer: Layer) -> tuple[int, int]:
    shape = layer.shape
    return shape.groups * shape.outputs, shape.columns


@dataclass(frozen=True)
class _Nothing:
    """The map of a layer without one: it has no calls."""

    shape: tuple[int, int]

    def forward(self, a: Tensor, block: Tensor) -> Tensor:
        raise NotImplementedError

    def weight_gradient(self, a: Tensor, g: Tensor) -> Tensor:
        raise NotImplementedError
