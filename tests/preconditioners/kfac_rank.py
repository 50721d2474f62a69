"""One rank of test_kfac_distributed.py: python kfac_rank.py RANK RANKS RENDEZVOUS OUT.

OUT gets what each case found, by name.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import mfac_kernels as mk

STEPS = 4
STYLES = ["factored", "exact"]
DIAGONAL = "diagonals"  # of some layers' factors
MODULES = "modules"  # of other kinds
TWO_LEVEL = [  # a coarse space and a combination
    "nicolaides,additive",
    "residual,corrected",
    "spectral,deflated",
    "krylov_nicolaides,corrected",
    "krylov_residual,balanced",
    "tselepidis,corrected",
]


class Modules(nn.Module):
    """An embedding and a head of one weight, attention, a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7)
        self.head.weight = self.embed.weight
        self.attention, self.up = nn.MultiheadAttention(4, 2, batch_first=True), nn.ConvTranspose1d(4, 4, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed((4 * x.flatten(1)[:, :6].abs()).long().clamp(max=6))
        y = self.attention(y, y, y, need_weights=False)[0]
        return self.head(self.up(y.mT).mT).mean(1)


def build(style: str = "factored") -> nn.Module:
    torch.manual_seed(0)
    if style == MODULES:
        return Modules().double()
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(36, 3)
    ).double()


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 2, 5, 5, generator=generator).double(), torch.randint(0, 3, (8,), generator=generator)


def train(model: nn.Module, style: str, rank: int, ranks: int, bad_at: int = -1) -> mk.KFAC:
    """``bad_at``: the step at which rank 0 has a batch that is not finite."""
    kind, options = mk.KFAC, {"damping_style": style} if style in STYLES else {}
    if style == DIAGONAL:
        options = {"output": {"*5": "diagonal"}, "input": {"*2": "diagonal"}}  # "module.5" with DDP
    if style in TWO_LEVEL:
        kind, options = mk.TwoLevelKFAC, dict(zip(("coarse_space", "combination"), style.split(","), strict=True))
    p = kind(model, 0.03, inv_update_steps=2, kl_clip=1e-2, **options)
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


def factors_of_half_a_model(rank: int, style: str) -> list[Tensor]:
    """After two batches, of which ranks other than 0 put the second through the first layer alone."""
    first, last = nn.Linear(3, 3).double(), nn.Linear(3, 2).double()
    p = mk.KFAC(
        nn.ModuleList([first, last]),
        damping_style=style,
        eigen_correction=style == "exact",
        factor_decay=0.0,
        inv_update_steps=9,
    )
    for step in range(2):
        x = torch.full((4, 3), 100.0 if step == 0 else 1.0 + rank, dtype=torch.float64)
        (first(x).sum() + (last(x).sum() if step == 0 or rank == 0 else 0)).backward()
        p.step()
    return [f for i in range(2) for f in p.fisher.factors(i)] + getattr(p.fisher._inverses, "moments", [])


def joint(rank: int, ranks: int, style: str, bad_at: int = -1) -> dict[str, Any]:
    model = nn.parallel.DistributedDataParallel(build(style))
    p = train(model, style, rank, ranks, bad_at)
    return {"weights": [q.detach() for q in model.parameters()], **p.diagnostics()}


def main(rank: int, ranks: int, rendezvous: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=ranks)
    found = {
        **{style: joint(rank, ranks, style) for style in (*STYLES, DIAGONAL, MODULES, *TWO_LEVEL)},
        **{f"{style}, refused": joint(rank, ranks, style, bad_at=1) for style in ("factored", "residual,corrected")},
        **{f"{style}, rests": factors_of_half_a_model(rank, style) for style in STYLES},
    }
    torch.save(found, out)
    dist.barrier()
    os._exit(0)  # the destructors of torch's process groups and reducers now and then wait for each other


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
