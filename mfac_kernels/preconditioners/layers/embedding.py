"""Embeddings, whose rows are one-hot."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mfac_kernels import ops
from mfac_kernels.fisher.kronecker import KroneckerShape, Pairs
from mfac_kernels.preconditioners.layers.base import Add, Layer, Options, accumulated
from mfac_kernels.preconditioners.layers.maps import EmbeddingMap
from mfac_kernels.preconditioners.layers.rows import add_rows


class EmbeddingLayer(Layer):
    """Rows: one-hot; positions: the indices of a sample. The gradient is the transpose of the weight's."""

    module: nn.Embedding
    always_expands = True
    least_dims = 1

    def __init__(self, name: str, module: nn.Embedding, options: Options) -> None:
        super().__init__(name, module, options)
        self.shape = KroneckerShape(
            outputs=module.embedding_dim,
            inputs=module.num_embeddings,
            input_block=1,
            output_block=options.output_block,
        )

    @classmethod
    def of(cls, name: str, module: nn.Module, options: Options) -> Sequence[Layer] | str:
        unlike = [n for n in ("sparse", "scale_grad_by_freq", "max_norm") if getattr(module, n)]
        return f"{unlike[0]} is set" if unlike else super().of(name, module, options)

    def part(self, p: Tensor) -> Tensor:
        return p.mT

    def position_shape(self, output: Tensor) -> tuple[int, ...]:
        return tuple(output.shape[1:-1])

    def samples_first(self, x: Tensor, dim: int) -> Tensor:
        return x.movedim(dim, 0) if dim < x.dim() - x.is_floating_point() else x  # the gradient has columns too

    def add_inputs(self, total: Tensor, x: Tensor, how: Add) -> None:
        total = total.view(-1)
        if how.valid is None:
            ops.embedding_factor_(total, x, padding_idx=self.module.padding_idx, beta=how.beta, alpha=how.alpha)
            return
        each = how.valid if how.factor is None else how.valid * how.factor
        weights = self._counted(x.flatten(), each.flatten().to(total.dtype))
        counts = torch.zeros_like(total).index_put_((x.flatten(),), weights, accumulate=True)
        if how.beta == 0:
            total.zero_()
        total.mul_(how.beta).add_(counts, alpha=how.alpha)

    def add_outputs(self, total: Tensor, gradient: Tensor, how: Add) -> None:
        add_rows(total, gradient, how, how.weights(gradient))

    def pairs(self, x: Tensor, gradient: Tensor, how: Add) -> Pairs:
        weights = self.row_weights(x, gradient, how)
        return Pairs(x.flatten(), gradient.reshape(1, -1, gradient.shape[-1]), how.alpha, weights[:, None])

    def row_weights(self, x: Tensor, gradient: Tensor, how: Add) -> Tensor:
        """(n,), of products of an index with a gradient."""
        weights = how.weights(gradient)
        if weights is None:
            weights = gradient.new_ones(gradient.shape[:-1], dtype=accumulated(gradient.dtype))
        return self._counted(x.flatten(), weights.flatten())

    def _counted(self, indices: Tensor, weights: Tensor) -> Tensor:
        """Weights of indices, 0 for those that get no gradient."""
        padding = self.module.padding_idx
        return weights if padding is None else weights * (indices != padding)

    def linear_map(self) -> EmbeddingMap:
        return EmbeddingMap(self.shape.outputs, self.shape.inputs, self.module.padding_idx)
