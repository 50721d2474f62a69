"""Every Python block of README.md and docs/ runs as it stands, with what the text around it takes for granted."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mfac_kernels as mk
from mfac_kernels.preconditioners.layers import kinds

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(document: Path) -> list[tuple[str, str, str]]:
    """The document's name, the heading above each block, and its lines."""
    heading, found = "", []
    for part in re.split(r"^(#+ .*|```python\n[\s\S]*?^```)$", document.read_text(encoding="utf-8"), flags=re.M):
        if part.startswith("#"):
            heading = part.lstrip("# ")
        elif part.startswith("```python"):
            found.append((document.name, heading, part.removeprefix("```python\n").removesuffix("```")))
    return found


BLOCKS = [block for document in DOCUMENTS for block in blocks(document)]


class Scaled(nn.Linear):
    """What the block on layers of one's own speaks of."""

    scale = 2.0


def batches(*shape: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.randn(4, *shape), torch.randint(10, (4,))) for _ in range(2)]


def taken_for_granted(heading: str) -> dict[str, Any]:
    if heading == "Training with M-FAC":
        return {"batches": batches(64)}
    if heading == "Training with K-FAC":
        return {"batches": batches(3, 32, 32)}
    if heading == "Modules":
        return {"Scaled": Scaled, "mk": mk}
    if heading == "Corrections across layers":
        images, labels = batches(64)[0]
        model = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
        return {"model": model, "images": images, "labels": labels, "torch": torch, "mk": mk}
    return {}


def test_no_block_is_overlooked() -> None:
    count = sum(document.read_text(encoding="utf-8").count("```python") for document in DOCUMENTS)
    assert len(BLOCKS) == count >= 12


@pytest.mark.parametrize(
    "document, heading, block", BLOCKS, ids=[f"{i} {name} {heading}" for i, (name, heading, _) in enumerate(BLOCKS)]
)
def test_it_runs(document, heading, block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some save files
    monkeypatch.setattr(kinds, "_KINDS", dict(kinds._KINDS))  # what a block registers goes with it
    torch.manual_seed(0)
    exec(compile(block, f"{document}, {heading}", "exec"), taken_for_granted(heading))
