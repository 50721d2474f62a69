"""KFAC, of one level and of two, under DistributedDataParallel: two processes (gloo) take the step of one."""

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


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks found in each case of kfac_rank.py."""
    folder = tmp_path_factory.mktemp("ranks")
    outs = [folder / f"rank{rank}.pt" for rank in range(2)]
    ranks = [
        subprocess.Popen([sys.executable, RANK, str(rank), "2", folder / "rendezvous", out])
        for rank, out in enumerate(outs)
    ]
    try:
        assert [rank.wait(300) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    return [torch.load(out) for out in outs]


@pytest.mark.parametrize("style", [*kfac_rank.STYLES, kfac_rank.DIAGONAL, kfac_rank.MODULES, *kfac_rank.TWO_LEVEL])
def test_two_processes_equal_one_on_the_joint_batch(style, found):
    alone = kfac_rank.build(style)
    p = kfac_rank.train(alone, style, 0, 1)
    for rank in found:
        got = rank[style]
        assert (got["seen"], got["skipped"], got.get("coarse_fallbacks", 0)) == (kfac_rank.STEPS, 0, 0)
        if style in kfac_rank.TWO_LEVEL:
            assert got["coarse_gain"] == pytest.approx(p.diagnostics()["coarse_gain"], rel=1e-7)
        for weight, want in zip(got["weights"], alone.parameters(), strict=True):
            torch.testing.assert_close(weight, want.detach(), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("style", ["factored", "residual,corrected"])
def test_a_batch_that_one_rank_refuses_all_refuse(style, found):
    first, second = (rank[f"{style}, refused"] for rank in found)
    for a, b in zip(first["weights"], second["weights"], strict=True):
        assert torch.equal(a, b)
    assert all((rank["seen"], rank["skipped"]) == (kfac_rank.STEPS - 1, 1) for rank in (first, second))
    assert first.get("coarse_fallbacks") == second.get("coarse_fallbacks") == (None if style == "factored" else 1)


@pytest.mark.parametrize("style", kfac_rank.STYLES)
def test_a_layer_that_one_rank_does_not_call(style, found):
    """Its sums are those of the ranks that call it, on all of them."""
    first, second = (rank[f"{style}, rests"] for rank in found)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    inputs, resting = first[0], first[2]
    assert torch.equal(resting, torch.ones_like(resting))  # of rank 0: inputs of 1 and the bias
    assert float(inputs[0, 0, 0]) == (1 + 4) / 2
