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

PUBLISHED = {
    "poisson-2d": "ENGD 6.1e-8, K-FAC 2.0e-7, Hessian-free 3.2e-7, SGD 2.7e-5, Adam 9.4e-5, L-BFGS 1.6e-4",
    "poisson-5d": "ENGD 5.6e-8, K-FAC 2.6e-6, Hessian-free 6.1e-6, L-BFGS 8.9e-4, Adam 1.1e-3, SGD 2.6e-3",
}
_NOTES = """\
K-FAC, ENGD and SPRING go along their directions by a line search over 1, 1/2, ... 2^-30; K-FAC* finds step and momentum
on the quadratic model of the exact Gauss-Newton matrix. Implicit SGD: theta minimises loss + |theta - last|^2 / (2 lr),
by 20 iterations of L-BFGS; a step of L-BFGS has 10. Points are one batch for all methods."""
_LATER = ("sgd", "adam", "lbfgs")  # behind ENGD and K-FAC in the authors' tables
_SECOND_ORDER = ("engd", "spring", "kfac", "kfac*")


def format_errors(equation: str, runs: Sequence[Run]) -> str:
    """A row for each method, best first: error at the end, over seeds; as Markdown that also reads in a terminal."""
    header = ["method", "setting", "relative L2 error", "least to largest", "loss", "steps", "ms a step"]
    rows = [header]
    for name, of_one in ordered(equation, runs):
        method, errors = METHODS[name], [run.error for run in of_one]
        steps = statistics.median(run.steps for run in of_one)
        rows.append(
            [
                method.label,
                f"{method.setting} {of_one[0].value:g}" if method.setting else "",
                _number(mean_error(of_one)),
                f"{_number(min(errors))} to {_number(max(errors))}",
                _number(_geometric([run.losses[-1] for run in of_one])),
                f"{steps:.0f}",
                f"{1000 * statistics.median(run.seconds[-1] / max(1, run.steps) for run in of_one):.1f}",
            ]
        )
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
    """The order on the clock, and whether it is the authors': ENGD, K-FAC by its better rule, and the others."""
    names = [name for name, _ in ordered(equation, runs)]
    words = f"Order: {', '.join(METHODS[name].label for name in names)}."
    kfac = next((name for name in names if name.startswith("kfac")), None)
    if kfac is None:
        return words
    claims = [("engd", kfac), *((kfac, name) for name in _LATER)]
    known = [(a, b) for a, b in claims if a in names and b in names]
    broken = [f"{METHODS[b].label} is before {METHODS[a].label}" for a, b in known if names.index(a) > names.index(b)]
    verdict = f"seen in part: {'; '.join(broken)}" if broken else "seen"
    return f"{words} The authors' order is {verdict}."


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
    lines += [_NOTES, ""]
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
            *_published(name),
            *_search(name, runs),
        ]
    paths[1].write_text("\n".join(lines), encoding="utf-8")
    plot_errors({name: ordered(name, runs) for name in names}, paths[2])
    return paths


def plot_errors(curves: Mapping[str, list[tuple[str, list[Run]]]], path: Path) -> None:
    """Relative L2 error against seconds, a panel for each equation: geometric means over seeds, as a PNG.

    Raises:
        MissingDependency: matplotlib is not installed.
    """
    figures = require("matplotlib.figure", "matplotlib", "to draw the curves")
    figure = figures.Figure(figsize=(2 + 4.2 * max(1, len(curves)), 4.2), dpi=120, layout="constrained")
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
    figure.legend(*_distinct(panels), loc="outside right center", frameon=False, fontsize=8)
    figure.savefig(path)


def _distinct(panels: Any) -> tuple[list[Any], list[str]]:
    """Lines and labels of all panels, in the order of the methods, each once."""
    lines = {label: line for axes in panels for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    labels = [method.label for method in METHODS.values() if method.label in lines]
    return [lines[label] for label in labels], labels


def _published(equation: str) -> list[str]:
    if equation not in PUBLISHED:
        return []
    whose = (
        "Published, the authors' own records (Dangel, Mueller, Zeinhofer, NeurIPS 2024), not measured here: L2 errors"
    )
    return [
        f"{whose} of their best runs, on a GPU, after 1,000 s in 2 and 3,000 s in 5 dimensions: {PUBLISHED[equation]}.",
        "",
    ]


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
