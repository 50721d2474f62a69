"""K-FAC and process groups: real processes (gloo), in the default group, in another, alone, and with other layers."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import mfac_kernels as mk

RANK = Path(__file__).with_name("group_rank.py")
COUNT = 3


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank found in each case of group_rank.py."""
    folder = tmp_path_factory.mktemp("ranks")
    outs = [folder / f"rank{rank}.pt" for rank in range(COUNT)]
    ranks = [
        subprocess.Popen([sys.executable, RANK, str(rank), str(COUNT), folder / "rendezvous", out])
        for rank, out in enumerate(outs)
    ]
    try:
        assert [rank.wait(300) for rank in ranks] == [0] * COUNT
    finally:
        for rank in ranks:
            rank.kill()
    return [torch.load(out) for out in outs]


def first_input(factors: list[torch.Tensor]) -> float:
    """The mean square of what the first layer was given, which is 1 + rank."""
    return float(factors[0][0, 0, 0])


@pytest.mark.parametrize("case", ["default", "another"])
def test_the_default_group(found, case):
    for rank in found:
        assert first_input(rank[case]) == pytest.approx((1 + 4 + 9) / 3)


def test_no_group(found):
    assert [first_input(rank["alone"]) for rank in found[1:]] == pytest.approx([4, 9])


def test_a_group(found):
    assert [first_input(rank["group"]) for rank in found] == pytest.approx([(1 + 9) / 2, 4, (1 + 9) / 2])


def test_a_rank_that_is_not_in_the_group(found):
    assert first_input(found[0]["not_in_group"]) == pytest.approx(1)
    for rank in found[1:]:
        assert 'process_group: expected "default", None or a group that this rank is in' in rank["not_in_group"]


OTHERS = [("other_width", "0"), ("fewer_layers", "2"), ("other_options", "0"), ("other_kind", "0")]


@pytest.mark.parametrize(("case", "name"), OTHERS)
def test_ranks_with_other_layers_say_which(found, case, name):
    for rank in found:
        assert f"KFAC: expected the same layers on all ranks of the process group; of {name}, rank " in rank[case]


def test_ranks_with_layers_in_another_order_say_which(found):
    for rank in found:
        assert re.search("of (first|second), rank . has .* and rank . .*, in another order$", rank["other_order"])


def test_one_rank_without_the_others(found):
    error = found[0]["one_rank_only"]
    assert f"expected one on each of the {COUNT} ranks of the process group; rank 1 has made none in 2 s" in error
    assert "process_group=None" in error


def test_a_rank_that_is_paused(found):
    for rank in found:
        assert int(rank["paused"][0]) == 1
        assert first_input(rank["paused"][1:]) == pytest.approx(1)


def test_no_sums_on_any_rank(found):
    assert [rank["nothing"] for rank in found] == [0] * COUNT


@pytest.mark.parametrize("group", ["all", 3, object()])
def test_what_is_no_group(group):
    with pytest.raises(ValueError, match='process_group: expected "default", None or a group'):
        mk.KFAC(torch.nn.Linear(2, 2), process_group=group)
