"""Runs of a number of seconds, errors against the clock, and a comparison that a file keeps."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from mfac_kernels.pinn import loss_of
from mfac_kernels.training.pinn.equations import EQUATIONS
from mfac_kernels.training.pinn.methods import METHODS

__all__ = ["EVALUATIONS", "Comparison", "Run", "read_runs", "train", "write_runs"]

EVALUATIONS = 50  # of a run, evenly over its seconds


@dataclass
class Run:
    """One method on one equation. ``seconds``, ``errors``, ``losses``: of evaluations, the first before any step."""

    equation: str
    method: str
    value: float  # of the method's setting
    seed: int
    budget: float  # seconds, evaluation excluded
    searching: bool = False
    steps: int = 0
    diverged: bool = False
    seconds: list[float] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    @property
    def key(self) -> tuple[object, ...]:
        return self.equation, self.method, self.value, self.seed, self.budget, self.searching

    @property
    def error(self) -> float:
        """The last; infinite if the run diverged."""
        return math.inf if self.diverged else self.errors[-1]


def train(run: Run, redraw: int | None, on_progress: Callable[[float, float], object] | None = None) -> None:
    """Fill ``run``: the network and the points depend on the equation and the seed alone.

    Args:
        redraw: steps until there are new points; None: never.
        on_progress: is told the seconds so far and the last error.
    """
    equation = EQUATIONS[run.equation]
    net = equation.network(run.seed)
    step = METHODS[run.method].build(net, equation, run.value)
    generator = torch.Generator().manual_seed(1000 + run.seed)
    terms = equation.terms(generator)
    spent, loss = 0.0, float(loss_of(net, terms).detach())
    run.seconds, run.errors, run.losses = [spent], [equation.error(net)], [loss]
    while spent < run.budget:
        due = len(run.errors) * run.budget / EVALUATIONS
        while spent < due:
            begin = time.perf_counter()
            if redraw and run.steps and run.steps % redraw == 0:
                terms = equation.terms(generator)
            loss = float(step(terms))
            spent += time.perf_counter() - begin
            run.steps += 1
        error = equation.error(net)
        if not (math.isfinite(error) and math.isfinite(loss)):
            run.diverged = True
            return
        for values, new in ((run.seconds, spent), (run.errors, error), (run.losses, loss)):
            values.append(new)
        if on_progress is not None:
            on_progress(spent, error)


def read_runs(path: Path) -> list[Run]:
    return [Run(**run) for run in json.loads(path.read_text(encoding="utf-8"))["runs"]]


class Comparison:
    """Runs, kept in ``pinn.json`` of a folder: one that is there is not repeated.

    Args:
        budget: seconds of a run.
        search: seconds of each run of the search for a setting, on the first seed; the least error chooses. 0: no
            search, and the middle of the grid.
        conditions: told in the file and in the report.
    """

    def __init__(
        self,
        out: Path,
        equations: Sequence[str],
        methods: Sequence[str],
        *,
        budget: float,
        search: float,
        seeds: int,
        redraw: int | None = None,
        conditions: Mapping[str, Any] | None = None,
    ) -> None:
        self.path = out / "pinn.json"
        self.equations, self.methods = list(equations), list(methods)
        self.budget, self.search, self.seeds, self.redraw = budget, search, seeds, redraw
        self.conditions = dict(conditions or {})
        self.runs = read_runs(self.path) if self.path.is_file() else []

    @property
    def planned(self) -> float:
        """Seconds of all runs, in steps."""
        trials = sum(len(self._grid(name)) for name in self.methods)
        return len(self.equations) * (trials * self.search + len(self.methods) * self.seeds * self.budget)

    def go(self, on_begin: Callable[[Run], object], on_progress: Callable[[float, float], object]) -> list[Run]:
        """Run what is missing; the runs that belong to the comparison, those of the search among them."""
        used: list[Run] = []
        for equation in self.equations:
            chosen: dict[str, float] = {}
            for name in self.methods:
                trials = [Run(equation, name, value, 0, self.search, True) for value in self._grid(name)]
                found = [self._run(run, on_begin, on_progress) for run in trials]
                used += found
                values = METHODS[name].values
                chosen[name] = min(found, key=lambda run: run.error).value if found else values[len(values) // 2]
            for seed in range(self.seeds):  # methods in turns: the machine's drift meets all
                for name, value in chosen.items():
                    used.append(self._run(Run(equation, name, value, seed, self.budget), on_begin, on_progress))
        return used

    def _grid(self, name: str) -> tuple[float, ...]:
        """The settings to be tried."""
        values = METHODS[name].values
        return values if self.search and len(values) > 1 else ()

    def _run(self, run: Run, on_begin: Callable[[Run], object], on_progress: Callable[[float, float], object]) -> Run:
        on_begin(run)
        known = next((r for r in self.runs if r.key == run.key), None)
        if known is not None:
            on_progress(run.budget, known.error)
            return known
        train(run, self.redraw, on_progress)
        on_progress(run.budget, run.error)  # also of one that ended early
        self.runs.append(run)
        write_runs(self.path, self.runs, self.conditions)
        return run


def write_runs(path: Path, runs: Iterable[Run], conditions: Mapping[str, Any]) -> None:
    """At once: a file that is there is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    rounded = [{key: _rounded(value) for key, value in asdict(run).items()} for run in runs]
    partial.write_text(json.dumps({"conditions": dict(conditions), "runs": rounded}) + "\n", encoding="utf-8")
    os.replace(partial, path)


def _rounded(value: object) -> object:
    return [float(f"{x:.4g}") for x in value] if isinstance(value, list) else value
