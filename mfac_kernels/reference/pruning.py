"""Optimal brain surgeon in float64, group by group, from a dense inverse: what :mod:`mfac_kernels.pruning` computes.

weights (d,), inverse = F^-1 (d, d); a group is a list of indices.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def cost(weights: Tensor, inverse: Tensor, group: Sequence[int]) -> float:
    """rho_Q = w_Q^T ([F^-1]_QQ)^-1 w_Q / 2."""
    q = torch.tensor(group)
    w = weights.double()[q]
    return float(w @ torch.linalg.solve(inverse[q][:, q], w)) / 2


def update(weights: Tensor, inverse: Tensor, group: Sequence[int]) -> Tensor:
    """dw = -F^-1[:, Q] ([F^-1]_QQ)^-1 w_Q -> (d,): drops the group and moves all other weights."""
    q = torch.tensor(group)
    moved: Tensor = -inverse[:, q] @ torch.linalg.solve(inverse[q][:, q], weights.double()[q])
    return moved


def pruned(weights: Tensor, inverse: Tensor, groups: Iterable[Sequence[int]], *, joint: bool) -> Tensor:
    """Weights without the groups: each dropped as if alone and the updates summed, or all at once."""
    groups = [list(group) for group in groups]
    everything = [i for group in groups for i in group]
    moves = [update(weights, inverse, group) for group in ([everything] if joint else groups) if group]
    new = weights.double() + sum(moves, torch.zeros(len(weights), dtype=torch.float64))
    new[everything] = 0
    return new


def best_subset(weights: Tensor, inverse: Tensor, group: Sequence[int], drop: int) -> tuple[int, ...]:
    """The ``drop`` of a group that cost least together, by trying all."""
    return min(itertools.combinations(group, drop), key=lambda subset: cost(weights, inverse, subset))
