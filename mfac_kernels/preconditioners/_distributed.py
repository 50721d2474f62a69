"""K-FAC over the ranks of a process group: the same layers, averaged sums, inversions shared out by cost."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from mfac_kernels.fisher.kronecker import KroneckerFisher

ProcessGroup = Any
PATIENCE = timedelta(minutes=1)
"""How long the first rank to make a preconditioner waits for the last."""


class Ranks:
    """Those that share a batch: of the default group, of a group, or, with None, this one alone."""

    def __init__(self, group: ProcessGroup | Literal["default"] | None) -> None:
        self._group: ProcessGroup = None
        on = dist.is_available() and dist.is_initialized()
        named = group is not None and not isinstance(group, str)
        if isinstance(group, str) and group != "default":
            raise ValueError(f'process_group: expected "default", None or a group, got {group!r}')
        if named and not (on and isinstance(group, dist.ProcessGroup)):
            raise ValueError('process_group: expected "default", None or a group that this rank is in, got another')
        if named:
            self._group = group
        self.count = dist.get_world_size(self._group) if on and group is not None else 1

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        return self

    def check_layers(self, layers: Mapping[str, object]) -> None:
        """RuntimeError unless all ranks have the same layers, given by name, each with what must be alike."""
        if self.count == 1:
            return
        mine = {name: str(what) for name, what in layers.items()}
        for rank, text in enumerate(self._exchange(json.dumps(mine))):
            theirs = json.loads(text)
            unlike = sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name))
            if unlike or list(mine) != list(theirs):
                name = unlike[0] if unlike else next(a for a, b in zip(mine, theirs, strict=True) if a != b)
                raise RuntimeError(
                    f"KFAC: expected the same layers on all ranks of the process group; of {name}, rank {self._rank} "
                    f"has {mine.get(name, 'none')} and rank {rank} {theirs.get(name, 'none')}"
                    + ("" if unlike else ", in another order")
                )

    def _exchange(self, text: str) -> list[str]:
        """The texts of all ranks. RuntimeError if one does not come."""
        store = dist.distributed_c10d._get_default_store()
        group: ProcessGroup = self._group if self._group is not None else dist.group.WORLD
        room = f"mfac_kernels/{group.group_name}"
        made = store.add(f"{room}/{self._rank}", 1)  # a preconditioner of each rank for each of the others
        keys = [f"{room}/{made}/{rank}" for rank in range(self.count)]
        store.set(keys[self._rank], text)
        for rank, key in enumerate(keys):
            try:
                store.wait([key], PATIENCE)
            except RuntimeError:
                raise RuntimeError(
                    f"KFAC: expected one on each of the {self.count} ranks of the process group; rank {rank} has made "
                    f"none in {PATIENCE.seconds} s. With process_group=None this rank is on its own"
                ) from None
        return [store.get(key).decode() for key in keys]

    @property
    def _rank(self) -> int:
        return dist.get_rank(self._group)

    def average_sums(self, fisher: KroneckerFisher) -> None:
        """The mean of this batch's sums over the ranks that called a layer; what one rank refuses, all refuse."""
        if self.count == 1:
            return
        counts = fisher.batch_counts()
        parts = [*counts, *fisher.batch_sums()]
        flat = torch.cat([part.flatten() for part in parts])
        dist.all_reduce(flat, group=self._group)
        dist.all_reduce(fisher.refused, dist.ReduceOp.MAX, group=self._group)
        _scatter(flat, parts)
        fisher.share(counts)

    def average(self, tensors: Sequence[Tensor]) -> None:
        """The mean over the ranks, in place."""
        if self.count == 1 or not tensors:
            return
        flat = torch.cat([t.flatten().to(torch.float64) for t in tensors])
        dist.all_reduce(flat, group=self._group)
        _scatter(flat / self.count, list(tensors))

    def share_refresh(self, fisher: KroneckerFisher) -> None:
        """Each rank inverts layers of about the same cost in all and sends them to the others."""
        if self.count == 1:
            fisher.refresh()
            return
        owner = _owners([fisher.refresh_cost(layer) for layer in range(len(fisher.shapes))], self.count)
        fisher.refresh([layer for layer, rank in enumerate(owner) if rank == self._rank])
        for rank in range(self.count):
            parts = [t for layer, r in enumerate(owner) if r == rank for t in fisher.inverse_state(layer)]
            if not parts:
                continue
            flat = torch.cat([t.flatten() for t in parts])
            dist.broadcast(flat, group=self._group, group_src=rank)
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
