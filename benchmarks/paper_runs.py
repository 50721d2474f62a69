"""Contenders on problems: a search over one grid, then seeds; each run timed, and kept in a file that others resume."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from paper_problems import Data, Problem
from provenance import made
from torch import Tensor, nn

from mfac_kernels.preconditioners._gathered import GatheringPreconditioner

KFAC = "K-FAC"
PLAIN = {"Adam": torch.optim.Adam, "SGD": torch.optim.SGD}
LONGEST = 6  # times the steps, however fast they are
RATES, DAMPINGS = (0.003, 0.03, 0.3), (0.1, 1.0)  # the grid of every contender
MOMENTUM, KL_CLIP = 0.9, 0.01


@dataclass
class Run:
    """One contender on one problem: an entry for each step in ``losses``, ``seconds`` (of the processor), ``gains``.

    Of two-level K-FAC alone: ``gains``; ``shares``: at a few steps, the part of K-FAC's squared error in the F-norm
    that the correction takes away.
    """

    problem: str
    contender: str
    lr: float
    damping: float | None
    seed: int
    steps: int  # asked for
    searching: bool
    source: str = ""  # of the data
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    gains: list[float] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)

    @property
    def key(self) -> tuple[object, ...]:
        return self.problem, self.contender, self.lr, self.damping, self.seed, self.steps, self.searching

    @property
    def setting(self) -> dict[str, float]:
        return {"lr": self.lr} if self.damping is None else {"lr": self.lr, "damping": self.damping}

    @property
    def final_loss(self) -> float:
        """Mean of the last quarter; infinite if the run diverged."""
        tail = self.losses[-max(1, self.steps // 4) :]
        return math.fsum(tail) / len(tail) if len(self.losses) >= self.steps else math.inf


class Method:
    """What a run trains with. ``aside``: seconds of a step that are not the method's."""

    def __init__(self, optimizer: torch.optim.Optimizer, preconditioner: GatheringPreconditioner | None = None) -> None:
        self.optimizer, self.preconditioner = optimizer, preconditioner
        self.aside = 0.0

    def begin(self, step: int) -> None:
        """Before a step."""

    def precondition(self, closure: Callable[[], Tensor]) -> None:
        """``closure``: the batch's forward and backward pass again."""
        if self.preconditioner is not None:
            self.preconditioner.step()

    def end(self, run: Run) -> None:
        """After a step."""


Made = Callable[[Run, nn.Module, Problem], Method]


def plain(run: Run, net: nn.Module) -> torch.optim.Optimizer:
    """The optimizer alone, or the one that takes a preconditioner's steps."""
    if run.contender == "Adam":
        return torch.optim.Adam(net.parameters(), lr=run.lr)
    return torch.optim.SGD(net.parameters(), lr=run.lr, momentum=MOMENTUM)


def kfac_options(run: Run, problem: Problem) -> dict[str, Any]:
    """What every preconditioner of K-FAC's kind is made with."""
    return {"kl_clip": KL_CLIP, "lr": run.lr, "fisher_type": "mc", "inv_update_steps": problem.inv_update_steps}


