"""Text that every Python has: the bytes of its standard library's sources."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import torch
from torch import Tensor


def sources() -> tuple[Tensor, Tensor]:
    """The bytes to train on, and every 20th file, held out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [p for p in sorted(root.rglob("*.py")) if not {"site-packages", "dist-packages", "test"} & {*p.parts}]
    parts = [b"".join(p.read_bytes() for i, p in enumerate(files) if (i % 20 == 0) == held) for held in (False, True)]
    train, held_out = (torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in parts)
    return train, held_out


def windows(data: Tensor, count: int, length: int, generator: torch.Generator) -> Tensor:
    """(count, length) bytes from random places."""
    starts = torch.randint(len(data) - length + 1, (count, 1), generator=generator)
    return data[starts + torch.arange(length)].long()
