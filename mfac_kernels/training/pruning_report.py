"""Tables, JSON and a figure of accuracy against sparsity."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mfac_kernels.training._extra import require
from mfac_kernels.training.pruning import Point

__all__ = ["Curves", "format_accuracies", "plot_accuracies", "write_pruning_report"]

Curves = Mapping[str, Sequence[Point]]  # label -> points of any number of seeds and sparsities


def format_accuracies(curves: Curves, *, before_tuning: bool = False) -> str:
    """Sparsities down, curves across: mean accuracy in per cent, with the deviation over seeds if there are several."""
    targets = sorted({point.target for points in curves.values() for point in points})
    header = ["sparsity", *curves]
    lines = [header, ["---"] * len(header)]
    for target in targets:
        cells = [f"{target:.0%}"]
        for points in curves.values():
            values = [100 * (p.pruned if before_tuning else p.accuracy) for p in points if p.target == target]
            cells.append(_spread(values) if values else "")
        lines.append(cells)
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    lines[1] = ["-" * width for width in widths]
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def write_pruning_report(
    tables: Mapping[str, Curves], dense: float, conditions: Mapping[str, Any], out: Path
) -> list[Path]:
    """Write ``pruning.json``, ``pruning.md`` and ``pruning.png`` into ``out`` (made if missing).

    Args:
        tables: title -> curves.
        dense: accuracy of the network before pruning.

    Raises:
        MissingDependency: matplotlib is not installed.
        OSError: the folder cannot be written to.
    """
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f"pruning.{suffix}" for suffix in ("json", "md", "png")]
    content = {
        "conditions": dict(conditions),
        "dense_accuracy": dense,
        "tables": {
            title: {label: [asdict(point) for point in points] for label, points in curves.items()}
            for title, curves in tables.items()
        },
    }
    paths[0].write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    lines = ["# Accuracy against sparsity", ""]
    lines += [f"Test accuracy in per cent; the dense network has {100 * dense:.1f}.", ""]
    for title, curves in tables.items():
        lines += [f"## {title}", "", format_accuracies(curves), ""]
        if any(point.pruned != point.accuracy for points in curves.values() for point in points):
            lines += ["The same networks before fine-tuning:", "", format_accuracies(curves, before_tuning=True), ""]
    lines += ["![accuracy against sparsity](pruning.png)", "", *(f"- {k}: {v}" for k, v in conditions.items()), ""]
    paths[1].write_text("\n".join(lines), encoding="utf-8")
    plot_accuracies(tables, dense, paths[2])
    return paths


def plot_accuracies(tables: Mapping[str, Curves], dense: float, path: Path) -> None:
    """Mean accuracy against sparsity, a panel a table and a line a curve, as a PNG.

    Raises:
        MissingDependency: matplotlib is not installed.
    """
    figures = require("matplotlib.figure", "matplotlib", "to draw the curves")
    formatter = require("matplotlib.ticker", "matplotlib", "to draw the curves").PercentFormatter
    figure = figures.Figure(figsize=(2 + 4.5 * len(tables), 4.4), dpi=120, layout="constrained")
    panels = figure.subplots(1, len(tables), sharey=True, squeeze=False)[0]
    labels = list(dict.fromkeys(label for curves in tables.values() for label in curves))
    for axes, (title, curves) in zip(panels, tables.items(), strict=True):
        axes.axhline(dense, color="black", linewidth=0.8, linestyle=":", label="dense")
        for label, points in curves.items():
            targets = sorted({point.target for point in points})
            means = [statistics.mean(p.accuracy for p in points if p.target == target) for target in targets]
            axes.plot(targets, means, color=f"C{labels.index(label)}", marker="o", markersize=4, label=label)
        axes.set(title=title, xlabel="sparsity")
        axes.xaxis.set_major_formatter(formatter(xmax=1))
        axes.yaxis.set_major_formatter(formatter(xmax=1))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8, loc="lower left")
    panels[0].set_ylabel("test accuracy")
    figure.savefig(path)


def _spread(values: Sequence[float]) -> str:
    mean = f"{statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} \u00b1 {statistics.stdev(values):.1f}"
