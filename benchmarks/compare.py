"""What moved between two recorded runs of the benchmarks: `make bench-compare OLD=results.json NEW=results.json`.

A row is compared by what holds across runs of one machine: its share of the bound, or else its ratio to the first of
its peers. It moved if the two ranges, from the lower to the upper quartile of its rounds, do not meet and the medians
are more than 5% apart; a row that has no quartiles is given 10% to either side, what ratios were seen to vary by.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

NOISE, LEAST = 0.10, 0.05
SHARES = ("share of the bound", "share of copy bandwidth", "share of read bandwidth")
Row = Mapping[str, Any]


def measure(row: Row, other: Row) -> tuple[str, float, float] | None:
    """What both rows have, more is better: its name, and the two values."""
    for name in SHARES:
        if name in row and name in other:
            return name, row[name], other[name]
    for peer in row["ratios"]:
        if peer in other["ratios"]:
            return f"ratio to {peer}", row["ratios"][peer], other["ratios"][peer]
    return ("ms, inverted", 1 / row["ms"], 1 / other["ms"]) if row["ms"] and other["ms"] else None


def spread(row: Row) -> tuple[float, float]:
    """The lower and the upper quartile of ours, over the median."""
    low, high = row.get("quartiles", (row["ms"] * (1 - NOISE), row["ms"] * (1 + NOISE)))
    return low / row["ms"], high / row["ms"]


def moved(old: Row, new: Row) -> float | None:
    """By how much better (or, negative, worse) the new one is, if that is more than noise."""
    found = measure(old, new)
    if found is None:
        return None
    _, before, after = found
    change = after / before - 1
    # A time that is longer by a factor is a share that is smaller by it.
    (old_low, old_high), (new_low, new_high) = spread(old), spread(new)
    apart = after / new_high > before / old_low if change > 0 else after / new_low < before / old_high
    return change if apart and abs(change) > LEAST else None


def comparison(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The report's lines."""
    lines = []
    for key in ("cpu", "gpu", "instruction_set", "threads", "torch"):
        before, after = old["machine"].get(key), new["machine"].get(key)
        if before != after:
            lines.append(f"{key}: {before}, then {after}: what is compared may be the machines")
    rows = {(row["kernel"], row["case"]): row for row in old["rows"]}
    new_rows = {(row["kernel"], row["case"]): row for row in new["rows"]}
    both = [key for key in new_rows if key in rows]
    changes = {key: change for key in both if (change := moved(rows[key], new_rows[key])) is not None}
    for key in sorted(changes, key=lambda key: changes[key]):
        found = measure(rows[key], new_rows[key])
        assert found is not None
        name, before, after = found
        lines.append(f"{changes[key]:+.0%}  {key[0]}, {key[1]}: {name} {before:.3g}, then {after:.3g}")
    gone, fresh = len(rows) - len(both), len(new_rows) - len(both)
    lines.append(f"{len(changes)} of {len(both)} rows moved; {gone} are gone, {fresh} are new")
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    options = parser.parse_args(arguments)
    print("\n".join(comparison(json.loads(options.old.read_text()), json.loads(options.new.read_text()))))


if __name__ == "__main__":
    main()
