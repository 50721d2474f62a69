"""SparseGPT: a layer's weight made sparse column by column; the columns that are left answer for each weight dropped.

With U upper triangular, U^T U = (H + damping mean(diag H) I)^-1, a weight costs w_i^2 / U_ii^2, and for i = 1 .. n

    w_j <- w_j - w_i / U_ii  U_ij  for j > i,    w_i <- 0    in the rows that drop w_i.

What is dropped is chosen with the weights as they have become: of each block of columns the cheapest, or of every m
columns the m - n cheapest of each row.

Source: Frantar, Alistarh, "SparseGPT: massive language models can be accurately pruned in one-shot", ICML 2023,
algorithm 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mfac_kernels.fisher import _checks
from mfac_kernels.pruning import _layers
from mfac_kernels.pruning._columns import InverseFactor, change_columns, inverse_factor, matrix_and_hessian
from mfac_kernels.pruning.obs import check_sparsity
from mfac_kernels.pruning.patterns import parse

__all__ = ["sparsegpt"]


@torch.no_grad()
def sparsegpt(
    layer: _layers.Layer,
    hessian: Tensor,
    sparsity: float = 0.5,
    *,
    pattern: str = "unstructured",
    damping: float = 0.01,
    block_size: int = 128,
    inverse_factor: InverseFactor = inverse_factor,
) -> Tensor:
    """Prune the layer's weight, in place.

    Args:
        layer, hessian, damping, inverse_factor: see :func:`gptq`.
        sparsity: round(sparsity weights) are dropped, in all blocks alike.
        pattern: ``"unstructured"``; or ``"2:4"`` (any "n:m"), n kept of every m columns: then ``sparsity`` is 1 - n/m.
            Columns at the end of a row that m does not divide are kept.
        block_size: columns among which an unstructured choice is made; rounded up to a multiple of m.

    Returns:
        the mask, bool, in the shape of the weight: true for weights kept.

    Raises:
        as :func:`gptq`; the layer is as it was.
    """
    kind = parse(pattern)
    if kind.size > 1 and (not kind.choice or abs(sparsity - kind.sparsity) > 1e-9):
        raise ValueError(
            f"pattern: expected 'unstructured', or 'n:m' with sparsity 1 - n/m, got {pattern!r} with {sparsity}"
        )
    check_sparsity(sparsity, kind)
    weights, h = matrix_and_hessian(layer, hessian)
    factor = inverse_factor(h, damping)
    n = weights.shape[2]
    block = _checks.positive_int("block_size", block_size)
    block += -block % kind.size
    diagonal = factor.diagonal(dim1=-2, dim2=-1)[:, None]
    kept = torch.ones_like(weights, dtype=torch.bool)

    def drop_cheapest(start: int, stop: int, count: int, each_row: bool) -> None:
        cost = (weights[..., start:stop] / diagonal[..., start:stop]).square()
        choice = cost if each_row else cost.reshape(-1)
        cheapest = choice.argsort(stable=True)[..., :count]
        kept[..., start:stop] = torch.ones_like(choice, dtype=torch.bool).scatter(-1, cheapest, False).view_as(cost)

    def pruned(i: int) -> Tensor:
        if not kind.choice and i % block == 0:
            stop = min(i + block, n)
            count = round(sparsity * weights[..., :stop].numel()) - round(sparsity * weights[..., :i].numel())
            drop_cheapest(i, stop, count, each_row=False)
        if kind.choice and i % kind.size == 0 and i + kind.size <= n:
            drop_cheapest(i, i + kind.size, kind.drop, each_row=True)
        return weights[..., i] * kept[..., i]

    change_columns(weights, factor, pruned, block)
    mask = _layers.shaped(layer, kept)
    _layers.assign(layer, weights)
    return mask
