"""`make bench-compare` tells what moved from what is noise."""

from __future__ import annotations

import json

import compare
import pytest


def row(kernel="k", ms=1.0, low=None, high=None, **more):
    quartiles = {"quartiles": [low, high]} if low is not None else {}
    return {"kernel": kernel, "case": "c", "ms": ms, "ratios": {"torch": 2.0 / ms}, **quartiles, **more}


@pytest.mark.parametrize(
    "old, new, change",
    [
        (row(ms=1.0, low=0.99, high=1.01), row(ms=0.8, low=0.79, high=0.81), 0.25),
        (row(ms=1.0, low=0.99, high=1.01), row(ms=1.25, low=1.24, high=1.26), -0.2),
        (row(ms=1.0, low=0.7, high=1.3), row(ms=0.8, low=0.6, high=1.1), None),  # the ranges meet
        (row(ms=1.0, low=0.999, high=1.001), row(ms=0.97, low=0.969, high=0.971), None),  # apart, but by little
        (row(ms=1.0), row(ms=0.85), None),  # no quartiles: 10% to either side
        (row(ms=1.0), row(ms=0.7), 1 / 0.7 - 1),
        (row(**{"share of the bound": 0.5}), row(**{"share of the bound": 0.8}), 0.6),  # before the ratio
        ({**row(ms=1.0), "ratios": {}}, {**row(ms=0.5), "ratios": {}}, 1.0),  # nothing else in common
    ],
)
def test_moved(old, new, change):
    assert compare.moved(old, new) == (None if change is None else pytest.approx(change))


def test_report(tmp_path, capsys):
    machine = {"cpu": "a", "threads": 1}
    old = {"machine": machine, "rows": [row("same"), row("faster"), row("slower"), row("gone")]}
    new = {"machine": machine | {"cpu": "b"}, "rows": [row("same"), row("faster", 0.5), row("slower", 2.0), row("new")]}
    for name, results in (("old", old), ("new", new)):
        (tmp_path / name).write_text(json.dumps(results))
    compare.main([str(tmp_path / "old"), str(tmp_path / "new")])
    assert capsys.readouterr().out.splitlines() == [
        "cpu: a, then b: what is compared may be the machines",
        "-50%  slower, c: ratio to torch 2, then 1",
        "+100%  faster, c: ratio to torch 2, then 4",
        "2 of 3 rows moved; 1 are gone, 1 are new",
    ]
