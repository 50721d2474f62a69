"""Plot of a recorded run: each row's ratios to its peers, and its share of the machine's ceiling.

python benchmarks/plots.py RESULTS.json [...]      writes the plot beside each, as .png
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compare import SHARES


def plot(rows: Sequence[dict[str, Any]], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (ratios, shares) = pyplot.subplots(
        1, 2, sharey=True, figsize=(11, 1.2 + 0.24 * len(rows)), width_ratios=(3, 2), layout="constrained"
    )
    peers = list(dict.fromkeys(name for row in rows for name in row["ratios"]))
    for i, peer in enumerate(peers):
        at = [(y, row["ratios"][peer]) for y, row in enumerate(rows) if row["ratios"].get(peer)]
        ratios.scatter([ratio for _, ratio in at], [y for y, _ in at], s=18, color=f"C{i % 10}", label=peer, zorder=2)
    ratios.axvline(1, color="0.4", linewidth=0.8)
    ratios.set_xscale("log")
    ratios.set_xlabel("times faster than")
    if peers:
        ratios.legend(fontsize=7)
    known = [(y, next((row[name] for name in SHARES if name in row), None)) for y, row in enumerate(rows)]
    found = [(y, share) for y, share in known if share is not None]
    shares.barh([y for y, _ in found], [100 * share for _, share in found], height=0.6, color="0.6")
    shares.axvline(100, color="0.4", linewidth=0.8)
    shares.set_xlabel("per cent of the ceiling")
    ratios.set_yticks(range(len(rows)), [f"{row['kernel']}, {row['case']}" for row in rows], fontsize=7)
    ratios.invert_yaxis()
    for axes in (ratios, shares):
        axes.grid(axis="x", linewidth=0.4)
    figure.savefig(out, dpi=110)
    pyplot.close(figure)


def main() -> None:
    for name in sys.argv[1:]:
        path = Path(name)
        plot(json.loads(path.read_text())["rows"], path.with_suffix(".png"))


if __name__ == "__main__":
    main()
