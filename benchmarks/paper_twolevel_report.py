"""What `make paper-twolevel` reports: tables, curves, and whether the paper's conclusion is seen."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from paper_fig1 import grid_lines, spread
from paper_problems import Problem
from two_level_runs import CONTENDERS, CORRECTED, KFAC, TSELEPIDIS, Run

LITTLE = 0.05  # of a loss: what "hardly moves" allows, or two deviations of K-FAC's seeds
COLUMNS = (
    "method",
    "learning rate, damping",
    "minimum loss, equal epochs",
    "minimum loss, equal seconds",
    "s per epoch",
    "time, K-FAC 1",
    "steps with a lower error",
    "gain of a step, median",
    "part of K-FAC's squared error removed",
)
Runs = dict[str, list[Run]]  # of one problem, by contender


def write_report(
    problems: Mapping[str, Problem], runs: Sequence[Run], conditions: Mapping[str, object], out: Path
) -> str:
    """twolevel.md and twolevel.png, of the problems that have been run; the text."""
    lines = ["# Two-level K-FAC", "", *(f"- {key}: {value}" for key, value in conditions.items())]
    final: dict[str, Runs] = {}
    for name, problem in problems.items():
        own = [run for run in runs if run.problem == name]
        searched, final[name] = (
            {c: [r for r in own if r.contender == c and r.searching == s] for c in CONTENDERS} for s in (True, False)
        )
        if not all(final[name].values()):
            del final[name]
            continue
        lines += ["", f"## {problem.title}", "", *_size(problem, own[0].source), "", *_table(problem, final[name]), ""]
        lines += _conclusion(problem, final[name])
        lines += ["", f"The grid: mean loss of the last quarter of {problem.grid_steps} steps."]
        lines += grid_lines(
            {
                c: [{**_setting(r), "loss": problem.shown(r.final_loss)} for r in of_one]
                for c, of_one in searched.items()
            }
        )
    text = "\n".join([*lines, ""])
    (out / "twolevel.md").write_text(text)
    plot({name: problems[name] for name in final}, final, out / "twolevel.png")
    return text


def minimum(problem: Problem, run: Run, *, steps: int | None = None, seconds: float = math.inf) -> float:
    """The least mean loss of as many steps as an epoch has, among so many steps or seconds; infinite if none is."""
    width = problem.steps_per_epoch
    within = sum(at <= seconds for at in itertools.accumulate(run.seconds))
    losses = run.losses[: min(within, len(run.losses) if steps is None else steps)]
    sums = [0.0, *itertools.accumulate(losses)]
    means = [(b - a) / width for a, b in zip(sums, sums[width:], strict=False)]
    return problem.shown(min(means, default=math.inf))


def diverged(problem: Problem, run: Run) -> bool:
    return len(run.losses) < problem.steps


def _setting(run: Run) -> dict[str, float]:
    return {"lr": run.lr} if run.damping is None else {"lr": run.lr, "damping": run.damping}


def _size(problem: Problem, source: str) -> list[str]:
    lines = [
        f"{problem.images} samples ({source}), {problem.epochs} epochs of {problem.steps_per_epoch} batches of "
        f"{problem.batch}. Loss: {problem.loss}. Inverses every {problem.inv_update_steps} steps."
    ]
    if problem.published:
        lines.append(f"Published minima, on all of the data and after more epochs: {problem.published}.")
    return lines


def _least(losses: Sequence[float]) -> str:
    return spread(losses, 4) if all(map(math.isfinite, losses)) else "no whole epoch"


def _table(problem: Problem, runs: Runs) -> list[str]:
    kfac = [math.fsum(run.seconds) for run in runs[KFAC]]
    usual = statistics.median(s for run in runs[KFAC] for s in run.seconds)
    rows = [COLUMNS, ("---",) * len(COLUMNS)]
    for contender, of_one in runs.items():
        step = statistics.median(s for run in of_one for s in run.seconds)
        gains = [gain for run in of_one for gain in run.gains]
        shares = [share for run in of_one for share in run.shares]
        failed = sum(diverged(problem, run) for run in of_one)
        rows.append(
            (
                contender,
                ", ".join(f"{value:g}" for value in _setting(of_one[0]).values()),
                _least([minimum(problem, run, steps=problem.steps) for run in of_one])
                + (f", then {failed} diverged" if failed else ""),
                _least([minimum(problem, run, seconds=s) for run, s in zip(of_one, kfac, strict=True)]),
                f"{step * problem.steps_per_epoch:.2f}",
                f"{step / usual:.2f}",
                f"{sum(g > 0 for g in gains)} of {len(gains)}" if gains else "",
                f"{statistics.median(gains):.3g}" if gains else "",
                f"{min(shares):.2%} to {max(shares):.2%}" if shares else "",
            )
        )
    return [f"| {' | '.join(row)} |" for row in rows]


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
        width = problem.steps_per_epoch
        for contender, of_one in runs[name].items():
            losses = _mean([run.losses[: problem.steps] for run in of_one])
            means = [problem.shown(math.fsum(losses[k : k + width]) / width) for k in range(len(losses) - width + 1)]
            epochs = [(k + width) / width for k in range(len(means))]
            style = "--" if contender not in CORRECTED else "-"
            marker = "o" if len(means) == 1 else ""
            (line,) = axes[0, i].plot(epochs, means, style, label=contender, linewidth=1.2, marker=marker)
            if contender in CORRECTED:
                gains = _mean([run.gains for run in of_one])
                axes[1, i].plot(range(1, len(gains) + 1), gains, color=line.get_color(), linewidth=1.0)
        axes[0, i].set(title=name, xlabel="epochs", ylabel=problem.loss, yscale="log")
        axes[1, i].set(xlabel="step", ylabel="squared error that the correction removes", yscale="log")
    axes[0, 0].legend(fontsize=7)
    figure.savefig(path)


def _mean(curves: list[list[float]]) -> list[float]:
    """As long as the shortest."""
    return [statistics.mean(values) for values in zip(*curves, strict=False)]
