"""Products with the exact Fisher matrix of a batch, F = J^T diag(w) J + damping I, from inputs and output gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Call", "JacobianProduct", "LayerMap", "Rows"]


class LayerMap(Protocol):
    """What a layer computes from its inputs, as a linear function of its parameters, a block (rows, columns).

    Inputs and outputs have the samples in the first dimension.
    """

    @property
    def shape(self) -> tuple[int, int]:
        """Of the block."""

    def forward(self, a: Tensor, block: Tensor) -> Tensor:
        """The outputs for inputs ``a``, of the shape of the output gradients or one that broadcasts to it."""

    def weight_gradient(self, a: Tensor, g: Tensor) -> Tensor:
        """The transpose of :meth:`forward`: sum over samples and positions of g a^T, a block."""


@dataclass
class Call:
    """One call of a layer in a forward pass.

    Attributes:
        layer: which of the maps.
        inputs: (n * repeats, ...), as the map wants them.
        gradients: of the outputs, (n * repeats, ...), those of a sum over samples.
        first: the row of J of its first sample; calls of one pass share rows, those of another have others.
        repeats: consecutive rows of one sample, where a layer has its positions among its samples.
    """

    layer: int
    inputs: Tensor
    gradients: Tensor
    first: int = 0
    repeats: int = 1

    @property
    def samples(self) -> int:
        return len(self.gradients) // self.repeats


@dataclass
class Rows:
    """A call of a layer of which its part of J itself is known.

    Attributes:
        layer: which of the maps.
        values: (n, rows * columns of the block).
        first: as a :class:`Call`'s.
    """

    layer: int
    values: Tensor
    first: int = 0

    @property
    def samples(self) -> int:
        return len(self.values)


class JacobianProduct:
    """J (N, p), a row for each sample: the gradients of its loss in all layers, side by side; never formed.

        maps = [LinearMap(outputs=10, inputs=64, bias=True)]
        jacobian = JacobianProduct(maps, [Call(0, a, g)])      # a (N, 64), g (N, 10): of the sum of the losses
        dots = jacobian.jvp([x])                               # x (10, 65) -> (N,)
        (y,) = jacobian.vjp(dots / len(dots))                  # (10, 65)
        (y,) = jacobian.fisher_product([x], damping=1e-3)      # both, and damping x: for CG, Lanczos, influence

    The part of layer l in a row is sum_s g_n,s a_n,s^T over all calls and positions, so that J x is the layer's own map
    with x for its weight, dotted with the output gradients sample by sample, and J^T w its weight's gradient with the
    output gradients scaled by w: no per-sample gradients, no patches.

    Args:
        maps: one for each layer.
        calls: of the batch; layers without one have zero columns in J.
        rows: calls whose part of J is smaller than what it comes from.
        weights: (N,) or () or a number, w above; default 1 / N, the mean over samples.
        samples: N, where calls do not tell it: they have none, or not the last.
        dtype: of the arithmetic and of the blocks.
        device: of the calls, where there may be none.
    """

    def __init__(
        self,
        maps: Sequence[LayerMap],
        calls: Sequence[Call],
        *,
        rows: Sequence[Rows] = (),
        weights: Tensor | float | None = None,
        samples: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        if not dtype.is_floating_point:
            raise ValueError(f"dtype: expected a floating-point type, got {dtype}")
        self.maps, self.calls, self.rows = list(maps), list(calls), list(rows)
        for call in self.calls:
            if call.inputs.dim() == 0 or call.gradients.dim() == 0 or not call.gradients.is_floating_point():
                raise ValueError(
                    f"calls: layer {call.layer}: expected samples in the first dimension, and gradients of floating "
                    f"point, got {_brief(call.inputs)} and {_brief(call.gradients)}"
                )
            if len(call.inputs) != len(call.gradients) or len(call.gradients) % call.repeats:
                raise ValueError(
                    f"calls: layer {call.layer}: expected as many rows of inputs as of gradients, a multiple of "
                    f"{call.repeats}, got {len(call.inputs)} and {len(call.gradients)}"
                )
        for part in self.rows:
            p = math.prod(self.maps[part.layer].shape)
            if part.values.dim() != 2 or part.values.shape[1] != p:
                raise ValueError(f"rows: layer {part.layer}: expected (n, {p}), got {tuple(part.values.shape)}")
        ends = [call.first + call.samples for call in self.calls] + [part.first + part.samples for part in self.rows]
        last = max(ends, default=0)
        self.samples = last if samples is None else samples
        if last > self.samples:
            raise ValueError(f"samples: expected at least {last}, the calls', got {samples}")
        self.weights = 1 / max(1, self.samples) if weights is None else weights
        self.dtype = dtype
        known = [call.gradients for call in self.calls] + [part.values for part in self.rows]
        self.device = known[0].device if known else torch.device(device or "cpu")

    @torch.no_grad()
    def layer_jvp(self, x: Sequence[Tensor]) -> Tensor:
        """The products of each layer's columns of J with its block of x -> (N, layers); their sum is J x."""
        self._check("x", x)
        dots = torch.zeros(self.samples, len(self.maps), dtype=self.dtype, device=self.device)
        for call in self.calls:
            outputs = self.maps[call.layer].forward(self.cast(call.inputs), x[call.layer].to(self.dtype))
            _check_outputs(call, outputs)
            each = sample_dots(self.cast(call.gradients), outputs).view(-1, call.repeats).sum(1)
            dots[call.first : call.first + call.samples, call.layer] += each
        for part in self.rows:
            each = self.cast(part.values) @ x[part.layer].to(self.dtype).reshape(-1)
            dots[part.first : part.first + part.samples, part.layer] += each
        return dots

    def jvp(self, x: Sequence[Tensor]) -> Tensor:
        """J x (N,); x has a block for each layer."""
        return self.layer_jvp(x).sum(1)

    @torch.no_grad()
    def vjp(self, w: Tensor) -> list[Tensor]:
        """J^T w, a block for each layer; w (N,)."""
        if tuple(w.shape) != (self.samples,):
            raise ValueError(f"w: expected shape ({self.samples},), got {tuple(w.shape)}")
        w = w.to(self.dtype)
        blocks: list[Tensor | None] = [None] * len(self.maps)

        def add(layer: int, part: Tensor) -> None:
            known = blocks[layer]
            blocks[layer] = part if known is None else known.add_(part)

        for call in self.calls:
            each = w[call.first : call.first + call.samples].repeat_interleave(call.repeats)
            g = self.cast(call.gradients)
            part = self.maps[call.layer].weight_gradient(
                self.cast(call.inputs), g * each.view(-1, *[1] * (g.dim() - 1))
            )
            add(call.layer, part)
        for rows in self.rows:
            part = w[rows.first : rows.first + rows.samples] @ self.cast(rows.values)
            add(rows.layer, part.view(self.maps[rows.layer].shape))
        return [
            torch.zeros(m.shape, dtype=self.dtype, device=self.device) if block is None else block
            for m, block in zip(self.maps, blocks, strict=True)
        ]

    def fisher_product(self, x: Sequence[Tensor], damping: float = 0.0) -> list[Tensor]:
        """J^T diag(w) J x + damping x."""
        if not abs(damping) <= torch.finfo(self.dtype).max:
            raise ValueError(f"damping: expected a number that {self.dtype} holds, got {damping}")
        product = self.vjp(self.jvp(x) * self.weights)
        if damping:
            for block, own in zip(product, x, strict=True):
                block.add_(own, alpha=damping)
        return product

    def _check(self, name: str, x: Sequence[Tensor]) -> None:
        if len(x) != len(self.maps):
            raise ValueError(f"{name}: expected {len(self.maps)} blocks, one for each layer, got {len(x)}")
        for layer, (block, m) in enumerate(zip(x, self.maps, strict=True)):
            if tuple(block.shape) != tuple(m.shape):
                raise ValueError(f"{name}[{layer}]: expected shape {tuple(m.shape)}, got {tuple(block.shape)}")

    def cast(self, rows: Tensor) -> Tensor:
        """Rows of a call in the dtype of the products; indices as they are."""
        return rows.to(self.dtype) if rows.is_floating_point() else rows


def _brief(x: Tensor) -> str:
    return f"{x.dtype} of shape {tuple(x.shape)}"


def _check_outputs(call: Call, outputs: Tensor) -> None:
    """That a map's outputs have the shape of the output gradients, or one that broadcasts to it."""
    g = call.gradients
    if outputs.dim() != g.dim() or any(n not in (1, m) for n, m in zip(outputs.shape[1:], g.shape[1:], strict=True)):
        raise ValueError(
            f"calls: layer {call.layer}: expected gradients of the outputs' shape {tuple(outputs.shape)}, got "
            f"{tuple(g.shape)}"
        )


def sample_dots(g: Tensor, y: Tensor) -> Tensor:
    """(n,): the product of g and y, y broadcast, summed over all dimensions but the first."""
    if y.shape == g.shape:
        dots: Tensor = torch.linalg.vecdot(g.flatten(1), y.flatten(1))
        return dots
    summed = [d for d in range(1, g.dim()) if y.shape[d] == 1 != g.shape[d]]
    return (g.sum(summed, keepdim=True) * y).flatten(1).sum(1)
