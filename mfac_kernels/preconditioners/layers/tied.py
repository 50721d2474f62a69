"""Embeddings and heads of one weight: a layer with two uses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import Tensor, nn

from mfac_kernels.fisher.kronecker import KroneckerShape, Pairs
from mfac_kernels.preconditioners.layers.base import Add, Handle, Hook, Layer, Options
from mfac_kernels.preconditioners.layers.embedding import EmbeddingLayer
from mfac_kernels.preconditioners.layers.forms import block_of
from mfac_kernels.preconditioners.layers.linear import LinearLayer
from mfac_kernels.preconditioners.layers.maps import LinearMap, one_hot, positions_of


class TiedLayer(Layer):
    """A weight (indices, width) that is both an embedding's and a head's, in the head's orientation.

    As a head it has A of its inputs, and the diagonal of B, of the gradients of its outputs. As an embedding it has a
    diagonal B, of one-hot rows, and A of the gradients of its outputs. What is an input to one use is a gradient to the
    other: sums of these A and of these B would add what has no common scale. The sum of the two Fisher blocks,
    B_h (x) A_h + B_e (x) A_e, becomes the one product that has its partial traces,

        B (x) A,  A ~ tr(B_h) A_h + tr(B_e) A_e,  B ~ tr(A_h) B_h + tr(A_e) B_e

    of trace tr(B_h) tr(A_h) + tr(B_e) tr(A_e). It is that of one use where the other is not called; and where both are
    alike it is what Eschenhagen et al. 2023 have for a shared weight whose uses have inputs and gradients in the same
    place. Calls of a use share its sums, as those of other layers do. The head's bias is the last column, 0 for an
    embedding. B is kept as its diagonal, unless a form is asked for by name.
    """

    def __init__(self, uses: Mapping[str, nn.Module], options: Options) -> None:
        names = list(uses)
        embedding = next(m for m in uses.values() if isinstance(m, nn.Embedding))
        head = next((m for m in uses.values() if not isinstance(m, nn.Embedding)), None)
        super().__init__(names[0], head or embedding, options)
        self._modules, self._title = list(uses.values()), " = ".join(names)
        outputs, inputs = self.weight.shape
        self.shape = KroneckerShape(
            outputs=outputs,
            inputs=inputs,
            bias=self.bias is not None,
            input_block=options.input_block,
            output_block=block_of(names, options.outputs, 1),
            two_uses=True,
        )
        self._embedding = _EmbeddingUse(names[0], embedding, options, self.shape)
        self._head = None if head is None else _HeadUse(names[0], head, options, self.shape)

    @classmethod
    def of_uses(cls, uses: Mapping[str, nn.Module], kinds: set[type[Layer] | None], options: Options) -> Layer | None:
        """The layer that modules which share parameters are, if they are one."""
        if kinds not in ({EmbeddingLayer}, {EmbeddingLayer, LinearLayer}):
            return None
        embeddings = [m for m in uses.values() if isinstance(m, nn.Embedding)]
        heads = [m for m in uses.values() if not isinstance(m, nn.Embedding)]
        fit = (
            len({id(m.weight) for m in uses.values()}) == 1
            and len({id(m.bias) for m in heads}) <= 1
            and len({m.padding_idx for m in embeddings}) == 1
            and not any(isinstance(EmbeddingLayer.of("", m, options), str) for m in embeddings)
        )
        return cls(uses, options) if fit else None

    @property
    def title(self) -> str:
        return self._title

    def use(self, x: object) -> Layer:
        indices = isinstance(x, Tensor) and not x.is_floating_point()
        return self._embedding if indices or self._head is None else self._head

    def attach(self, hook: Hook) -> list[Handle]:
        return [m.register_forward_hook(hook, with_kwargs=True) for m in self._modules]

    def linear_map(self) -> TiedMap:
        return TiedMap(self.shape.outputs, self.shape.inputs, self.shape.bias, self._embedding.module.padding_idx)

    def position_shape(self, output: Tensor) -> tuple[int, ...]:
        raise NotImplementedError("asked of its uses")


class _HeadUse(LinearLayer):
    def __init__(self, name: str, module: nn.Module, options: Options, shape: KroneckerShape) -> None:
        super().__init__(name, module, options)
        self.shape = shape

    def add_inputs(self, total: Tensor, x: Tensor, how: Add) -> None:
        super().add_inputs(_of_width(total, self.shape), x, how)

    def add_outputs(self, total: Tensor, gradient: Tensor, how: Add) -> None:
        super().add_outputs(_of_indices(total, self.shape), gradient, how)


class _EmbeddingUse(EmbeddingLayer):
    """Its rows are one-hot in B, and its gradients in A."""

    def __init__(self, name: str, module: nn.Embedding, options: Options, shape: KroneckerShape) -> None:
        super().__init__(name, module, options)
        self.shape = shape

    def add_inputs(self, total: Tensor, x: Tensor, how: Add) -> None:
        blocks = _of_indices(total, self.shape)
        if self.shape.output_block == 1:
            super().add_inputs(blocks, x, how)
            return
        counts = total.new_zeros(self.shape.outputs)
        super().add_inputs(counts, x, replace(how, beta=0.0))
        diagonal = blocks.diagonal(dim1=-2, dim2=-1)
        counts = F.pad(counts, (0, diagonal.numel() - len(counts))).view_as(diagonal)
        blocks.mul_(how.beta)
        diagonal += counts

    def add_outputs(self, total: Tensor, gradient: Tensor, how: Add) -> None:
        super().add_outputs(_of_width(total, self.shape), self._with_bias(gradient), how)

    def pairs(self, x: Tensor, gradient: Tensor, how: Add) -> Pairs:
        indices, rows = x.flatten(), self._with_bias(gradient).flatten(0, -2)[None]
        weights = self.row_weights(x, gradient, how)[:, None]
        if self.shape.output_block != 1:
            indices = F.one_hot(indices, self.shape.outputs).to(rows.dtype)[None]
        return Pairs(rows, indices, how.alpha, weights)

    def _with_bias(self, gradient: Tensor) -> Tensor:
        return F.pad(gradient, (0, 1)) if self.shape.bias else gradient


def _of_width(total: Tensor, shape: KroneckerShape) -> Tensor:
    """The part of a sum that is of A's form."""
    size = shape.input_factor
    return total[: math.prod(size)].view(size if size[0] > 1 else size[1:])


