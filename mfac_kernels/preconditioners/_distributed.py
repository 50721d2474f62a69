"""K-FAC over the ranks of ``torch.distributed``: averaged sums, inversions shared out by cost."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from mfac_kernels.fisher.kronecker import KroneckerFisher


def _ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def average_sums(fisher: KroneckerFisher) -> None:
    """The mean of this batch's sums over the ranks that called a layer; a batch that one rank refuses, all refuse."""
    if _ranks() == 1:
        return
    counts = fisher.batch_counts()
    parts = [*counts, *fisher.batch_sums()]
    flat = torch.cat([part.flatten() for part in parts])
    dist.all_reduce(flat)
    dist.all_reduce(fisher.refused, dist.ReduceOp.MAX)
    _scatter(flat, parts)
    fisher.share(counts)


def share_refresh(fisher: KroneckerFisher) -> None:
    """Each rank inverts layers of about the same cost in all and sends them to the others."""
    ranks = _ranks()
    if ranks == 1:
        fisher.refresh()
        return
    owner = _owners([fisher.refresh_cost(layer) for layer in range(len(fisher.shapes))], ranks)
    mine = dist.get_rank()
    fisher.refresh([layer for layer, rank in enumerate(owner) if rank == mine])
    for rank in range(ranks):
        parts = [t for layer, r in enumerate(owner) if r == rank for t in fisher.inverse_state(layer)]
        if not parts:
            continue
        flat = torch.cat([t.flatten() for t in parts])
        dist.broadcast(flat, rank)
        _scatter(flat, parts)


def _scatter(flat: Tensor, parts: list[Tensor]) -> None:
    for target, part in zip(parts, torch.split(flat, [t.numel() for t in parts]), strict=True):
        target.copy_(part.view_as(target))


def _owners(costs: list[float], ranks: int) -> list[int]:
    """The rank of each layer: the costliest first, each to the rank with the least so far."""
    owner, load = [0] * len(costs), [0.0] * ranks
    for layer in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owner[layer] = min(range(ranks), key=load.__getitem__)
        load[owner[layer]] += costs[layer]
    return owner
