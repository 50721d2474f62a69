"""Tables, JSON and a figure of the error against the clock."""

from __future__ import annotations

import bisect
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mfac_kernels.training._extra import require
from mfac_kernels.training.pinn.equations import EQUATIONS
from mfac_kernels.training.pinn.methods import METHODS
from mfac_kernels.training.pinn.runs import Run, write_runs

__all__ = ["format_errors", "write_pinn_report"]

PUBLISHED = {  # best L2 errors, their table: on a GPU, after 1,000 s in 2 and 3,000 s in 5 dimensions
    "poisson-2d": {"engd": 6.1e-8, "kfac*": 2.0e-7, "sgd": 2.7e-5, "adam": 9.4e-5, "lbfgs": 1.6e-4},
    "poisson-5d": {"engd": 5.6e-8, "kfac*": 2.6e-6, "sgd": 2.6e-3, "adam": 1.1e-3, "lbfgs": 8.9e-4},
}
_SOURCE = (
    "Published: the authors' own records (Dangel, Mueller, Zeinhofer, NeurIPS 2024), their best run, on a GPU, after "
    "1,000 s in 2 and 3,000 s in 5 dimensions, with networks and points of theirs; not measured here."
)
_SECOND_ORDER = ("engd", "spring", "kfac", "kfac*")


def format_errors(equation: str, runs: Sequence[Run]) -> str:
    """A row for each method, best first: error at the end, over seeds; as Markdown that also reads in a terminal."""
    header = ["method", "setting", "relative L2 error", "least to largest", "loss", "steps", "ms a step"]
    published = PUBLISHED.get(equation, {})
    rows = [header + ["published"] * bool(published)]
    for name, of_one in ordered(equation, runs):
        method, errors = METHODS[name], [run.error for run in of_one]
        steps = statistics.median(run.steps for run in of_one)
        row = [
            method.label,
            f"{method.setting} {of_one[0].value:g}" if method.setting else "",
            _number(mean_error(of_one)),
            f"{_number(min(errors))} to {_number(max(errors))}",
            _number(_geometric([run.losses[-1] for run in of_one])),
            f"{steps:.0f}",
            f"{1000 * statistics.median(run.seconds[-1] / max(1, run.steps) for run in of_one):.1f}",
        ]
        rows.append(row + [f"{published[name]:.1e}" if name in published else ""] * bool(published))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in padded)


def ordered(equation: str, runs: Sequence[Run]) -> list[tuple[str, list[Run]]]:
    """The runs of each method that are no search, best error first."""
    final = [run for run in runs if run.equation == equation and not run.searching]
    of_methods = {name: [run for run in final if run.method == name] for name in METHODS}
    return sorted(((n, r) for n, r in of_methods.items() if r), key=lambda item: mean_error(item[1]))


def mean_error(runs: Sequence[Run]) -> float:
    """Geometric mean over seeds; infinite if a run diverged."""
    return _geometric([run.error for run in runs])


def order(equation: str, runs: Sequence[Run]) -> str:
    """The order on the clock, and whether second-order methods come first, as with the authors."""
    names = [name for name, _ in ordered(equation, runs)]
    words = ", ".join(METHODS[name].label for name in names)
    ahead = [name for name in names if name in _SECOND_ORDER]
    behind = [name for name in names if name not in _SECOND_ORDER]
    if not ahead or not behind:
        return f"Order: {words}."
    first = names[: len(ahead)] == ahead
    best = names[0] == "engd" or "engd" not in names
    verdict = "ENGD is first" if best else f"{METHODS[names[0]].label} is first, not ENGD"
    others = "all second-order methods are" if first else "not all second-order methods are"
    return f"Order: {words}. {verdict}; {others} ahead of all others."


def write_pinn_report(runs: Sequence[Run], conditions: Mapping[str, Any], out: Path) -> list[Path]:
    """Write ``pinn.json``, ``pinn.md`` and ``pinn.png`` into ``out`` (made if missing).

    Raises:
        MissingDependency: matplotlib is not installed.
        OSError: the folder cannot be written to.
    """
    paths = [out / f"pinn.{suffix}" for suffix in ("json", "md", "png")]
    write_runs(paths[0], runs, conditions)
    names = [name for name in EQUATIONS if any(run.equation == name and not run.searching for run in runs)]
    lines = ["# Physics-informed networks", "", *(f"- {key}: {value}" for key, value in conditions.items()), ""]
    lines += ["![relative L2 error against time](pinn.png)", ""]
    for name in names:
        equation = EQUATIONS[name]
        parameters = sum(p.numel() for p in equation.network(0).parameters())
        lines += [f"## {equation.title}", ""]
        lines += [
            f"{equation.points} points inside, {equation.boundary_points} on the boundary; {parameters:,} parameters, "
            f"two hidden layers of {equation.width} with tanh.",
            "",
            format_errors(name, runs),
            "",
            order(name, runs),
            "",
            *_search(name, runs),
        ]
    if any(name in PUBLISHED for name in names):
        lines += [_SOURCE, ""]
    paths[1].write_text("\n".join(lines), encoding="utf-8")
    plot_errors({name: ordered(name, runs) for name in names}, paths[2])
    return paths


def plot_errors(curves: Mapping[str, list[tuple[str, list[Run]]]], path: Path) -> None:
    """Relative L2 error against seconds, a panel for each equation: geometric means over seeds, as a PNG.

    Raises:
        MissingDependency: matplotlib is not installed.
    """
    figures = require("matplotlib.figure", "matplotlib", "to draw the curves")
    figure = figures.Figure(figsize=(1 + 4.2 * max(1, len(curves)), 4.2), dpi=120, layout="constrained")
    panels = figure.subplots(1, max(1, len(curves)), squeeze=False)[0]
    labels = list(METHODS)
    for axes, (equation, of_methods) in zip(panels, curves.items(), strict=False):
        for name, runs in of_methods:
            times = [t for t in runs[0].seconds if all(t <= run.seconds[-1] or run is runs[0] for run in runs)]
            means = [_geometric([_error_at(run, t) for run in runs]) for t in times]
            style = "-" if name in _SECOND_ORDER else "--"
            axes.plot(times, means, style, color=f"C{labels.index(name)}", linewidth=1.3, label=METHODS[name].label)
        axes.set(title=equation, xlabel="seconds", yscale="log")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("relative L2 error")
    panels[0].legend(frameon=False, fontsize=8)
    figure.savefig(path)


def _search(equation: str, runs: Sequence[Run]) -> list[str]:
    """What the search found."""
    found = [run for run in runs if run.equation == equation and run.searching]
    if not found:
        return []
    parts = []
    for name in dict.fromkeys(run.method for run in found):
        of_one = [f"{run.value:g}: {_number(run.error)}" for run in found if run.method == name]
        parts.append(f"{METHODS[name].label} ({METHODS[name].setting}) {', '.join(of_one)}")
    return [f"The search, errors after {found[0].budget:g} s: {'; '.join(parts)}.", ""]


def _error_at(run: Run, seconds: float) -> float:
    return run.errors[max(0, bisect.bisect_right(run.seconds, seconds) - 1)]


def _geometric(values: Sequence[float]) -> float:
    return math.exp(statistics.fmean(math.log(max(v, 1e-300)) for v in values))


def _number(value: float) -> str:
    return f"{value:.1e}" if math.isfinite(value) else "diverged"
