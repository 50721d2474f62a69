"""Embeddings and heads of one weight: a layer with several uses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mfac_kernels.fisher.kronecker import KroneckerFisher
from mfac_kernels.preconditioners.layers.base import Add, Handle, Hook, Layer, Options, Together
from mfac_kernels.preconditioners.layers.embedding import EmbeddingLayer
from mfac_kernels.preconditioners.layers.linear import LinearLayer
from mfac_kernels.preconditioners.layers.maps import LinearMap
from mfac_kernels.preconditioners.layers.rows import add_sums


class TiedLayer(LinearLayer):
    """A weight (indices, width) that is both an embedding's and a head's, in the head's orientation.

    A call c of the head has A_c of its inputs and the diagonal of B_c, of the gradients of its outputs. A call of an
    embedding has a diagonal B_c, of one-hot rows, and A_c of the gradients of its outputs: what is an input to one use
    is a gradient to the other, so that sums of A_c and of B_c alone would add what has no common scale. The sum of
    the calls' Fisher blocks, sum_c B_c (x) A_c, becomes the one product that has its partial traces,

        B (x) A,  A ~ sum_c tr(B_c) A_c,  B ~ sum_c tr(A_c) B_c,  tr(B) tr(A) = sum_c tr(B_c) tr(A_c)

    which is that of the only call, or of calls that are alike; for these it is also what Eschenhagen et al. 2023 have
    for a shared weight, whose uses have inputs and gradients in the same place. Calls are expanded, whatever the
    approximation. The head's bias is the last column, zero for an embedding.
    """

    always_expands = True
    joint = True
    least_dims = 1

    def __init__(self, uses: Mapping[str, nn.Module], options: Options) -> None:
        self.uses = list(uses.values())
        names = list(uses)
        heads = [m for m in self.uses if not isinstance(m, nn.Embedding)]
        name, embedding = next((n, m) for n, m in uses.items() if isinstance(m, nn.Embedding))
        self._embedding = EmbeddingLayer(name, embedding, options)
        super().__init__(names[0], heads[0] if heads else embedding, replace(options, output_block=1))
        self._title = " = ".join(names)

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

    def attach(self, hook: Hook) -> list[Handle]:
        return [m.register_forward_hook(hook, with_kwargs=True) for m in self.uses]

    def samples_first(self, x: Tensor, dim: int) -> Tensor:
        return self._embedding.samples_first(x, dim)

    def unfit(self, x: object, output: object) -> str | None:
        if isinstance(x, Tensor) and x.is_floating_point() and x.dim() < 2:
            return f"expected inputs of at least 2 dimensions, samples first, got shape {tuple(x.shape)}"
        return super().unfit(x, output)

    def add_inputs(self, total: Tensor, x: Tensor, how: Add) -> None:
        raise NotImplementedError("the factors are weighted by each other")

    def add_outputs(self, total: Tensor, gradient: Tensor, how: Add) -> None:
        raise NotImplementedError("the factors are weighted by each other")

    def add_together(self, fisher: KroneckerFisher, layer: int, x: Tensor, gradient: Tensor, how: Together) -> None:
        a, b = (
            torch.zeros(size if size[0] > 1 else size[1:], dtype=fisher.dtype, device=gradient.device)
            for size in (self.shape.input_factor, self.shape.output_factor)
        )
        if x.is_floating_point():
            super().add_inputs(a, x, how.inputs)
            super().add_outputs(b, gradient, how.outputs)
        else:
            self._embedding.add_inputs(b, x, how.inputs)
            self._embedding.add_outputs(a, self._with_bias(gradient), how.outputs)
        traces = [factor.diagonal(dim1=-2, dim2=-1).sum() for factor in (b, a)]
        for add, factor, weight in zip((fisher.add_inputs, fisher.add_outputs), (a, b), traces, strict=True):
            add(layer, partial(_add, factor * weight, fisher.refused))

    def add_moments(self, fisher: KroneckerFisher, layer: int, x: Tensor, gradient: Tensor, how: Add) -> None:
        if x.is_floating_point():
            super().add_moments(fisher, layer, x, gradient, how)
            return
        rows, weights = self._with_bias(gradient).flatten(0, -2), self._embedding.row_weights(x, gradient, how)
        fisher.add_moments(layer, rows[None], x.flatten(), how.alpha, weights[:, None])

    def linear_map(self) -> TiedMap:
        return TiedMap(self.shape.outputs, self.shape.inputs, self.shape.bias, self._embedding.module.padding_idx)

    def _with_bias(self, gradient: Tensor) -> Tensor:
        """Of an embedding."""
        return F.pad(gradient, (0, 1)) if self.shape.bias else gradient

    def _reduces(self, x: Tensor) -> bool:
        return False


def _add(part: Tensor, refused: Tensor, total: Tensor, beta: float) -> None:
    add_sums(total, part, Add(beta, 1.0, refused))


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
            block[self.padding_idx] = 0
        return block