def batches(data: Data, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        for index in torch.randperm(len(data.inputs), generator=generator).split(size):
            if len(index) == size:
                yield data.inputs[index], data.targets[index]


def train(run: Run, problem: Problem, data: Data, method_of: Made, seconds: float = 0.0) -> None:
    """``run.steps`` steps, and more until so many seconds have passed."""
    torch.manual_seed(run.seed)
    run.source = data.source
    net = problem.network()
    method = method_of(run, net, problem)
    p = method.preconditioner
    sampled = p is not None and p._gatherer.counting.sampled
    elapsed = 0.0
    for step, (x, y) in enumerate(batches(data, problem.batch, run.seed)):
        if step >= run.steps * LONGEST or (step >= run.steps and elapsed >= seconds):
            break

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            method.optimizer.zero_grad()
            output = net(x)
            loss = problem.loss_of(output, y)
            if sampled:
                with p.sampling():
                    problem.drawn(output).backward(retain_graph=True)
            loss.backward()
            return loss

        method.begin(step)
        start = time.process_time()
        loss = closure()
        method.precondition(closure)
        method.optimizer.step()
        value = loss.item()
        if not math.isfinite(value):
            break
        run.losses.append(value)
        spent = time.process_time() - start - method.aside
        elapsed += spent
        run.seconds.append(spent)
        method.end(run)


@dataclass(frozen=True)
class Study:
    """``name``: of the files; ``report``: writes the rest of them and returns the text."""

    name: str
    problems: Mapping[str, Problem]
    contenders: Sequence[str]
    method: Made
    report: Callable[[Mapping[str, Problem], Sequence[Run], Mapping[str, object], Path], str]
    rates: Sequence[float] = RATES
    dampings: Sequence[float] = DAMPINGS

    def settings(self, contender: str) -> list[tuple[float, float | None]]:
        return list(itertools.product(self.rates, [None] if contender in PLAIN else self.dampings))


class Comparison:
    """Runs what is not in the file yet, and writes it there."""

    def __init__(
        self, path: Path, others: Sequence[Path], conditions: dict[str, object], planned: dict[tuple[str, str], int]
    ) -> None:
        self._path, self._conditions, self._left = path, conditions, dict(planned)
        self._rates: dict[tuple[str, str], float] = {}  # seconds of a step
        self._started = time.perf_counter()
        self.used: list[Run] = []
        self.runs: list[Run] = []
        for file in (path, *others):
            if file.is_file():
                self.runs += [Run(**run) for run in json.loads(file.read_text())["runs"]]

    def run(self, run: Run, problem: Problem, data: Data, method: Made, seconds: float = 0.0) -> Run:
        known = next((r for r in self.runs if r.key == run.key), None)
        if known is None:
            train(run, problem, data, method, seconds)
            self.runs.append(run)
            self.write()
        run = known or run
        self.used.append(run)
        self._tell(run)
        return run

    def write(self) -> None:
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


def compare(study: Study, comparison: Comparison, name: str, problem: Problem, seeds: int) -> None:
    data = problem.data().first(problem.images)
    chosen = {}
    for contender in study.contenders:
        found = [
            comparison.run(Run(name, contender, *setting, 0, problem.grid_steps, True), problem, data, study.method)
            for setting in study.settings(contender)
        ]
        best = min(found, key=lambda run: run.final_loss)
        chosen[contender] = best.lr, best.damping
    for seed in range(seeds):  # contenders in turns: the machine's drift meets all
        seconds = 0.0
        for contender, setting in chosen.items():
            run = Run(name, contender, *setting, seed, problem.steps, False)
            run = comparison.run(run, problem, data, study.method, seconds if contender in PLAIN else 0.0)
            if contender == KFAC:
                seconds = math.fsum(run.seconds)


def listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def main(study: Study, description: str | None, arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--problems", default=",".join(study.problems), help="default: %(default)s")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, help="of every problem (default: its own)")
    parser.add_argument("--grid-steps", type=int, help="of every run of the search (default: by problem)")
    parser.add_argument(
        "--merge", type=Path, nargs="*", default=[], metavar="FILE", help="JSON of other processes: not run again"
    )
    options = parser.parse_args(arguments)
    names, problems = options.problems.split(","), {}
    for name in names:
        if name not in study.problems:
            parser.error(f"--problems: expected some of {', '.join(study.problems)}, got {name!r}")
        problem = study.problems[name]
        problems[name] = replace(
            problem,
            epochs=options.epochs or problem.epochs,
            grid_steps=options.grid_steps or problem.grid_steps,
        )
    conditions: dict[str, object] = {
        **made(),
        "grid": f"learning rates {listed(study.rates)}, constant; dampings {listed(study.dampings)}",
        "all": f"momentum {MOMENTUM:g} (but Adam); kl_clip {KL_CLIP:g}",
        "seeds": f"{options.seeds}; mean ± deviation",
    }
    planned = {
        (name, contender): options.seeds * problem.steps + problem.grid_steps * len(study.settings(contender))
        for name, problem in problems.items()
        for contender in study.contenders
    }
    comparison = Comparison(options.out / f"{study.name}.json", options.merge, conditions, planned)
    for name, problem in problems.items():
        compare(study, comparison, name, problem, options.seeds)
        comparison.write()
        print(study.report(problems, comparison.used, conditions, options.out), flush=True)
