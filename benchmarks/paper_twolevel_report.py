"""What `make paper-twolevel` reports: tables, curves, and whether the paper's conclusion is seen."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from paper_problems import Problem
from paper_report import Runs, diverged, mean, means, minimum, report, table
from paper_runs import KFAC, Run
from two_level_runs import CONTENDERS, CORRECTED, TSELEPIDIS

LITTLE = 0.05  # of a loss: what "hardly moves" allows, or two deviations of K-FAC's seeds
COLUMNS = ("steps with a lower error", "gain of a step, median", "part of K-FAC's squared error removed")


def write_report(
    problems: Mapping[str, Problem], runs: Sequence[Run], conditions: Mapping[str, object], out: Path
) -> str:
    """twolevel.md and twolevel.png, of the problems that have been run; the text."""

    def body(problem: Problem, own: Runs) -> list[str]:
        return [*table(problem, own, COLUMNS, _corrections), "", *_conclusion(problem, own)]

    text, final = report("Two-level K-FAC", CONTENDERS, problems, runs, conditions, body)
    (out / "twolevel.md").write_text(text)
    plot({name: problems[name] for name in final}, final, out / "twolevel.png")
    return text


def _corrections(runs: list[Run]) -> tuple[str, str, str]:
    gains = [gain for run in runs for gain in run.gains]
    shares = [share for run in runs for share in run.shares]
    return (
        f"{sum(g > 0 for g in gains)} of {len(gains)}" if gains else "",
        f"{statistics.median(gains):.3g}" if gains else "",
        f"{min(shares):.2%} to {max(shares):.2%}" if shares else "",
    )


def _conclusion(problem: Problem, runs: Runs) -> list[str]:
    """Both halves of the paper's: the error falls at every step, and the loss hardly moves."""
    gains = {c: [gain for run in runs[c] for gain in run.gains] for c in CORRECTED if c != TSELEPIDIS}
    rising = {c: sum(not g > 0 for g in of_one) for c, of_one in gains.items() if not all(g > 0 for g in of_one)}
    total = sum(map(len, gains.values()))
    error = f"in all of the {total} steps of the exact corrections"
    if rising:
        counts = ", ".join(f"{count} of {len(gains[c])} with {c}" for c, count in rising.items())
        error = f"but not in {counts}"
    losses = {c: [minimum(problem, run, steps=problem.steps) for run in runs[c]] for c in (KFAC, *CORRECTED)}
    usual = statistics.fmean(losses[KFAC])
    deviation = statistics.stdev(losses[KFAC]) if len(losses[KFAC]) > 1 and math.isfinite(usual) else 0.0
    little = max(LITTLE * usual, 2 * deviation)
    moves = {c: statistics.fmean(losses[c]) - usual for c in CORRECTED}
    far = {
        c: "diverges" if any(diverged(problem, run) for run in runs[c]) else "moves by more"
        for c, move in moves.items()
        if not abs(move) <= little or any(diverged(problem, run) for run in runs[c])
    }
    changes = ", ".join(f"{c} {move / usual:+.1%}" for c, move in moves.items())
    seen = "is seen" if not rising and not far else "is not seen, or in part"
    moved = ", ".join(f"{word} with {c}" for c, word in far.items()) or "hardly moves"
    return [
        f"The paper's conclusion {seen}. The error in the F-norm falls {error}. The minimum loss at equal epochs "
        f"{moved} (at most {little / usual:.1%} of K-FAC's counts as hardly): {changes}."
    ]


def plot(problems: Mapping[str, Problem], runs: Mapping[str, Runs], path: Path) -> None:
    """Loss against epochs, and the gain of each step; a column for each problem, means over the seeds."""
    from matplotlib.figure import Figure

    if not problems:
        return
    figure = Figure(figsize=(4.6 * len(problems), 7.2), dpi=130, layout="constrained")
    axes = figure.subplots(2, len(problems), squeeze=False)
    for i, (name, problem) in enumerate(problems.items()):
        for contender, of_one in runs[name].items():
            losses = means(problem, mean([run.losses[: problem.steps] for run in of_one]))
            epochs = [1 + k / problem.steps_per_epoch for k in range(len(losses))]
            style = "--" if contender not in CORRECTED else "-"
            marker = "o" if len(losses) == 1 else ""
            (line,) = axes[0, i].plot(epochs, losses, style, label=contender, linewidth=1.2, marker=marker)
            if contender in CORRECTED:
                gains = mean([run.gains for run in of_one])
                axes[1, i].plot(range(1, len(gains) + 1), gains, color=line.get_color(), linewidth=1.0)
        axes[0, i].set(title=name, xlabel="epochs", ylabel=problem.loss, yscale="log")
        axes[1, i].set(xlabel="step", ylabel="squared error that the correction removes", yscale="log")
    axes[0, 0].legend(fontsize=7)
    figure.savefig(path)
