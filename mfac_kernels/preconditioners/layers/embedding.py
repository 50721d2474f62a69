"""Embeddings, whose rows are one-hot."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from mfac_kernels import ops
from mfac_kernels.fisher.kronecker import KroneckerShape
from mfac_kernels.preconditioners.layers.base import Add, Layer, Options, gradient_of


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
        return gradient_of(self.weight).mT

    def assign(self, matrix: Tensor) -> None:
        if self.weight.grad is not None:
            self.weight.grad.copy_(matrix.mT)
