"""Tables, JSON, Markdown and curves of a comparison."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mfac_kernels.training._extra import require
from mfac_kernels.training.optimizers import CHOSEN, GRID, GRID_STEPS, OptimizerConfig
from mfac_kernels.training.results import TAIL, Comparison, RunResult

__all__ = ["format_settings", "format_table", "plot_curves", "write_grid", "write_report"]

_COLOURS = {"sgd": "#4477aa", "mfac": "#cc3311", "kfac": "#228833", "kfac-two-level": "#aa3377"}
_MARKERS = {"sgd": "o", "mfac": "s", "kfac": "^", "kfac-two-level": "v"}


def format_table(comparison: Comparison, *, settings: bool = False) -> str:
    """One row per run, as a Markdown table that also reads well in a terminal.

    Args:
        settings: give the settings in a column, to tell runs of one optimizer apart.
    """
    columns: dict[str, list[str]] = {
        "optimizer": [run.config.label for run in comparison.results],
        "settings": [run.config.settings for run in comparison.results],
        "loss": [
            f"{run.final_loss:.3f}" if math.isfinite(run.final_loss) else "diverged" for run in comparison.results
        ],
        "accuracy": [f"{run.accuracy:.1%}" for run in comparison.results],
        "ms/step": [f"{1e3 * run.median_step_seconds:.1f}" for run in comparison.results],
        "preconditioner ms": [
            f"{1e3 * run.median_preconditioner_seconds:.1f}" if _has_preconditioner(run) else "-"
            for run in comparison.results
        ],
        "share": [f"{run.preconditioner_share:.1%}" if _has_preconditioner(run) else "-" for run in comparison.results],
    }
    if not settings:
        del columns["settings"]
    widths = {name: max(map(len, [name, *cells])) for name, cells in columns.items()}
    lines = [
        [name.ljust(width) for name, width in widths.items()],
        ["-" * width for width in widths.values()],
        *(
            [cell.ljust(width) for cell, width in zip(row, widths.values(), strict=True)]
            for row in zip(*columns.values(), strict=True)
        ),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def format_settings(comparison: Comparison) -> str:
    """A list with the settings of every run, in Markdown."""
    return "\n".join(f"- {run.config.label}: {run.config.settings}" for run in comparison.results)


def write_report(comparison: Comparison, out: Path) -> list[Path]:
    """Write ``results.json``, ``report.md`` and ``curves.png`` into ``out`` (made if missing).

    Raises:
        MissingDependency: matplotlib is not installed.
        OSError: the folder cannot be written to.
    """
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / "results.json", out / "report.md", out / "curves.png"]
    _write_json(paths[0], _as_json(comparison, curves=True))
    paths[1].write_text(_report_text(comparison), encoding="utf-8")
    plot_curves(comparison, paths[2])
    return paths


def write_grid(comparison: Comparison, out: Path) -> list[Path]:
    """Write the runs of a grid as ``grid.json`` and ``grid.md``, each optimizer's best one named.

    Raises:
        OSError: the folder cannot be written to.
    """
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / "grid.json", out / "grid.md"]
    best = best_of(comparison)
    content = _as_json(comparison, curves=False)
    content["best"] = {name: _config(config) for name, config in best.items()}
    _write_json(paths[0], content)
    lines = [
        f"# Grid: {comparison.model} on {comparison.dataset}",
        "",
        format_table(comparison, settings=True),
        "",
        *(f"Best {config.label}: {config.settings}." for config in best.values()),
        "",
        _conditions(comparison),
        "",
    ]
    paths[1].write_text("\n".join(lines), encoding="utf-8")
    return paths


def best_of(comparison: Comparison) -> dict[str, OptimizerConfig]:
    """Per optimizer, the settings with the lowest final loss; left out where every run diverged."""
    best: dict[str, RunResult] = {}
    for run in comparison.results:
        name = run.config.name
        if math.isfinite(run.final_loss) and (name not in best or run.final_loss < best[name].final_loss):
            best[name] = run
    return {name: run.config for name, run in best.items()}


def plot_curves(comparison: Comparison, path: Path) -> None:
    """Draw loss against steps and seconds, and test accuracy against steps, as a PNG.

    Raises:
        MissingDependency: matplotlib is not installed.
    """
    purpose = "to draw the curves"
    figures = require("matplotlib.figure", "matplotlib", purpose)
    formatter = require("matplotlib.ticker", "matplotlib", purpose).PercentFormatter
    figure = figures.Figure(figsize=(15, 4.6), dpi=120, layout="constrained")
    by_step, by_time, accuracy = figure.subplots(1, 3)

    smooth_losses = [_smooth(np.asarray(run.losses)) for run in comparison.results]
    for run, smoothed in zip(comparison.results, smooth_losses, strict=True):
        colour = _COLOURS.get(run.config.name)
        steps = np.arange(1, len(run.losses) + 1)
        for axes, x in ((by_step, steps), (by_time, np.cumsum(run.step_seconds))):
            axes.plot(x, run.losses, color=colour, alpha=0.18, linewidth=0.8)
            axes.plot(x, smoothed, color=colour, linewidth=2, label=run.config.label)
        accuracy.plot(
            [point.step for point in run.evaluations],
            [point.accuracy for point in run.evaluations],
            color=colour,
            linewidth=2,
            marker=_MARKERS.get(run.config.name, "o"),
            label=f"{run.config.label}: {run.accuracy:.1%} at the end",
        )

    for axes, title, unit in (
        (by_step, "Training loss against steps", "step"),
        (by_time, "Training loss against time", "seconds in training steps"),
    ):
        axes.set(title=title, xlabel=unit, ylabel="cross-entropy of the batch")
        _limit_loss_axis(axes, comparison, smooth_losses)
    accuracy.set(title="Test accuracy", xlabel="step", ylabel="accuracy")
    accuracy.yaxis.set_major_formatter(formatter(xmax=1))
    for axes in (by_step, by_time, accuracy):
        axes.set_xlim(left=0)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="lower right" if axes is accuracy else "upper right")
    figure.suptitle(
        f"{comparison.model} on {comparison.dataset}: batch {comparison.batch_size}, "
        f"{comparison.steps} steps, learning rate decaying linearly, seed {comparison.seed}"
    )
    figure.savefig(path)


def _limit_loss_axis(axes: Any, comparison: Comparison, smooth: list[npt.NDArray[Any]]) -> None:
    """A logarithmic axis if the loss falls tenfold; a spike of one run does not set the scale."""
    finite = np.concatenate([curve[np.isfinite(curve)] for curve in smooth])
    if len(finite) == 0:
        return
    if finite.min() > 0 and finite.max() > 10 * finite.min():
        axes.set_yscale("log")
        axes.set_ylim(finite.min() / 3, 1.5 * finite.max())
        return
    raw = np.concatenate([run.losses for run in comparison.results])
    raw = raw[np.isfinite(raw)]
    low, high = raw.min(), max(finite.max(), np.percentile(raw, 99))
    margin = 0.05 * (high - low)
    axes.set_ylim(low - margin, high + margin)


def _smooth(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Centred moving average over a 25th of the run, over fewer values at its ends."""
    half = max(1, len(values) // 50)
    window = np.ones(2 * half + 1)
    sums = np.convolve(values, window)[half : half + len(values)]
    counts = np.convolve(np.ones_like(values), window)[half : half + len(values)]
    return np.asarray(sums / counts)


def _has_preconditioner(run: RunResult) -> bool:
    return any(run.preconditioner_seconds)


def _conditions(comparison: Comparison) -> str:
    budget = "" if comparison.budget is None else f" (from a budget of {comparison.budget:g} s)"
    return (
        f"Every run starts from the same weights and sees the same batches: "
        f"{comparison.steps} steps{budget} of batch {comparison.batch_size}, "
        f"learning rate decaying linearly to zero, seed {comparison.seed}.\n\n"
        f"- data: {comparison.dataset}, {comparison.train_images} training and "
        f"{comparison.test_images} test images ({comparison.source})\n"
        f"- network: {comparison.model}, {comparison.parameters:,} parameters\n"
        f"- torch {comparison.torch_version}, threads: {comparison.threads}, {comparison.device}\n"
        f"- everything took {comparison.seconds:.0f} s"
    )


def _grid_text(comparison: Comparison) -> str:
    """For every optimizer in the comparison where its default comes from, then its grid, a line a setting."""
    lines: list[str] = []
    for name in _optimizers(comparison):
        lines.append(f"- {CHOSEN[name].label}: {CHOSEN[name].origin}")
        lines += [f"    - {config.settings}" for config in GRID[name]]
    return "\n".join(lines)


def _optimizers(comparison: Comparison) -> list[str]:
    return list(dict.fromkeys(run.config.name for run in comparison.results))


def _report_text(comparison: Comparison) -> str:
    return "\n".join(
        [
            f"# {comparison.model} on {comparison.dataset}",
            "",
            format_table(comparison),
            "",
            format_settings(comparison),
            "",
            "![Training loss and test accuracy](curves.png)",
            "",
            f"Loss: mean of the last {min(TAIL, comparison.steps)} steps. Accuracy: on the whole "
            "test set, after the last step. A step is the whole of it: batch, forward, backward, "
            "preconditioner, update; times are medians, and share is the preconditioner's part of "
            "a step (not what K-FAC gathers in the passes). In the figure the thin lines are "
            "every batch's loss, the thick ones a moving average; accuracy before the last step is "
            f"on a part of the test set ({comparison.results[0].evaluations[0].images} images).",
            "",
            "## Conditions",
            "",
            _conditions(comparison),
            "",
            "## Where the settings come from",
            "",
            f"The defaults, and the grids. The best is that by the mean loss of the last {TAIL} of {GRID_STEPS} "
            "steps on CIFAR-10 with ResNet-20 and batch 128 (one seed):",
            "",
            _grid_text(comparison),
            "",
            "`mfac-kernels train --grid` runs them.",
            "",
        ]
    )


def _config(config: OptimizerConfig) -> dict[str, Any]:
    return {"optimizer": config.name, **vars(config)}


def _as_json(comparison: Comparison, *, curves: bool) -> dict[str, Any]:
    # The dataclasses' field names are the file's.
    return {
        **{name: value for name, value in vars(comparison).items() if name != "results"},
        "settings_chosen_from": {name: [_config(config) for config in GRID[name]] for name in _optimizers(comparison)},
        "runs": [_run_as_json(run, curves=curves) for run in comparison.results],
    }


def _run_as_json(run: RunResult, *, curves: bool) -> dict[str, Any]:
    content: dict[str, Any] = {
        **_config(run.config),
        "final_loss": _number(run.final_loss),
        "test_accuracy": _number(run.accuracy),
        "step_seconds_median": run.median_step_seconds,
        "preconditioner_seconds_median": run.median_preconditioner_seconds,
        "preconditioner_share": run.preconditioner_share,
    }
    if curves:
        content["losses"] = [_number(loss) for loss in run.losses]
        content["step_seconds"] = run.step_seconds
        content["preconditioner_seconds"] = run.preconditioner_seconds
        content["evaluations"] = [vars(point) for point in run.evaluations]
    return content


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no NaN


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
