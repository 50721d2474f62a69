"""KFAC under DistributedDataParallel: two real processes (gloo) take the step that one takes on the joint batch."""

from __future__ import annotations

import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
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


def train(model: nn.Module, p: mk.KFAC, rank: int, ranks: int, bad_at: int | None = None) -> None:
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


def options(style: str) -> dict[str, object]:
    return {"damping": 0.03, "inv_update_steps": 2, "damping_style": style, "kl_clip": 1e-2}


def worker(rank: int, port: int, style: str, bad_at: int | None, results: mp.Queue) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        torch.set_num_threads(1)
        model = nn.parallel.DistributedDataParallel(build())
        p = mk.KFAC(model, **options(style))
        train(model, p, rank, 2, bad_at)
        results.put((rank, [q.detach().numpy() for q in model.parameters()], p.fisher.seen, p.fisher.skipped))
    finally:
        dist.destroy_process_group()


def run_two(style: str, bad_at: int | None = None) -> list[tuple[int, list[Tensor], int, int]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = mp.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=worker, args=(rank, port, style, bad_at, results)) for rank in range(2)]
    for process in processes:
        process.start()
    got = [results.get(timeout=120) for _ in processes]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    return [(rank, [torch.from_numpy(w) for w in weights], seen, skipped) for rank, weights, seen, skipped in got]


@pytest.mark.parametrize("style", ["factored", "exact"])
def test_two_processes_equal_one_on_the_joint_batch(style):
    alone = build()
    train(alone, mk.KFAC(alone, **options(style)), 0, 1)
    for _, weights, seen, skipped in run_two(style):
        assert (seen, skipped) == (STEPS, 0)
        for got, want in zip(weights, alone.parameters(), strict=True):
            torch.testing.assert_close(got, want.detach(), rtol=1e-9, atol=1e-11)


def test_a_batch_that_one_rank_refuses_all_refuse():
    first, second = run_two("factored", bad_at=1)
    for a, b in zip(first[1], second[1], strict=True):
        assert torch.equal(a, b)
    assert first[2:] == second[2:] == (STEPS - 1, 1)
