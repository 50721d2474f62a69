"""When, from what and with what a report was made."""

from __future__ import annotations

import subprocess
from datetime import date

import torch


def commit(tree: str = ".") -> str:
    described = subprocess.run(
        ["git", "-C", tree, "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return described.stdout.strip() or "unknown"


def made() -> dict[str, str]:
    return {
        "date": date.today().isoformat(),
        "commit": commit(),
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads",
    }