def _of_indices(total: Tensor, shape: KroneckerShape) -> Tensor:
    """The part of a sum that is of B's form."""
    size = shape.output_factor
    return total[-math.prod(size) :].view(size if size[0] > 1 else size[1:])


@dataclass(frozen=True)
class TiedMap(LinearMap):
    """Of inputs what a :class:`LinearMap` is; of indices (n, ...) the rows of the block, without the bias."""

    padding_idx: int | None = None

    def forward(self, a: Tensor, block: Tensor) -> Tensor:
        if a.is_floating_point():
            return super().forward(a, block)
        rows = F.embedding(a, block[:, : self.inputs])
        return rows if self.padding_idx is None else rows.masked_fill((a == self.padding_idx)[..., None], 0)

    def weight_gradient(self, a: Tensor, g: Tensor) -> Tensor:
        if a.is_floating_point():
            return super().weight_gradient(a, g)
        block = g.new_zeros(self.shape)
        block[:, : self.inputs].index_put_((a.reshape(-1),), g.reshape(-1, self.inputs), accumulate=True)
        if self.padding_idx is not None:
            block[self.padding_idx].zero_()
        return block

    def sample_gradients(self, a: Tensor, g: Tensor) -> Tensor:
        if a.is_floating_point():
            return super().sample_gradients(a, g)
        chosen = one_hot(a, self.outputs, self.padding_idx, g.dtype)
        block = chosen.mT @ positions_of(g)
        return (F.pad(block, (0, 1)) if self.bias else block).flatten(1)
