"""Residuals of equations and boundary conditions, and what they are linearised to: rows of inputs and gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mfac_kernels.fisher.jacobian import Call, JacobianProduct
from mfac_kernels.pinn.laplacian import forward_laplacian
from mfac_kernels.preconditioners.layers.maps import LinearMap

__all__ = ["Condition", "Linearisation", "Term", "linear_layers", "linearise", "loss_of"]


@dataclass(frozen=True)
class Condition:
    """What is to hold at points: residuals of zero.

    Attributes:
        residual: of points x (n, d) and rows (n, d + 2, outputs) of :func:`forward_laplacian` -> (n,). May be
            nonlinear; that of a point depends on its own rows alone.
        derivatives: False: rows are u alone, (n, 1, outputs), as a boundary condition's.
        weights: of the Laplacian, (d,).
    """

    residual: Callable[[Tensor, Tensor], Tensor]
    derivatives: bool = True
    weights: Tensor | None = None

    def __call__(self, net: nn.Sequential, x: Tensor, record: list[tuple[Tensor, Tensor]] | None = None) -> Tensor:
        """The residuals (n,), of at least one point."""
        if x.dim() and not len(x):
            raise ValueError(f"x: expected at least one point, got shape {tuple(x.shape)}")
        rows = forward_laplacian(net, x, self.weights, derivatives=self.derivatives, record=record)
        residuals = self.residual(x, rows)
        if residuals.shape != x.shape[:1]:
            raise ValueError(f"residual: expected to return shape ({len(x)},), got {tuple(residuals.shape)}")
        return residuals


Term = tuple[Condition, Tensor]
"""A condition and its points (n, d): half the mean of its squared residuals is added to the loss."""


@dataclass(frozen=True)
class Linearisation:
    """Residuals r (m,) of all terms, one after the other, and their Jacobian J (m, parameters).

    ``product`` has J, in blocks (outputs, inputs + bias) of the linear layers, and the weights 1 / n of each term's
    rows, so that its ``fisher_product`` is that of the Gauss-Newton matrix. ``calls``: of each term. Inputs are
    (n, S, inputs + bias): a bias is a column of 1 in the rows of u and of 0 in those of derivatives.
    """

    residuals: Tensor
    weights: Tensor
    product: JacobianProduct
    calls: list[list[Call]]

    @property
    def loss(self) -> Tensor:
        return (self.weights * self.residuals.square()).sum() / 2

    def gradient(self) -> list[Tensor]:
        """Of the loss, a block for each layer."""
        return self.product.vjp(self.weights * self.residuals)

    def scaled(self) -> tuple[Tensor, Tensor]:
        """J (m, parameters), formed, and r, rows times the roots of their weights: the Gauss-Newton matrix is J^T J."""
        roots = self.weights.sqrt()
        sizes = [m.shape[0] * m.shape[1] for m in self.product.maps]
        jacobian = roots.new_empty(len(roots), sum(sizes))
        columns = torch.split(jacobian, sizes, 1)
        for call in self.product.calls:
            rows = slice(call.first, call.first + call.samples)
            gradients = call.gradients * roots[rows, None, None]
            columns[call.layer][rows] = (gradients.mT @ call.inputs).flatten(1)
        return jacobian, roots * self.residuals

    def blocks(self, vector: Tensor) -> list[Tensor]:
        """A vector of all parameters, in the order of the columns, as a block for each layer."""
        shapes = [m.shape for m in self.product.maps]
        parts = torch.split(vector, [rows * columns for rows, columns in shapes])
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def linear_layers(net: nn.Sequential) -> list[nn.Linear]:
    return [module for module in net if isinstance(module, nn.Linear)]


def _some(terms: Sequence[Term]) -> None:
    if not terms:
        raise ValueError("terms: expected at least one condition and its points, got none")


def loss_of(net: nn.Sequential, terms: Sequence[Term]) -> Tensor:
    """The sum over terms of half the mean squared residual; differentiable."""
    _some(terms)
    losses = [condition(net, x).square().mean() / 2 for condition, x in terms]
    return torch.stack(losses).sum()


def linearise(net: nn.Sequential, terms: Sequence[Term]) -> Linearisation:
    """Residuals at the network's parameters and their Jacobian, by one forward and one backward pass for each term."""
    _some(terms)
    layers = linear_layers(net)
    maps = [LinearMap(m.out_features, m.in_features + (m.bias is not None)) for m in layers]
    residuals: list[Tensor] = []
    weights: list[Tensor] = []
    calls: list[list[Call]] = []
    first = 0
    for condition, x in terms:
        seen: list[tuple[Tensor, Tensor]] = []
        with torch.enable_grad():
            own = condition(net, x, seen)
            gradients = torch.autograd.grad(own.sum(), [outputs for _, outputs in seen], materialize_grads=True)
        inputs = [_with_bias(rows.detach(), m) for m, (rows, _) in zip(layers, seen, strict=True)]
        residuals.append(own.detach())
        weights.append(torch.full_like(residuals[-1], 1 / len(x)))
        calls.append([Call(i, a, g, first) for i, (a, g) in enumerate(zip(inputs, gradients, strict=True))])
        first += len(x)
    joined = torch.cat(weights)
    every = [call for of_term in calls for call in of_term]
    product = JacobianProduct(maps, every, weights=joined, samples=first, dtype=joined.dtype)
    return Linearisation(torch.cat(residuals), joined, product, calls)


def _with_bias(rows: Tensor, module: nn.Linear) -> Tensor:
    """A column for the bias, if there is one: 1 in the rows of u, 0 elsewhere."""
    if module.bias is None:
        return rows
    rows = nn.functional.pad(rows, (0, 1))
    rows[:, 0, -1] = 1
    return rows
