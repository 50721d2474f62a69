"""Optimal brain surgeon on flat weights: what to drop, and how the other weights make up for it.

To second order, dropping the weights w_Q costs rho_Q = w_Q^T ([F^-1]_QQ)^-1 w_Q / 2 if all others move by

    dw = -F^-1[:, Q] ([F^-1]_QQ)^-1 w_Q.

Sources: Hassibi, Stork, "Second order derivatives for network pruning: optimal brain surgeon", NIPS 1992; Singh,
Alistarh, "WoodFisher", NeurIPS 2020; Frantar, Kurtic, Alistarh, "M-FAC", NeurIPS 2021; for groups, Kurtic et al., "The
optimal BERT surgeon", EMNLP 2022.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mfac_kernels.fisher import _checks
from mfac_kernels.fisher.static import StaticFisher
from mfac_kernels.ops import cholesky_factor, cholesky_solve
from mfac_kernels.pruning.patterns import Pattern, parse

_PAGE_ELEMENTS = 1 << 23  # of a batch of submatrices


class Candidates(NamedTuple):
    """Sets of weights that may be dropped, one a row; where ``members`` is -1 there is none.

    members: (q, k) int64, indices into the weights.
    rho: (q,): the cost of dropping the set, infinite if there is nothing in it to drop.
    solved: (q, k): ([F^-1]_QQ)^-1 w_Q.
    """

    members: Tensor
    rho: Tensor
    solved: Tensor


def obs_prune(
    weights: Tensor,
    fisher: StaticFisher,
    sparsity: float,
    *,
    joint: bool = False,
    pattern: str = "unstructured",
    group_size: int | None = None,
    layers: Sequence[int] | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Drop the cheapest weights until a share ``sparsity`` is zero, and move the others to where the loss rises least.

    Args:
        weights: (dim,), floating, finite, on the Fisher's device.
        fisher: of the gradients at ``weights``; the gradient of a weight that is dropped already should be zero.
        sparsity: in [0, 1): round(sparsity dim) weights are dropped, or the fewer that whole groups allow.
        joint: False: the paper's update, as if each group were dropped alone, summed over the groups. True: the
            minimum of dw^T F dw / 2 over all dw that drop what is dropped: exact, at the cost of constructing the
            Fisher again in float64.
        pattern: ``"unstructured"``; ``"2:4"``: of every four consecutive weights the best pair of six (any "n:m", n
            kept of m); ``"1x4"``: four consecutive weights go together (any "1xk"); ``"block"``: ``group_size`` do.
        group_size: of ``"block"``, by default 16.
        layers: the weights of each layer, one after another: then each layer is pruned to ``sparsity``, and no group
            crosses a border. By default the cheapest are dropped wherever they are.
        mask: (dim,) bool, false for weights that are dropped already: they stay zero and count.

    Returns:
        the new weights, in ``weights``' dtype, and the mask (dim,) bool: true for weights kept. ``weights`` itself is
        left alone.

    Raises:
        TypeError, ValueError: an argument outside these ranges.
        torch.linalg.LinAlgError: a group's [F^-1]_QQ is not positive definite in float64.
    """
    w = _checks.vectors("weights", weights, fisher.dim, fisher.device, batch=False)[0]
    _checks.finite("weights", w)
    kind = parse(pattern, group_size)
    share = check_sparsity(sparsity, kind)
    sizes = [fisher.dim] if layers is None else [_checks.positive_int("layers", n) for n in layers]
    if sum(sizes) != fisher.dim:
        raise ValueError(f"layers: expected sizes that sum to {fisher.dim}, got {sum(sizes)}")
    kept = check_mask(mask, w)
    index = kind.groups([(1, n) for n in sizes]).to(w.device)
    found = candidates(w, fisher, kind, torch.where((index >= 0) & kept[index], index, -1))
    chosen = choose(found, sizes, targets(kept, share, sizes))
    return update(w, fisher, found, chosen, kept, joint=joint)


def targets(kept: Tensor, sparsity: float, layers: Sequence[int]) -> list[int]:
    """How many weights are still to drop of each layer; ValueError if more are dropped already."""
    counts = []
    for size, part in zip(layers, torch.split(kept, list(layers)), strict=True):
        dropped = int((~part).sum())
        counts.append(round(sparsity * size) - dropped)
        if counts[-1] < 0:
            raise ValueError(
                f"sparsity: expected at least what is dropped already, {dropped / size:g}, got {sparsity:g}"
            )
    return counts


def check_sparsity(sparsity: float, pattern: Pattern) -> float:
    if isinstance(sparsity, bool) or not isinstance(sparsity, (int, float)):
        raise TypeError(f"sparsity: expected a number, got {sparsity!r}")
    if not 0 <= sparsity < 1 or sparsity > pattern.sparsity + 1e-9:  # 1/3 may be written in several ways
        bound = f"at most {pattern.sparsity:g} with this pattern" if pattern.choice else "in [0, 1)"
        raise ValueError(f"sparsity: expected a number {bound}, got {sparsity}")
    return float(sparsity)


