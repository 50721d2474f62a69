"""Two-level K-FAC against K-FAC (Koroko et al. 2023) on real data, at a size for two cores: `make paper-twolevel`.

    K-FAC; corrected in five coarse spaces; by Tselepidis et al. 2020; Adam; SGD

Four problems. Every contender chooses its learning rate and damping from one grid, by the loss at the end of short
runs on one seed, and keeps them. Momentum 0.9, Fisher matrices of labels drawn from the model, the whole batch for the
coarse level. Batches and initial weights depend on the seed alone. Losses are means of the batches of an epoch. Equal
epochs: as many steps for all. Equal seconds: what each has reached in the time that K-FAC takes for these, of the
processor and on one thread, so that other work on the machine tells little; Adam and SGD go on until then, for six
times the steps at most.

Written to --out after every run: twolevel.json; a run that is in it is not repeated. At the end: twolevel.md, .png.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import time
from dataclasses import asdict, replace
from pathlib import Path

from paper_problems import PROBLEMS, Data, Problem
from paper_twolevel_report import write_report
from provenance import made
from two_level_runs import (
    CONTENDERS,
    DAMPINGS,
    KFAC,
    KL_CLIP,
    MOMENTUM,
    PLAIN,
    PROBES,
    RATES,
    Run,
    train,
)


class Comparison:
    """Runs what is not in the file yet, and writes it there."""

    def __init__(self, path: Path, conditions: dict[str, object], planned: dict[tuple[str, str], int]) -> None:
        self._path, self._conditions, self._left = path, conditions, dict(planned)
        self._rates: dict[tuple[str, str], float] = {}  # seconds of a step
        self._started = time.perf_counter()
        self.used: list[Run] = []
        self.runs: list[Run] = []
        if path.is_file():
            self.runs = [Run(**run) for run in json.loads(path.read_text())["runs"]]

    def run(self, run: Run, problem: Problem, data: Data, seconds: float = 0.0, probes: int = 0) -> Run:
        known = next((r for r in self.runs if r.key == run.key), None)
        if known is None:
            train(run, problem, data, seconds, probes)
            self.runs.append(run)
            self._write()
        run = known or run
        self.used.append(run)
        self._tell(run)
        return run

    def _write(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        partial = self._path.with_suffix(".partial")
        rounded = [{key: _rounded(value) for key, value in asdict(run).items()} for run in self.runs]
        partial.write_text(json.dumps({"conditions": self._conditions, "runs": rounded}) + "\n")
        os.replace(partial, self._path)

    def _tell(self, run: Run) -> None:
        place = run.problem, run.contender
        self._left[place] -= run.steps
        self._rates[place] = math.fsum(run.seconds) / max(1, len(run.seconds))
        usual = math.fsum(self._rates.values()) / len(self._rates)
        left = math.fsum(steps * self._rates.get(where, usual) for where, steps in self._left.items())
        setting = f"lr {run.lr:g}" + ("" if run.damping is None else f", damping {run.damping:g}")
        spent = time.perf_counter() - self._started
        kind = "search" if run.searching else f"seed {run.seed}"
        print(
            f"{spent:5.0f} s, about {left:.0f} s left  {run.problem}, {run.contender}, {setting}, {kind}: "
            f"loss {run.final_loss:.4g}",
            flush=True,
        )


def _rounded(value: object) -> object:
    return [float(f"{x:.5g}") for x in value] if isinstance(value, list) else value


def settings(contender: str) -> list[tuple[float, float | None]]:
    return list(itertools.product(RATES, [None] if contender in PLAIN else DAMPINGS))


def compare(comparison: Comparison, name: str, problem: Problem, seeds: int) -> None:
    data = problem.data().first(problem.images)
    chosen = {}
    for contender in CONTENDERS:
        found = [
            comparison.run(Run(name, contender, *setting, 0, problem.grid_steps, True), problem, data)
            for setting in settings(contender)
        ]
        best = min(found, key=lambda run: run.final_loss)
        chosen[contender] = best.lr, best.damping
    for seed in range(seeds):  # contenders in turns: the machine's drift meets all
        seconds = 0.0
        for contender, setting in chosen.items():
            run = Run(name, contender, *setting, seed, problem.steps, False)
            limit, probes = seconds if contender in PLAIN else 0.0, 0 if seed else PROBES
            run = comparison.run(run, problem, data, limit, probes)
            if contender == KFAC:
                seconds = math.fsum(run.seconds)


def listed(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--problems", default=",".join(PROBLEMS), help="default: %(default)s")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, help="of every problem (default: its own)")
    parser.add_argument("--grid-steps", type=int, help="of every run of the search (default: by problem)")
    options = parser.parse_args(arguments)
    names, problems = options.problems.split(","), {}
    for name in names:
        if name not in PROBLEMS:
            parser.error(f"--problems: expected some of {', '.join(PROBLEMS)}, got {name!r}")
        problem = PROBLEMS[name]
        problems[name] = replace(
            problem,
            epochs=options.epochs or problem.epochs,
            grid_steps=options.grid_steps or problem.grid_steps,
        )
    conditions: dict[str, object] = {
        **made(),
        "grid": f"learning rates {listed(RATES)}, constant; dampings {listed(DAMPINGS)}",
        "all": f"momentum {MOMENTUM:g} (but Adam); kl_clip {KL_CLIP:g}",
        "seeds": f"{options.seeds}; mean ± deviation",
    }
    planned = {
        (name, contender): options.seeds * problem.steps + problem.grid_steps * len(settings(contender))
        for name, problem in problems.items()
        for contender in CONTENDERS
    }
    comparison = Comparison(options.out / "twolevel.json", conditions, planned)
    for name, problem in problems.items():
        compare(comparison, name, problem, options.seeds)
        print(write_report(problems, comparison.used, conditions, options.out), flush=True)


if __name__ == "__main__":
    main()
