"""One rank of test_gathering_ranks.py: python group_rank.py RANK RANKS RENDEZVOUS OUT.

OUT gets what each case found, by name: tensors, or the text of the error that it raised.
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import mfac_kernels as mk
from mfac_kernels.preconditioners import _distributed

_distributed.PATIENCE = timedelta(seconds=2)


def model(width: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 2)).double()


def factors(rank: int, **options: Any) -> list[Tensor]:
    """Of a batch that is another one on each rank."""
    net = model()
    p = mk.KFAC(net, factor_decay=0.0, kl_clip=None, **options)
    x = torch.full((4, 3), 1.0 + rank, dtype=torch.float64)
    net(x).square().sum(1).mean().backward()
    p.step()
    return [f for i in range(2) for f in p.fisher.factors(i)]


def default(rank: int) -> Any:
    return factors(rank)


def alone(rank: int) -> Any:
    """No rank waits for another: 0 makes none at all."""
    return factors(rank, process_group=None) if rank else []


def group(rank: int) -> Any:
    """Ranks 0 and 2 share a batch, and 1 is on its own."""
    pair = dist.new_group([0, 2])
    return factors(rank, process_group=pair if rank != 1 else None)


def not_in_group(rank: int) -> Any:
    first = dist.new_group([0])
    return factors(rank, process_group=first)


def other_width(rank: int) -> Any:
    mk.KFAC(model(3 + rank))


def fewer_layers(rank: int) -> Any:
    mk.KFAC(model(), skip_layers=["2"] if rank else [])


def other_options(rank: int) -> Any:
    mk.KFAC(model(), group_size=2 if rank else None)


def other_kind(rank: int) -> Any:
    """Of the same factors' sizes and names, but that a kernel has offsets."""
    mk.KFAC(nn.Sequential(nn.Conv1d(2, 3, 2) if rank else nn.Linear(4, 3)))


def other_order(rank: int) -> Any:
    layers = {"first": nn.Linear(3, 3), "second": nn.Conv1d(3, 3, 2)}
    mk.KFAC(nn.ModuleDict(dict(reversed(layers.items()) if rank else layers.items())))


def another(rank: int) -> Any:
    """After those that failed."""
    return factors(rank)


def paused(rank: int) -> Any:
    """A rank that is has no sums; the others' are those of all."""
    net = model()
    p = mk.KFAC(net, factor_decay=0.0, kl_clip=None)
    x = torch.full((4, 3), 1.0 + rank, dtype=torch.float64)
    loss = net(x).square().sum(1).mean()
    if rank:
        with p.paused():
            loss.backward()
    else:
        loss.backward()
    p.step()
    return [torch.tensor(p.fisher.seen), *(f for i in range(2) for f in p.fisher.factors(i))]


def nothing(rank: int) -> Any:
    """No rank has sums: no batch is seen."""
    p = mk.KFAC(model(), kl_clip=None)
    p.step()
    return p.fisher.seen


def one_rank_only(rank: int) -> Any:
    if rank == 0:
        mk.KFAC(model())


CASES = [
    *(default, alone, group, not_in_group),
    *(other_width, fewer_layers, other_options, other_kind, other_order, another),
    *(paused, nothing),
]


def main(rank: int, ranks: int, rendezvous: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=ranks)
    found = {}
    for case in [*CASES, one_rank_only]:
        try:
            found[case.__name__] = case(rank)
        except (RuntimeError, ValueError) as error:
            found[case.__name__] = str(error)
    torch.save(found, out)
    os._exit(0)  # the destructors of torch's process groups now and then wait for each other


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