def check_mask(mask: Tensor | None, weights: Tensor) -> Tensor:
    """``mask``, or one that keeps every weight."""
    if mask is None:
        return torch.ones_like(weights, dtype=torch.bool)
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"mask: expected a bool tensor, got {getattr(mask, 'dtype', type(mask).__name__)}")
    if mask.shape != weights.shape or mask.device != weights.device:
        raise ValueError(
            f"mask: expected shape {tuple(weights.shape)} on {weights.device}, got {tuple(mask.shape)} on {mask.device}"
        )
    return mask


def candidates(weights: Tensor, fisher: StaticFisher, pattern: Pattern, index: Tensor) -> Candidates:
    """What may be dropped of the groups ``index`` (q, size), -1 where there is no weight (any more), and its cost.

    Of a group that leaves a choice, the cheapest subset; one that has no less dropped already has nothing to drop.
    """
    w = weights.to(torch.promote_types(weights.dtype, torch.float32))
    if pattern.size == 1:
        diagonal = fisher.diagonal().to(w.dtype)
        solved = w / diagonal
        rho = torch.where(index[:, 0] >= 0, (w * solved / 2)[index[:, 0]], torch.inf)
        return Candidates(index, rho, solved[index])
    parts = []
    subsets = pattern.subsets().to(index.device)
    page = max(1, _PAGE_ELEMENTS // (len(subsets) * pattern.size**2))
    for start in range(0, len(index), page):
        groups = index[start : start + page]
        alive = groups >= 0
        matrices = _padded(fisher.group_submatrices(groups.clamp_min(0)), alive)
        values = torch.where(alive, w[groups].double(), 0)
        if not pattern.choice:
            parts.append(Candidates(torch.where(alive, groups, -1), *_cost(matrices, values, alive)))
            continue
        some = matrices[:, subsets[:, :, None], subsets[:, None]]
        rho, solved = _cost(some, values[:, subsets], alive[:, subsets])
        # What is dropped already is part of what a group has to drop.
        dropped, inside = (~alive).sum(1, keepdim=True), (~alive)[:, subsets].sum(2)
        rho = torch.where((inside == dropped) & (dropped < pattern.drop), rho, torch.inf)
        best = rho.argmin(1)
        at = torch.arange(len(groups), device=groups.device)
        chosen = subsets[best]
        picked = torch.where(alive.gather(1, chosen), groups.gather(1, chosen), -1)
        parts.append(Candidates(picked, rho[at, best], solved[at, best]))
    if not parts:
        return Candidates(index[:, : pattern.drop], w.new_empty(0), w.new_empty(0, pattern.drop))
    found, rho, solved = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return Candidates(found, rho.to(w.dtype), solved.to(w.dtype))


def _padded(matrices: Tensor, alive: Tensor) -> Tensor:
    """With rows and columns of the identity where a group has nothing alive."""
    unit = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    return torch.where(alive[:, :, None] & alive[:, None], matrices, unit)


def _cost(matrices: Tensor, values: Tensor, alive: Tensor) -> tuple[Tensor, Tensor]:
    """rho (...,) and ([F^-1]_QQ)^-1 w_Q (..., k); where nothing is alive there is nothing to drop."""
    solved = cholesky_solve(cholesky_factor(matrices), values[..., None])[..., 0]
    rho = (solved * values).sum(-1) / 2
    return torch.where(alive.any(-1), rho, torch.inf), solved


def choose(found: Candidates, layers: Sequence[int], counts: Sequence[int]) -> Tensor:
    """The cheapest of the candidates, by rho per weight -> (chosen,) int64.

    Of each layer, ``layers`` being the weights of each, up to so many weights as ``counts`` says. Ties go to the first.
    """
    chosen, start = [], 0
    sizes = (found.members >= 0).sum(1)
    each = found.rho / sizes.clamp_min(1)
    layer_of = found.members.amax(1)  # -1 for a candidate with nothing in it, whose rho is infinite
    for size, count in zip(layers, counts, strict=True):
        stop = start + size
        mine = ((layer_of >= start) & (layer_of < stop) & each.isfinite()).nonzero()[:, 0]
        order = mine[each[mine].argsort(stable=True)]
        chosen.append(order[: int((sizes[order].cumsum(0) <= count).sum())])
        start = stop
    return torch.cat(chosen)


def update(
    weights: Tensor, fisher: StaticFisher, found: Candidates, chosen: Tensor, kept: Tensor, *, joint: bool
) -> tuple[Tensor, Tensor]:
    """The new weights and the new mask, with the candidates ``chosen`` dropped."""
    w = weights.to(torch.promote_types(weights.dtype, torch.float32))
    members = found.members[chosen]
    dropped = members[members >= 0]
    mask = kept.clone()
    mask[dropped] = False
    if not len(dropped):
        moved = torch.zeros_like(w)
    elif joint:
        moved = fisher.constrained_minimum(torch.where(kept & ~mask, -w, 0), ~mask)
    else:
        z = torch.zeros_like(w)
        z[dropped] = -found.solved[chosen][members >= 0]
        moved = fisher.ihvp(z)
    return torch.where(mask, w + moved, 0).to(weights.dtype), mask
