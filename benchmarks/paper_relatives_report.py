"""What `make paper-relatives` reports: what papers claim, what is seen, curves against epochs and against seconds."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from paper_problems import Problem
from paper_report import Runs, diverged, mean, means, minimum, report, table
from paper_runs import KFAC, PLAIN, Run
from relatives_runs import CONTENDERS, KBFGS, MINI_BLOCK

CLAIMS = {
    "EKFAC": "improvements over K-FAC in optimization speed for several architectures (George et al. 2018)",
    "TKFAC": "a bound on the error of the approximation, and a better performance than others (Gao et al. 2021)",
    "KPSVD, deflation": "a more accurate Fisher matrix at a slight additional cost, faster than K-FAC and first-order "
    "methods on three autoencoders (Koroko et al. 2022)",
    MINI_BLOCK: "a cost of a step only slightly above that of first-order methods, on GPUs; effective in time and in "
    "generalization on autoencoders and convolutional networks (Bahamou et al. 2023)",
    KBFGS: "outperforms or performs comparably to K-FAC and first-order methods on autoencoders "
    "(Goldfarb et al. 2020), outperforms the latter on convolutional networks (Ren et al. 2021)",
}
"""Of the papers' abstracts."""


def write_report(
    problems: Mapping[str, Problem], runs: Sequence[Run], conditions: Mapping[str, object], out: Path
) -> str:
    """relatives.md and relatives.png, of the problems that have been run; the text."""

    def body(problem: Problem, own: Runs) -> list[str]:
        return [*table(problem, own), "", *_seen(problem, own)]

    text, final = report("K-FAC's relatives", CONTENDERS, problems, runs, conditions, body)
    claims = ["", "## What the papers claim", "", *(f"- {name}: {claim}." for name, claim in CLAIMS.items()), ""]
    text += "\n".join(claims)
    (out / "relatives.md").write_text(text)
    plot({name: problems[name] for name in final}, final, out / "relatives.png")
    return text


def _seen(problem: Problem, runs: Runs) -> list[str]:
    """Which minima are lower than K-FAC's, and which higher, by more than two deviations of the seeds."""
    kfac = [math.fsum(run.seconds) for run in runs[KFAC]]
    epochs = {c: [minimum(problem, run, steps=problem.steps) for run in of_one] for c, of_one in runs.items()}
    seconds = {
        c: [minimum(problem, run, seconds=s) for run, s in zip(of_one, kfac, strict=True)] for c, of_one in runs.items()
    }
    lines = [f"{_beside(epochs, 'At equal epochs')} {_beside(seconds, 'In equal seconds')}"]
    failed = [c for c, of_one in runs.items() if any(diverged(problem, run) for run in of_one)]
    return lines + ([f"Some runs diverged: {', '.join(failed)}."] if failed else [])


def _beside(losses: Mapping[str, list[float]], where: str) -> str:
    def deviation(values: list[float]) -> float:
        return statistics.stdev(values) if len(values) > 1 else 0.0

    def those(test: Callable[[float, float], bool]) -> str:
        return ", ".join(c for c, of_one in whole.items() if c != KFAC and test(*difference(of_one))) or "none"

    def difference(of_one: list[float]) -> tuple[float, float]:
        far = 2 * max(deviation(of_one), deviation(losses[KFAC]))
        return statistics.fmean(of_one) - statistics.fmean(losses[KFAC]), far

    whole = {c: of_one for c, of_one in losses.items() if all(map(math.isfinite, of_one))}
    if KFAC not in whole:
        return f"{where} K-FAC has no minimum."
    text = f"{where} lower than K-FAC's by more than two deviations of the seeds: {those(lambda d, far: d < -far)}; "
    text += f"higher: {those(lambda d, far: d > far)}; alike: {those(lambda d, far: abs(d) <= far)}."
    none = [c for c in losses if c not in whole]
    return text + (f" Without a whole epoch: {', '.join(none)}." if none else "")


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
