"""What K-FAC knows about modules: their rows, their shapes, where their gradients are."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mfac_kernels import ops
from mfac_kernels.fisher.kronecker import KroneckerShape, Lags
from mfac_kernels.ops import _conv_cost

Spatial = Literal["full", "sua"]
Approximation = Literal["expand", "reduce"]
Normalization = Literal["unit", "diagonal", "skip"]
Wanted = Callable[[str, nn.Module], str | None]
"""Why a module is to be left alone; None: it is not."""
CONVOLUTIONS = {nn.Conv1d: ops.conv1d_factor_, nn.Conv2d: ops.conv2d_factor_, nn.Conv3d: ops.conv3d_factor_}


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
        parts = [_gradient(self.weight).flatten(1)]
        if self.shape.bias:
            assert self.bias is not None
            parts.append(_gradient(self.bias)[:, None])
        return torch.cat(parts, 1) if len(parts) > 1 else parts[0]

    def assign(self, matrix: Tensor) -> None:
        """Overwrite the gradients that there are."""
        weight = matrix[:, : matrix.shape[1] - self.shape.bias]
        if self.weight.grad is not None:
            self.weight.grad.copy_(weight.reshape(self.weight.shape))
        if self.shape.bias and self.bias is not None and self.bias.grad is not None:
            self.bias.grad.copy_(matrix[:, -1])


def _gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


class LinearLayer(Layer):
    """Rows: the last dimension; positions: those between it and the samples."""

    def __init__(self, name: str, module: nn.Linear, options: Options) -> None:
        super().__init__(name, module)
        self.approximation = options.approximation
        self.shape = KroneckerShape(
            outputs=module.out_features,
            inputs=module.in_features,
            bias=self.bias is not None,
            input_block=options.input_block,
            output_block=options.output_block,
        )

    def positions(self, output: Tensor) -> int:
        return math.prod(output.shape[1:-1])

    def add_inputs(self, total: Tensor, x: Tensor, how: Add) -> None:
        alpha = how.alpha
        if self.approximation == "reduce" and x.dim() > 2:  # the sum over S positions, 1s too, is S times their mean
            alpha *= self.positions(x) ** 2
            x = x.flatten(1, -2).mean(1)
        ops.linear_factor_(total, x, bias=self.shape.bias, beta=how.beta, alpha=alpha, check_finite=how.refused)

    def add_outputs(self, total: Tensor, gradient: Tensor, how: Add) -> None:
        alpha = how.alpha
        if self.approximation == "reduce" and gradient.dim() > 2:
            alpha *= self.positions(gradient)  # 1 / (N S) is asked for, 1 / N is due
            gradient = gradient.flatten(1, -2).mean(1)
        ops.linear_factor_(total, gradient, beta=how.beta, alpha=alpha, check_finite=how.refused)

    def rows(self, x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        a = F.pad(x, (0, 1), value=1.0) if self.shape.bias else x
        if self.approximation == "reduce" and x.dim() > 2:
            a, gradient = a.flatten(1, -2).sum(1), gradient.flatten(1, -2).mean(1)
        return a.reshape(1, -1, a.shape[-1]), gradient.reshape(1, -1, gradient.shape[-1])


class ConvLayer(Layer):
    """Rows: the patches; positions: the output pixels."""

    module: nn.Conv1d | nn.Conv2d | nn.Conv3d

    def __init__(self, name: str, module: nn.Conv1d | nn.Conv2d | nn.Conv3d, options: Options) -> None:
        super().__init__(name, module)
        self.options = options
        grouped = module.groups > 1
        self.shape = KroneckerShape(
            outputs=module.out_channels // module.groups,
            inputs=module.in_channels // module.groups,
            offsets=math.prod(module.kernel_size),
            groups=module.groups,
            bias=self.bias is not None,
            sua=options.spatial == "sua",
            input_block=None if grouped else options.input_block,
            output_block=None if grouped else options.output_block,
        )
        self.shape = replace(self.shape, lags=self._lags())
        self._accumulate = next(op for kind, op in CONVOLUTIONS.items() if isinstance(module, kind))

    def positions(self, output: Tensor) -> int:
        return math.prod(output.shape[2:])

    def add_inputs(self, total: Tensor, x: Tensor, how: Add) -> None:
        if self.shape.lags is not None:
            ops.conv2d_lags_(
                total,
                x if x.dim() == 4 else x[:, :, None],
                **vars(self.shape.lags),
                groups=self.module.groups,
                bias=self.shape.bias,
                beta=how.beta,
                alpha=how.alpha,
                check_finite=how.refused,
            )
            return
        padding: str | tuple[int, ...] = self.module.padding
        if self.module.padding_mode != "zeros":
            x = F.pad(x, self.module._reversed_padding_repeated_twice, mode=self.module.padding_mode)
            padding = 0  # type: ignore[assignment]
        self._accumulate(
            total,
            x,
            self.module.kernel_size,
            stride=self.module.stride,
            padding=padding,
            dilation=self.module.dilation,
            groups=self.module.groups,
            bias=self.shape.bias,
            spatial=self.options.spatial,
            approximation=self.options.approximation,
            beta=how.beta,
            alpha=how.alpha,
            check_finite=how.refused,
        )

    def _lags(self) -> Lags | None:
        """The compressed form, where there is one and A is dense."""
        module, shape = self.module, self.shape
        plain = self.options.spatial == "full" and self.options.approximation == "expand"
        strided = any(s != 1 for s in module.stride) or module.padding_mode != "zeros"
        if (
            not plain
            or strided
            or not 1 < shape.offsets <= _conv_cost.MOST_OFFSETS
            or len(module.kernel_size) > 2
            or shape.input_factor[0] != shape.groups
        ):
            return None
        if isinstance(module, nn.Conv1d):  # over images of height 1
            padding = module.padding if isinstance(module.padding, str) else (0, *module.padding)
            return Lags((1, *module.kernel_size), padding, (1, *module.dilation))
        return Lags(module.kernel_size, module.padding, module.dilation)

    def add_outputs(self, total: Tensor, gradient: Tensor, how: Add) -> None:
        reduce = self.options.approximation == "reduce"  # of the mean over S: 1 / N of its square, 1 / (N S) asked for
        self._accumulate(
            total,
            gradient,
            1,
            groups=self.module.groups,
            approximation=self.options.approximation,
            beta=how.beta,
            alpha=how.alpha / self.positions(gradient) if reduce else how.alpha,
            check_finite=how.refused,
        )

    def rows(self, x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        module, dims = self.module, len(self.module.kernel_size)
        x = F.pad(x, module._reversed_padding_repeated_twice, mode=_pad_mode(module))
        for d in range(dims):
            span = module.dilation[d] * (module.kernel_size[d] - 1) + 1
            x = x.unfold(2 + d, span, module.stride[d])[..., :: module.dilation[d]]
        # (N, channels, *positions, *offsets)
        n, groups, s = len(x), module.groups, self.positions(gradient)
        a = x.reshape(n, groups, self.shape.inputs, s, -1).permute(1, 0, 3, 2, 4).flatten(3)
        g = gradient.reshape(n, groups, self.shape.outputs, s).permute(1, 0, 3, 2)
        if self.shape.bias:
            a = F.pad(a, (0, 1), value=1.0)
        if self.options.approximation == "reduce":
            a, g = a.sum(2, keepdim=True), g.mean(2, keepdim=True)
        return a.flatten(1, 2), g.flatten(1, 2)


def _pad_mode(module: nn.Module) -> str:
    mode = module.padding_mode
    return "constant" if mode == "zeros" else str(mode)


class EmbeddingLayer(Layer):
    """Rows: one-hot; positions: the indices of a sample. The gradient is the transpose of the weight's."""

    module: nn.Embedding

    def __init__(self, name: str, module: nn.Embedding, options: Options) -> None:
        super().__init__(name, module)
        self.shape = KroneckerShape(
            outputs=module.embedding_dim,
            inputs=module.num_embeddings,
            output_block=options.output_block,
            diagonal=True,
        )

    def positions(self, output: Tensor) -> int:
        return math.prod(output.shape[1:-1])

    def add_inputs(self, total: Tensor, x: Tensor, how: Add) -> None:
        ops.embedding_factor_(total, x, padding_idx=self.module.padding_idx, beta=how.beta, alpha=how.alpha)

    def add_outputs(self, total: Tensor, gradient: Tensor, how: Add) -> None:
        ops.linear_factor_(total, gradient, beta=how.beta, alpha=how.alpha, check_finite=how.refused)

    def rows(self, x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        one_hot = F.one_hot(x.reshape(-1), self.shape.inputs).to(gradient.dtype)
        return one_hot[None], gradient.reshape(1, -1, gradient.shape[-1])

    def gradient(self) -> Tensor:
        return _gradient(self.weight).mT

    def assign(self, matrix: Tensor) -> None:
        if self.weight.grad is not None:
            self.weight.grad.copy_(matrix.mT)


class NormalizationLayer(Layer):
    """Scale and shift of each unit: 2 x 2 blocks of the empirical Fisher, or their diagonal.

    A holds the whole block, from the gradients of each sample; B is 1.
    """

    def __init__(self, name: str, module: nn.Module, diagonal: bool) -> None:
        super().__init__(name, module)
        parameters = 1 + (self.bias is not None)
        self.units = self.weight.numel()
        self.per_unit = 1 if diagonal else parameters
        self.shape = KroneckerShape(
            outputs=1, inputs=self.per_unit, groups=self.units * parameters // self.per_unit, unit=True
        )

    def positions(self, output: Tensor) -> int:
        return output.numel() // max(1, len(output) * self.units)

    def add_inputs(self, total: Tensor, x: Tensor, how: Add) -> None:
        raise NotImplementedError("the block is known with the output gradient")

    def add_outputs(self, total: Tensor, gradient: Tensor, how: Add) -> None:
        total.fill_(1.0)

    def block_rows(self, x: Tensor, gradient: Tensor, by_position: bool) -> Tensor:
        """(samples, groups * per_unit, 1): gradients of each sample, or of each position, from input and output's."""
        parts = [gradient * self._normalized(x)]
        if self.bias is not None:
            parts.append(gradient)
        rows = torch.stack([self._per_unit(part, by_position) for part in parts], -1)  # (N, units, parameters)
        return rows.reshape(len(rows), -1, 1)

    def add_block(self, total: Tensor, rows: Tensor, how: Add) -> None:
        ops.conv1d_factor_(
            total, rows, 1, groups=self.shape.groups, beta=how.beta, alpha=how.alpha, check_finite=how.refused
        )

    def rows(self, x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("the block is dense: there is nothing to correct")

    def gradient(self) -> Tensor:
        parts = [_gradient(p).flatten() for p in (self.weight, self.bias) if p is not None]
        return torch.stack(parts, 1).view(self.shape.groups, self.per_unit)

    def assign(self, matrix: Tensor) -> None:
        columns = matrix.reshape(self.units, -1).unbind(1)
        for parameter, column in zip((self.weight, self.bias), columns, strict=False):
            if parameter is not None and parameter.grad is not None:
                parameter.grad.copy_(column.view_as(parameter))

    def _normalized(self, x: Tensor) -> Tensor:
        """What the scale multiplies."""
        module = self.module
        if isinstance(module, nn.GroupNorm):
            return F.group_norm(x, module.num_groups, eps=module.eps)
        if isinstance(module, nn.LayerNorm):
            return F.layer_norm(x, module.normalized_shape, eps=module.eps)
        if isinstance(module, nn.RMSNorm):
            return F.rms_norm(x, module.normalized_shape, eps=module.eps)
        assert isinstance(module, nn.modules.batchnorm._BatchNorm)
        running = not module.training and module.running_mean is not None
        return F.batch_norm(
            x,
            module.running_mean if running else None,
            module.running_var if running else None,
            training=not running,
            eps=module.eps,
        )

    def _per_unit(self, x: Tensor, by_position: bool) -> Tensor:
        """(N, units), sums over positions; or (N * positions, units)."""
        if isinstance(self.module, (nn.LayerNorm, nn.RMSNorm)):
            each = x.reshape(len(x), -1, self.units)
        else:
            each = x.reshape(len(x), self.units, -1).mT
        return each.flatten(0, 1) if by_position else each.sum(1)


NOT_INCLUDED, SKIPPED, NO_NORMALIZATION = "not in include", "in skip_layers", 'normalization is "skip"'
ASKED = (NOT_INCLUDED, SKIPPED, NO_NORMALIZATION)  # reasons that need no warning

NORMALIZATIONS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
)


def find_layers(
    model: nn.Module, options: Options, normalization: Normalization, wanted: Wanted
) -> tuple[list[Layer], dict[str, str]]:
    """The layers of a model that have a Fisher block, and why others, that are trained, have none."""
    layers: list[Layer] = []
    skipped: dict[str, str] = {}
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for p in module.parameters(recurse=False):
            owners.setdefault(id(p), []).append(name)
    attention: list[str] = []
    for name, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if p.requires_grad]
        if isinstance(module, nn.MultiheadAttention):
            attention.append(f"{name}." if name else "")
        if not own:
            continue
        others = [other for p in own for other in owners[id(p)] if other != name]
        layer: Layer | str = wanted(name, module) or ""
        if not layer and f"{name}.".startswith(tuple(attention)):
            layer = "the projections of nn.MultiheadAttention are not called as modules"
        if not layer and others:  # the gradient is the sum of several layers'
            layer = f"shares parameters with {others[0]}"
        if not layer:
            layer = _layer(name, module, options, normalization)
        if isinstance(layer, str):
            skipped[name] = layer
        else:
            layers.append(layer)
    return layers, skipped


def _layer(name: str, module: nn.Module, options: Options, normalization: Normalization) -> Layer | str:
    """The layer, or why there is none."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or not weight.requires_grad:
        return "its weight is not trained"
    if not isinstance(weight, nn.Parameter):
        return "its weight is computed from other parameters"
    if isinstance(module, nn.Linear):
        return LinearLayer(name, module, options)
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return ConvLayer(name, module, options)
    if isinstance(module, nn.Embedding):
        unlike = [n for n in ("sparse", "scale_grad_by_freq", "max_norm") if getattr(module, n)]
        return f"{unlike[0]} is set" if unlike else EmbeddingLayer(name, module, options)
    if isinstance(module, NORMALIZATIONS):
        if normalization == "skip":
            return NO_NORMALIZATION
        return NormalizationLayer(name, module, normalization == "diagonal")
    return f"{type(module).__name__} is of no kind that has Kronecker factors"
