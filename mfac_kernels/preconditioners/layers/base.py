"""What K-FAC asks of a kind of module: its rows, its shape, where its gradient is."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from mfac_kernels.fisher.kronecker import KroneckerShape, Pairs
from mfac_kernels.preconditioners.layers.forms import block_of
from mfac_kernels.preconditioners.layers.maps import SampleMap

Spatial = Literal["full", "sua"]
Approximation = Literal["expand", "reduce"]
Normalization = Literal["unit", "diagonal", "skip"]

Hook = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]
"""hook(module, arguments, keywords, output), after a call."""


class Handle(Protocol):
    def remove(self) -> None: ...


@dataclass(frozen=True)
class Options:
    """Those of K-FAC that decide a layer's factors.

    ``inputs``, ``outputs``: block sizes by patterns of names, in place of ``input_block`` and ``output_block``.
    """

    spatial: Spatial
    approximation: Approximation
    input_block: int | None
    output_block: int | None
    masked: bool = False
    normalization: Normalization = "unit"
    inputs: Mapping[str, int | None] = field(default_factory=dict)
    outputs: Mapping[str, int | None] = field(default_factory=dict)

    def named(self, *names: str) -> Options:
        """Those of the module of this name, or of those that are one layer."""
        return replace(
            self,
            input_block=block_of(names, self.inputs, self.input_block),
            output_block=block_of(names, self.outputs, self.output_block),
        )


@dataclass
class Add:
    """How a call enters a sum: sum <- beta sum + alpha rows; one that is not finite sets the flag instead.

    ``valid`` (samples, positions), 1 or 0 in floating point: the rows that count. ``factor`` (): multiplies alpha, on
    the device, where it depends on how many do.
    """

    beta: float
    alpha: float
    refused: Tensor
    valid: Tensor | None = None
    factor: Tensor | None = None

    def weights(self, rows: Tensor) -> Tensor | None:
        """Of each of rows (..., columns), whose leading dimensions are samples and positions."""
        if self.valid is None:
            return None
        each = self.valid if self.factor is None else self.valid * self.factor
        return each.reshape(rows.shape[:-1]).to(accumulated(rows.dtype))


def accumulated(dtype: torch.dtype) -> torch.dtype:
    """The dtype that rows are summed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def valid_mean(rows: Tensor, how: Add) -> tuple[Tensor, Tensor]:
    """The mean over the valid positions of rows (samples, positions, columns), and how many there are (samples,)."""
    assert how.valid is not None
    valid = how.valid.to(accumulated(rows.dtype))
    count = valid.sum(1)
    return (rows * valid[..., None]).sum(1) / count.clamp_min(1)[:, None], count


