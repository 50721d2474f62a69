"""One rank of test_kfac_distributed.py: python kfac_rank.py RANK RANKS RENDEZVOUS STYLE BAD_AT OUT."""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn

import mfac_kernels as mk

STEPS = 4


def build() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(36, 3)
    ).double()


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 2, 5, 5, generator=generator).double(), torch.randint(0, 3, (8,), generator=generator)


def train(model: nn.Module, style: str, rank: int, ranks: int, bad_at: int = -1) -> mk.KFAC:
    p = mk.KFAC(model, 0.03, inv_update_steps=2, damping_style=style, kl_clip=1e-2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(STEPS):
        x, y = (part.chunk(ranks)[rank] for part in batch(step))
        if step == bad_at and rank == 0:
            x = x * float("nan")
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        p.step()
        if step != bad_at:
            optimizer.step()
    return p


def main(rank: int, ranks: int, rendezvous: str, style: str, bad_at: int, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=ranks)
    model = nn.parallel.DistributedDataParallel(build())
    p = train(model, style, rank, ranks, bad_at)
    weights = [q.detach() for q in model.parameters()]
    torch.save({"weights": weights, "seen": p.fisher.seen, "skipped": p.fisher.skipped}, out)
    dist.barrier()
    os._exit(0)  # the destructors of torch's process groups and reducers now and then wait for each other


if __name__ == "__main__":
    rank, ranks, rendezvous, style, bad_at, out = sys.argv[1:]
    main(int(rank), int(ranks), rendezvous, style, int(bad_at), out)
