"""What K-FAC asks of a kind of module: its rows, its shape, where its gradient is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from mfac_kernels.fisher.kronecker import KroneckerShape

Spatial = Literal["full", "sua"]
Approximation = Literal["expand", "reduce"]
Normalization = Literal["unit", "diagonal", "skip"]


@dataclass(frozen=True)
class Options:
    """Those of K-FAC that decide a layer's factors."""

    spatial: Spatial
    approximation: Approximation
    input_block: int | None
    output_block: int | None


@dataclass
class Add:
    """How a batch enters a sum: sum <- beta sum + alpha rows; a batch that is not finite sets the flag instead."""

    beta: float
    alpha: float
    refused: Tensor


class Layer(ABC):
    """A module with a Kronecker-factored Fisher block. Inputs and output gradients have the samples first."""

    shape: KroneckerShape

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name, self.module = name, module
        bias = getattr(module, "bias", None)
        self._has_bias = isinstance(bias, Tensor) and bias.requires_grad

    @abstractmethod
    def positions(self, output: Tensor) -> int:
        """Output positions of a sample."""

    @abstractmethod
    def add_inputs(self, total: Tensor, x: Tensor, how: Add) -> None: ...

    @abstractmethod
    def add_outputs(self, total: Tensor, gradient: Tensor, how: Add) -> None: ...

    @abstractmethod
    def rows(self, x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Explicit rows, (groups, n, columns) and (groups, n, outputs), for the eigenvalue correction."""

    @property
    def weight(self) -> Tensor:
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The bias, if it was trained when the layer was made."""
        bias = self.module.bias if self._has_bias else None
        return bias if isinstance(bias, Tensor) else None

    def gradient(self) -> Tensor:
        """(groups * outputs, columns); zero where there is none."""
        parts = [gradient_of(self.weight).flatten(1)]
        if self.shape.bias:
            assert self.bias is not None
            parts.append(gradient_of(self.bias)[:, None])
        return torch.cat(parts, 1) if len(parts) > 1 else parts[0]

    def assign(self, matrix: Tensor) -> None:
        """Overwrite the gradients that there are."""
        weight = matrix[:, : matrix.shape[1] - self.shape.bias]
        if self.weight.grad is not None:
            self.weight.grad.copy_(weight.reshape(self.weight.shape))
        if self.shape.bias and self.bias is not None and self.bias.grad is not None:
            self.bias.grad.copy_(matrix[:, -1])


def gradient_of(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
