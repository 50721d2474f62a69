"""A long training of K-FAC and M-FAC on a tiny network, disturbed at random: `python tools/soak.py --steps 20000`.

Checkpoints are taken and resumed from by fresh objects, batches that are not finite arrive, and layers get no gradient.
An undisturbed run, which skips the batches that are not finite, must end with the same bits, and memory must not grow.
Exits with 1, and says what differs, if not.
"""

from __future__ import annotations

import argparse
import copy
import gc
import random
import resource
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import mfac_kernels as mk
from mfac_kernels.preconditioners.base import Preconditioner

KINDS = ("KFAC", "MFAC")


class Training:
    """A network, its preconditioner and its optimizer."""

    def __init__(self, kind: str) -> None:
        torch.manual_seed(0)
        self.kind = kind
        self.net = nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3)
        )
        self.preconditioner: Preconditioner
        if kind == "KFAC":
            self.preconditioner = mk.KFAC(self.net, damping=0.03, kl_clip=None, inv_update_steps=3)
        else:
            self.preconditioner = mk.MFAC(self.net.parameters(), ngrads=16, damping=0.01, momentum=0.5)
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.003, momentum=0.5 if kind == "KFAC" else 0.0)

    def step(self, x: Tensor, y: Tensor, skipped: int | None) -> None:
        """One step, as under a GradScaler: where a gradient is not finite the optimizer does not step."""
        self.optimizer.zero_grad()
        hidden = x
        for i, layer in enumerate(self.net):
            frozen = i == skipped
            for p in layer.parameters():
                p.requires_grad_(not frozen)
            hidden = layer(hidden)
        nn.functional.cross_entropy(hidden, y).backward()
        for p in self.net.parameters():
            p.requires_grad_(True)
        self.preconditioner.step()
        if all(p.grad is None or bool(p.grad.isfinite().all()) for p in self.net.parameters()):
            self.optimizer.step()

    def skip(self) -> None:
        """As a refused batch does: nothing is added, and inverses that are due are made of the factors as they are."""
        p = self.preconditioner
        if isinstance(p, mk.KFAC) and p.steps % p.inv_update_steps == 0:
            p.fisher.refresh()
        p.steps += 1

    def resumed(self) -> Training:
        """A fresh one with the states of this one."""
        other = Training(self.kind)
        for name in ("net", "preconditioner", "optimizer"):
            getattr(other, name).load_state_dict(copy.deepcopy(getattr(self, name).state_dict()))
        return other


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 1, 5, 5, generator=generator)
    return x, (x.flatten(1)[:, :3] + 0.5 * torch.randn(8, 3, generator=generator)).argmax(1)


def compare(calm: Training, disturbed: Training) -> list[str]:
    """What has not the same bits."""
    parameters = zip(calm.net.named_parameters(), disturbed.net.named_parameters(), strict=True)
    return [name for (name, p), (_, q) in parameters if not torch.equal(p, q)]


def memory() -> int:
    """Bytes that this process holds now."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def soak(kind: str, steps: int, seed: int, say: bool = True) -> list[str]:
    """Faults, by their names; none is what is hoped for."""
    chance = random.Random(seed)
    calm, disturbed = Training(kind), Training(kind)
    faults: list[str] = []
    counts = {"resumed": 0, "not finite": 0, "layer skipped": 0}
    half = 0
    for step in range(steps):
        if step == steps // 2:
            half = memory()
        x, y = batch(step)
        skipped = chance.choice((0, 3, 6)) if chance.random() < 0.05 else None
        counts["layer skipped"] += skipped is not None
        if chance.random() < 0.03:
            counts["not finite"] += 1
            bad = x.clone()
            bad[chance.randrange(len(x))] = chance.choice((float("nan"), float("inf")))
            disturbed.step(bad, y, skipped)
            calm.skip()
        else:
            calm.step(x, y, skipped)
            disturbed.step(x, y, skipped)
        if chance.random() < 0.02:
            counts["resumed"] += 1
            disturbed = disturbed.resumed()
        if step % 500 == 499 and (different := compare(calm, disturbed)):
            faults.append(f"{kind}, step {step}: other bits in {', '.join(different)}")
            break
    grown = memory() - half
    if steps >= 2000 and grown > 32 << 20:
        faults.append(f"{kind}: memory has grown by {grown >> 20} MiB in the second half")
    if not faults and (different := compare(calm, disturbed)):
        faults.append(f"{kind}: at the end, other bits in {', '.join(different)}")
    if not all(bool(p.isfinite().all()) for p in disturbed.net.parameters()):
        faults.append(f"{kind}: weights that are not finite")
    if say:
        x, y = (torch.cat(parts) for parts in zip(*(batch(-1 - i) for i in range(64)), strict=True))
        loss = float(nn.functional.cross_entropy(disturbed.net(x), y).detach())
        print(f"{kind}: {steps} steps, {counts}, loss of other data {loss:.3f}, memory {grown / 2**20:+.1f} MiB")
    return faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    faults = [fault for kind in KINDS for fault in soak(kind, args.steps, args.seed)]
    print("\n".join(faults) or "no fault")
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
