"""Mini-block Fisher: thousands of small blocks in place of two factors."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from mfac_kernels.fisher._checks import one_of
from mfac_kernels.fisher._mini_blocks import MiniBlocks, MiniBlockShape
from mfac_kernels.fisher.jacobian import Call
from mfac_kernels.preconditioners._covered import CoveredLayer, covered_row
from mfac_kernels.preconditioners._kept import Kept, KeptPreconditioner
from mfac_kernels.preconditioners._memory import factor_text
from mfac_kernels.preconditioners.base import Hyperparameter
from mfac_kernels.preconditioners.layers.base import Add, Layer
from mfac_kernels.preconditioners.layers.convolution import ConvLayer
from mfac_kernels.preconditioners.layers.embedding import EmbeddingLayer

_AT_A_TIME = 1 << 22  # elements of per-sample gradients, and of patches


class MiniBlockFisher(KeptPreconditioner):
    """Replaces gradients by (F_b + damping I)^-1 g_b, block by block of the Fisher matrix of each layer.

        preconditioner = mk.MiniBlockFisher(model, damping=1e-2, inv_update_steps=10)
        loss_function(model(x), y).backward()
        preconditioner.step()
        optimizer.step()

    With j_n the gradient of sample n, summed over the positions and calls of its pass (calls of a normalization layer
    count one by one), F_b = (1/N) sum_n j_nb j_nb^T averaged over batches, exactly as the dense empirical Fisher matrix
    has it, for the blocks b

        convolution   the offsets of the kernel from one input channel to one output channel; each bias on its own
        linear        the weights and the bias of one output neuron
        normalization scale and shift of each unit

    All blocks of a model are inverted in one call. A layer holds two numbers for each element of its blocks (average
    and inverse): 2 k^2 for each weight of a k x k kernel, and 2 (d_in + 1) for each of a linear layer. Where that is
    too much ``linear="mean"`` keeps one block for all neurons, the mean of theirs. Per-sample gradients are formed some
    samples at a time; inputs and output gradients are kept from each backward pass to the step.

    The published program has the same blocks of convolutions and of their biases, but takes the outer products of whole
    batches' gradients, of labels drawn from the model, in place of samples'. Its averages begin with a pass over the
    data, where these are debiased; normalization layers have their diagonal (``normalization="diagonal"``); a linear
    layer has one mean block; momentum is of gradients before they are preconditioned.

    A batch that is not finite changes nothing and is counted. What has seen no batch keeps its gradient. Embeddings and
    weights that two modules share are left alone.

    Args:
        linear: ``"neuron"``, or ``"mean"``, as above.

    The others are :class:`KFAC`'s: damping, factor_update_steps, inv_update_steps, factor_decay, kl_clip, lr,
    accumulation_steps, fisher_type, loss_average, normalization, include, skip_layers, scaler, gather, batch_size,
    batch_dim, max_layer_bytes.

    Source: Bahamou, Goldfarb, Ren, "A mini-block Fisher method for deep neural networks", AISTATS 2023.

    Raises:
        TypeError, ValueError: an argument outside its range; no layer, or one too large.
        RuntimeError: several processes.
    """

    _owner = "MiniBlockFisher"
    _ways_out = ', linear="mean" for a linear layer'

    def __init__(
        self,
        model: nn.Module,
        damping: Hyperparameter = 1e-3,
        *,
        linear: Literal["neuron", "mean"] = "neuron",
        **options: Any,
    ) -> None:
        one_of("linear", linear, ("neuron", "mean"))
        self._mean = linear == "mean"
        super().__init__(model, damping, **options)
        self.blocks = MiniBlocks([self._shape(layer) for layer in self._layers], self._dtype, self._device)

    @torch.no_grad()
    def step(self) -> None:
        """Precondition the gradients in place: those of modules that were not called stay zero or None.

        Raises:
            ValueError: a hyper-parameter's function returned a value out of range.
            RuntimeError: a parameter that was frozen at construction is trained. Nothing changes in either case.
        """
        damping, decay, clip, gradients = self._begin()
        kept = self._kept()
        if kept is not None:
            sums = {i: self._sums(i, kept) for i in sorted({call.layer for call in kept.jacobian.calls})}
            if sums:
                refused = self._gatherer.fisher.refused
                self._count(self.blocks.update(sums, decay, refused[0] == 0))
                refused.zero_()
        if self.steps % self.inv_update_steps == 0:
            self.blocks.refresh(damping)
        self._finish(self._bounded(gradients, self.blocks.ihvp(gradients), clip))
        self._rest()

    def _sums(self, i: int, kept: Kept) -> list[Tensor]:
        """Over the samples of a batch, of one layer."""
        layer, shape = self._layers[i], self.blocks.shapes[i]
        totals = self.blocks.empty(i)
        for calls in kept.passes(i):
            largest = max(shape.rows, *(call.repeats * layer.positions(call.gradients) for call in calls))
            at_once = max(1, _AT_A_TIME // (largest * shape.columns))
            scaled = [kept.scaled(call) for call in calls]
            if layer.shape.unit:
                for call, g in zip(calls, scaled, strict=True):
                    block = totals[0] if len(totals[0]) > 1 else totals[0][0]
                    layer.add_block(block, call.inputs, g, False, Add(1.0, 1.0, self._gatherer.fisher.refused))
                continue
            for first in range(0, calls[0].samples, at_once):
                chosen = [self._pairs(layer, call, g, first, at_once) for call, g in zip(calls, scaled, strict=True)]
                if shape.mean:
                    a, g = (torch.cat(rows, 2)[0] for rows in zip(*chosen, strict=True))
                    self.blocks.add_mean_(i, totals, a, g)
                else:
                    gradients = sum((g.mT @ a).transpose(0, 1).flatten(1, 2) for a, g in chosen)
                    assert isinstance(gradients, Tensor)
                    self.blocks.add_(i, totals, gradients)
        return totals

    def _pairs(self, layer: Layer, call: Call, gradient: Tensor, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Inputs and output gradients of some samples: (groups, n, positions, columns or outputs)."""
        samples = min(count, call.samples - first)
        rows = slice(first * call.repeats, (first + samples) * call.repeats)
        pairs = layer.pairs(call.inputs[rows], gradient[rows], Add(1.0, 1.0, self._gatherer.fisher.refused))
        a, g = pairs.inputs, pairs.gradients
        return a.reshape(len(a), samples, -1, a.shape[-1]), g.reshape(len(g), samples, -1, g.shape[-1])

    def _unusable(self, layer: Layer) -> str | None:
        if isinstance(layer, EmbeddingLayer):
            return "embeddings have no mini-blocks"
        return "a weight that is used both ways has no mini-blocks" if layer.shape.two_uses else None

    def _shape(self, layer: Layer) -> MiniBlockShape:
        shape = layer.shape
        rows = shape.groups * shape.outputs
        if shape.unit:
            return MiniBlockShape(shape.groups, shape.columns, shape.columns)
        if isinstance(layer, ConvLayer):
            return MiniBlockShape(rows, shape.columns, shape.offsets, shape.bias)
        return MiniBlockShape(rows, shape.columns, shape.columns, mean=self._mean)

    def _row(self, layer: Layer) -> CoveredLayer:
        shape = self._shape(layer)
        kinds = ", ".join(factor_text((count, size, size)) for count, size in shape.blocks)
        return covered_row(layer, kinds, "1", 2 * self._dtype.itemsize * shape.elements)

    def diagnostics(self) -> dict[str, float]:
        """Also blocks, since the start, that were inverted in float64, with a larger damping, and not at all."""
        return {**super().diagnostics(), **self.blocks.diagnostics()}

    def _state(self) -> dict[str, Any]:
        return self.blocks.state_dict()
