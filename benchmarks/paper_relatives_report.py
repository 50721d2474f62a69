"""What `make paper-relatives` reports: tables, and curves against epochs and against seconds."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

from paper_problems import Problem
from paper_report import Runs, mean, means, report, table
from paper_runs import KFAC, PLAIN, Run
from relatives_runs import CONTENDERS


def write_report(
    problems: Mapping[str, Problem], runs: Sequence[Run], conditions: Mapping[str, object], out: Path
) -> str:
    """relatives.md and relatives.png, of the problems that have been run; the text."""
    text, final = report("K-FAC's relatives", CONTENDERS, problems, runs, conditions, table)
    (out / "relatives.md").write_text(text)
    plot({name: problems[name] for name in final}, final, out / "relatives.png")
    return text


def plot(problems: Mapping[str, Problem], runs: Mapping[str, Runs], path: Path) -> None:
    """Loss against epochs, and against seconds as far as K-FAC's last; a column for each problem, means over seeds."""
    from matplotlib.figure import Figure

    if not problems:
        return
    figure = Figure(figsize=(4.6 * len(problems), 7.2), dpi=130, layout="constrained")
    axes = figure.subplots(2, len(problems), squeeze=False)
    for i, (name, problem) in enumerate(problems.items()):
        last = sum(mean([run.seconds for run in runs[name][KFAC]]))
        for contender, of_one in runs[name].items():
            losses = means(problem, mean([run.losses for run in of_one]))
            seconds = list(itertools.accumulate(mean([run.seconds for run in of_one])))[problem.steps_per_epoch - 1 :]
            within = problem.steps - problem.steps_per_epoch + 1
            epochs = [1 + k / problem.steps_per_epoch for k in range(len(losses))]
            style = {"linestyle": "--" if contender in PLAIN else "-", "linewidth": 1.2, "label": contender}
            style["marker"] = "o" if within == 1 else ""
            axes[0, i].plot(epochs[:within], losses[:within], **style)
            axes[1, i].plot(seconds, losses, **style)
        axes[0, i].set(title=name, xlabel="epochs", ylabel=problem.loss, yscale="log")
        axes[1, i].set(xlabel="seconds", xlim=(0, last), ylabel=problem.loss, yscale="log")
    axes[0, 0].legend(fontsize=7)
    figure.savefig(path)