class Layer(ABC):
    """A module with a Kronecker-factored Fisher block. Inputs and output gradients have the samples first.

    Attributes:
        weight_name, bias_name: of the module's parameters.
        always_expands: whatever the approximation.
        least_dims, most_dims: dimensions of inputs, the samples' among them.
    """

    weight_name: str = "weight"
    bias_name: str | None = "bias"
    always_expands: bool = False
    shape: KroneckerShape
    least_dims: int = 2
    most_dims: int | None = None

    def __init__(self, name: str, module: nn.Module, options: Options) -> None:
        self.name, self.module, self.options = name, module, options
        bias = getattr(module, self.bias_name, None) if self.bias_name else None
        self._has_bias = isinstance(bias, Tensor) and bias.requires_grad

    @classmethod
    def of(cls, name: str, module: nn.Module, options: Options) -> Sequence[Layer] | str:
        """The layers that a module is, or why it is none."""
        return cls.unusable(module, cls.weight_name) or [cls(name, module, options)]

    @staticmethod
    def unusable(module: nn.Module, name: str) -> str | None:
        """Why a module's weight can have no factors."""
        weight = getattr(module, name, None)
        if weight is None:
            return f"it has no {name}"
        if isinstance(weight, UninitializedParameter):
            return "its weight has no shape yet: call the model once before"
        if not isinstance(weight, nn.Parameter):
            return "its weight is computed from other parameters"
        if not weight.requires_grad:
            return "its weight is not trained"
        return None if weight.is_floating_point() else f"expected a real weight, got {weight.dtype}"

    def part(self, p: Tensor) -> Tensor:
        """What of a parameter, or of its gradient, is this layer's, with the outputs first: a view."""
        return p

    def features(self, x: Tensor) -> Tensor:
        """What the weight multiplies, of an input."""
        return x

    @abstractmethod
    def position_shape(self, output: Tensor) -> tuple[int, ...]:
        """Dimensions of an output, or of its gradient, that are positions."""

    def positions(self, output: Tensor) -> int:
        """Output positions of a sample."""
        return math.prod(self.position_shape(output))

    def samples_first(self, x: Tensor, dim: int) -> Tensor:
        """An input, output or gradient, if dimension ``dim`` has the samples where a module leaves that open."""
        return x

    def use(self, x: object) -> Layer:
        """What a call with this input is a call of: the layer itself, or one of its uses, with a part of its sums."""
        return self

    def positions_of(self, x: Tensor, output: Tensor) -> int:
        """Of a sample, in a call; both have the samples first."""
        return self.positions(output)

    def expected_for_masks(self) -> str | None:
        """What would have to be otherwise for a mask of positions."""
        return None

    def own_outputs(self, output: Tensor, dim: int) -> Tensor:
        """This layer's part of an output, or of its gradient, samples first."""
        return self.samples_first(output, dim)

    def attach(self, hook: Hook) -> list[Handle]:
        """Have ``hook`` called after each call of this layer."""
        return [self.module.register_forward_hook(hook, with_kwargs=True)]

    def hooks(self) -> Iterable[object]:
        """Those that are attached."""
        return self.module._forward_hooks.values()

    def unfit(self, x: object, output: object) -> str | None:
        """Why a call cannot be counted."""
        for name, value in (("input", x), ("output", output)):
            if not isinstance(value, Tensor):
                return f"expected a tensor as {name}, got {type(value).__name__}"
            if value.is_nested or value.layout != torch.strided:
                kind = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
                return f"expected a dense tensor as {name}, got a {kind} one"
        assert isinstance(x, Tensor)
        if x.dim() < self.least_dims or (self.most_dims is not None and x.dim() > self.most_dims):
            dims = f"{self.least_dims}" if self.least_dims == self.most_dims else f"at least {self.least_dims}"
            return f"expected inputs of {dims} dimensions, samples first, got shape {tuple(x.shape)}"
        return None

    def add_inputs(self, total: Tensor, x: Tensor, how: Add) -> None:
        """To the sum over inputs."""
        raise NotImplementedError

    def add_outputs(self, total: Tensor, gradient: Tensor, how: Add) -> None:
        """To the sum over output gradients."""
        raise NotImplementedError

    def pairs(self, x: Tensor, gradient: Tensor, how: Add) -> Pairs:
        """Rows of A and of B that belong together, for what is no product of their averages; ``beta`` is not read."""
        raise NotImplementedError

    def add_block(self, total: Tensor, x: Tensor, gradient: Tensor, by_position: bool, how: Add) -> None:
        """In place of these where the shape is a ``unit``: to A, the block of gradients of samples, or of positions."""
        raise NotImplementedError

    def linear_map(self) -> SampleMap | None:
        """The layer as a function of its parameters, for products with the exact Fisher matrix; None: it has none."""
        return None

    def parameters(self) -> list[Tensor]:
        """That are trained."""
        return [p for p in (self.weight, self.bias) if p is not None and p.requires_grad]

    @property
    def title(self) -> str:
        """Its name for messages."""
        return self.name or f"{type(self.module).__name__}, the model itself"

    @property
    def weight(self) -> Tensor:
        weight = getattr(self.module, self.weight_name)
        assert isinstance(weight, Tensor)
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The bias, if it was trained when the layer was made."""
        bias = getattr(self.module, str(self.bias_name)) if self._has_bias else None
        return bias if isinstance(bias, Tensor) else None

    def gradient(self) -> Tensor:
        """(groups * outputs, columns); zero where there is none."""
        return self._matrix(gradient_of)

    def matrix(self) -> Tensor:
        """The parameters themselves, as :meth:`gradient` has their gradients."""
        return self._matrix(torch.Tensor.detach)

    def _matrix(self, of: Callable[[Tensor], Tensor]) -> Tensor:
        parts = [self.part(of(self.weight)).flatten(1)]
        if self.shape.bias:
            assert self.bias is not None
            parts.append(self.part(of(self.bias))[:, None])
        return torch.cat(parts, 1) if len(parts) > 1 else parts[0]

    def move(self, matrix: Tensor, scale: float) -> None:
        """Add scale times a matrix, shaped as :meth:`gradient`, to the parameters."""
        weight = self.part(self.weight.data)
        weight.add_(matrix[:, : matrix.shape[1] - self.shape.bias].reshape(weight.shape), alpha=scale)
        if self.shape.bias and self.bias is not None:
            self.part(self.bias.data).add_(matrix[:, -1], alpha=scale)

    def assign(self, matrix: Tensor) -> None:
        """Overwrite the gradients that there are."""
        weight = matrix[:, : matrix.shape[1] - self.shape.bias]
        if self.weight.grad is not None:
            own = self.part(self.weight.grad)
            own.copy_(weight.reshape(own.shape))
        if self.shape.bias and self.bias is not None and self.bias.grad is not None:
            self.part(self.bias.grad).copy_(matrix[:, -1])


def gradient_of(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
