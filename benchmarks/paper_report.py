"""What reports of contenders on problems share: minima at equal epochs and equal seconds, tables, curves."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence

from paper_fig1 import grid_lines, spread
from paper_problems import Problem
from paper_runs import KFAC, Run

COLUMNS = (
    "method",
    "learning rate, damping",
    "minimum loss, equal epochs",
    "minimum loss, equal seconds",
    "s per epoch",
    "time, K-FAC 1",
)
Runs = dict[str, list[Run]]  # of one problem, by contender


def report(
    title: str,
    contenders: Sequence[str],
    problems: Mapping[str, Problem],
    runs: Sequence[Run],
    conditions: Mapping[str, object],
    body: Callable[[Problem, Runs], list[str]],
) -> tuple[str, dict[str, Runs]]:
    """The text, and the runs that are no search, of problems that have been run: ``body`` is what is said of each."""
    lines = [f"# {title}", "", *(f"- {key}: {value}" for key, value in conditions.items())]
    final: dict[str, Runs] = {}
    for name, problem in problems.items():
        own = [run for run in runs if run.problem == name]
        searched, last = (
            {c: [r for r in own if r.contender == c and r.searching == s] for c in contenders} for s in (True, False)
        )
        if not all(last.values()):
            continue
        final[name] = last
        lines += ["", f"## {problem.title}", "", *_size(problem, own[0].source), "", *body(problem, last)]
        lines += ["", f"The grid: mean loss of the last quarter of {problem.grid_steps} steps."]
        lines += grid_lines(
            {c: [{**r.setting, "loss": problem.shown(r.final_loss)} for r in of_one] for c, of_one in searched.items()}
        )
    return "\n".join([*lines, ""]), final


def table(
    problem: Problem, runs: Runs, more: Sequence[str] = (), cells: Callable[[list[Run]], Sequence[str]] | None = None
) -> list[str]:
    """A row for each contender: ``COLUMNS``, and ``more`` with the ``cells`` of its runs."""
    kfac = [math.fsum(run.seconds) for run in runs[KFAC]]
    usual = statistics.median(s for run in runs[KFAC] for s in run.seconds)
    rows = [(*COLUMNS, *more), ("---",) * (len(COLUMNS) + len(more))]
    for contender, of_one in runs.items():
        step = statistics.median(s for run in of_one for s in run.seconds)
        failed = sum(diverged(problem, run) for run in of_one)
        rows.append(
            (
                contender,
                ", ".join(f"{value:g}" for value in of_one[0].setting.values()),
                _least([minimum(problem, run, steps=problem.steps) for run in of_one])
                + (f", then {failed} diverged" if failed else ""),
                _least([minimum(problem, run, seconds=s) for run, s in zip(of_one, kfac, strict=True)]),
                f"{step * problem.steps_per_epoch:.2f}",
                f"{step / usual:.2f}",
                *(cells(of_one) if cells else ()),
            )
        )
    return [f"| {' | '.join(row)} |" for row in rows]


def minimum(problem: Problem, run: Run, *, steps: int | None = None, seconds: float = math.inf) -> float:
    """The least mean loss of as many steps as an epoch has, among so many steps or seconds; infinite if none is."""
    allowed = seconds * (1 + 1e-9)  # sums in another order: a run is within its own time
    within = sum(at <= allowed for at in itertools.accumulate(run.seconds))
    losses = run.losses[: min(within, len(run.losses) if steps is None else steps)]
    return min(means(problem, losses), default=math.inf)


def means(problem: Problem, losses: Sequence[float]) -> list[float]:
    """Of as many steps as an epoch has, up to each, from the end of the first epoch on."""
    width = problem.steps_per_epoch
    sums = [0.0, *itertools.accumulate(losses)]
    return [problem.shown((b - a) / width) for a, b in zip(sums, sums[width:], strict=False)]


def diverged(problem: Problem, run: Run) -> bool:
    return len(run.losses) < problem.steps


def mean(curves: Sequence[Sequence[float]]) -> list[float]:
    """As long as the shortest."""
    return [statistics.mean(values) for values in zip(*curves, strict=False)]


def _size(problem: Problem, source: str) -> list[str]:
    lines = [
        f"{problem.images} samples ({source}), {problem.epochs} epochs of {problem.steps_per_epoch} batches of "
        f"{problem.batch}. Loss: {problem.loss}. Inverses every {problem.inv_update_steps} steps."
    ]
    if problem.published:
        lines.append(f"Published minima, on all of the data and after more epochs: {problem.published}.")
    return lines


def _least(losses: Sequence[float]) -> str:
    return spread(list(losses), 4) if all(map(math.isfinite, losses)) else "no whole epoch"
