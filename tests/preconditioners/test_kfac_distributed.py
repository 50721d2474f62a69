"""KFAC under DistributedDataParallel: two real processes (gloo) take the step that one takes on the joint batch."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

RANK = Path(__file__).with_name("kfac_rank.py")
_spec = importlib.util.spec_from_file_location("kfac_rank", RANK)
assert _spec is not None and _spec.loader is not None
kfac_rank = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(kfac_rank)


def run_two(folder: Path, style: str, bad_at: int | str = -1) -> list[Any]:
    outs = [folder / f"rank{rank}.pt" for rank in range(2)]
    ranks = [
        subprocess.Popen([sys.executable, RANK, str(rank), "2", folder / "rendezvous", style, str(bad_at), out])
        for rank, out in enumerate(outs)
    ]
    try:
        assert [rank.wait(120) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    return [torch.load(out) for out in outs]


@pytest.mark.parametrize("style", ["factored", "exact"])
def test_two_processes_equal_one_on_the_joint_batch(style, tmp_path):
    alone = kfac_rank.build()
    kfac_rank.train(alone, style, 0, 1)
    for rank in run_two(tmp_path, style):
        assert (rank["seen"], rank["skipped"]) == (kfac_rank.STEPS, 0)
        for got, want in zip(rank["weights"], alone.parameters(), strict=True):
            torch.testing.assert_close(got, want.detach(), rtol=1e-9, atol=1e-11)


def test_a_batch_that_one_rank_refuses_all_refuse(tmp_path):
    first, second = run_two(tmp_path, "factored", bad_at=1)
    for a, b in zip(first["weights"], second["weights"], strict=True):
        assert torch.equal(a, b)
    assert all((rank["seen"], rank["skipped"]) == (kfac_rank.STEPS - 1, 1) for rank in (first, second))


@pytest.mark.parametrize("style", ["factored", "exact"])
def test_a_layer_that_one_rank_does_not_call(style, tmp_path):
    """Its sums are those of the ranks that call it, on all of them."""
    first, second = run_two(tmp_path, style, "rests")
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    inputs, resting = first[0], first[2]
    assert torch.equal(resting, torch.ones_like(resting))  # of rank 0: inputs of 1 and the bias
    assert float(inputs[0, 0, 0]) == (1 + 4) / 2
