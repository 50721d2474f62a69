"""The forward Laplacian: an MLP's value, first derivatives and Laplacian in one pass, S = d + 2 rows a point.

A linear layer maps all rows alike, and adds its bias to the value. An activation phi maps a value z, derivatives z_i
and a Laplacian l to

    phi(z)      phi'(z) z_i      phi'(z) l + phi''(z) sum_i w_i z_i^2

Source: Li et al., "A computational framework for neural network-based variational Monte Carlo with forward Laplacian",
Nature Machine Intelligence 2024.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["ACTIVATIONS", "Sine", "forward_laplacian"]


class Sine(nn.Module):
    """sin(x)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sin()


def _tanh(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    value = x.tanh()
    first = 1 - value.square()
    return value, first, -2 * value * first


def _sigmoid(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    value = x.sigmoid()
    first = value * (1 - value)
    return value, first, first * (1 - 2 * value)


def _sine(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    value = x.sin()
    return value, x.cos(), -value


ACTIVATIONS: dict[type[nn.Module], Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]] = {
    nn.Tanh: _tanh,
    nn.Sigmoid: _sigmoid,
    Sine: _sine,
}
"""phi, phi' and phi'' of an activation; yours may be added. Differentiable, so that residuals have gradients."""


def forward_laplacian(
    net: nn.Sequential,
    x: Tensor,
    weights: Tensor | None = None,
    *,
    derivatives: bool = True,
    record: list[tuple[Tensor, Tensor]] | None = None,
) -> Tensor:
    """u, its d first derivatives and its Laplacian sum_i w_i d^2 u / dx_i^2 -> (n, d + 2, outputs).

    Args:
        net: linear layers and activations of :data:`ACTIVATIONS`.
        x: (n, d), of the network's dtype.
        weights: w (d,), default 1: zero for a variable, as time, that has no second derivative in the operator.
        derivatives: False gives u alone, (n, 1, outputs).
        record: gets the inputs and the outputs of each linear layer, (n, d + 2, ...).

    Raises:
        TypeError: a layer that is neither; points of another dtype than the network's.
        ValueError: shapes that do not fit.
    """
    first = next((module for module in net if isinstance(module, nn.Linear)), None)
    if x.dim() != 2 or (first is not None and x.shape[1] != first.in_features):
        raise ValueError(f"x: expected shape (n, {'d' if first is None else first.in_features}), got {tuple(x.shape)}")
    if first is not None and x.dtype != first.weight.dtype:
        raise TypeError(f"x: expected {first.weight.dtype}, as the network, got {x.dtype}")
    n, d = x.shape
    if weights is not None and tuple(weights.shape) != (d,):
        raise ValueError(f"weights: expected shape ({d},), got {tuple(weights.shape)}")
    rows = x[:, None]
    if derivatives:
        unit = torch.eye(d, dtype=x.dtype, device=x.device)
        rows = torch.cat([rows, unit.expand(n, d, d), rows.new_zeros(n, 1, d)], 1)
    for module in net:
        if isinstance(module, nn.Linear):
            outputs = nn.functional.linear(rows, module.weight)
            if module.bias is not None:
                outputs = torch.cat([outputs[:, :1] + module.bias, outputs[:, 1:]], 1)
            if record is not None:
                record.append((rows, outputs))
            rows = outputs
            continue
        if type(module) not in ACTIVATIONS:
            known = ", ".join(kind.__name__ for kind in ACTIVATIONS)
            raise TypeError(f"net: expected Linear, or of ACTIVATIONS {known}, got {type(module).__name__}")
        value, slope, bend = ACTIVATIONS[type(module)](rows[:, :1])
        if derivatives:
            squares = rows[:, 1:-1].square()
            if weights is not None:
                squares = squares * weights.to(squares.dtype)[:, None]
            curved = slope * rows[:, -1:] + bend * squares.sum(1, keepdim=True)
            value = torch.cat([value, slope * rows[:, 1:-1], curved], 1)
        rows = value
    return rows
