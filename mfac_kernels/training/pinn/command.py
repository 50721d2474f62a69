"""``mfac-kernels pinn``: equations in, a report of errors against the clock out."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from mfac_kernels.training._arguments import count, names, non_negative_float, positive_float, positive_int
from mfac_kernels.training.pinn.equations import EQUATIONS
from mfac_kernels.training.pinn.methods import METHODS
from mfac_kernels.training.pinn.report import format_errors, write_pinn_report
from mfac_kernels.training.pinn.runs import Comparison, Run
from mfac_kernels.training.progress import bar

__all__ = ["EXAMPLES", "add_arguments", "compare", "pinn"]

EXAMPLES = """\
examples:
  mfac-kernels pinn                                    Poisson in 2 dimensions: eight methods, 10 s each
  mfac-kernels pinn --equation heat --budget 60 --seeds 3
  mfac-kernels pinn --methods 'adam,kfac*,engd' --search 0 --out runs/quick
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``mfac-kernels pinn``."""
    parser.add_argument(
        "--equation",
        type=names("equation", list(EQUATIONS)),
        default=["poisson-2d"],
        metavar="NAME[,NAME]",
        help=f"of {', '.join(EQUATIONS)} (default: poisson-2d)",
    )
    parser.add_argument(
        "--methods",
        type=names("method", list(METHODS)),
        default=list(METHODS),
        metavar="NAME[,NAME]",
        help=f"of {', '.join(METHODS)} (default: all)",
    )
    parser.add_argument(
        "--budget",
        type=positive_float,
        default=10.0,
        metavar="SECONDS",
        help="of each run, evaluation excluded (%(default)s)",
    )
    parser.add_argument(
        "--search",
        type=non_negative_float,
        default=2.0,
        metavar="SECONDS",
        help="of each run of the search for a method's setting (default: %(default)s; 0: none, take the grid's middle)",
    )
    parser.add_argument("--seeds", type=positive_int, default=1, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--redraw", type=count, default=0, metavar="N", help="steps until there are new points (default: never)"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/pinn"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--threads", type=positive_int, metavar="N", help="CPU threads for torch")


def pinn(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    return compare(arguments, {"torch": f"{torch.__version__}, {torch.get_num_threads()} threads"})


def compare(arguments: argparse.Namespace, conditions: dict[str, Any]) -> int:
    """The same, with conditions that the report tells beside its own."""
    comparison = Comparison(
        arguments.out,
        arguments.equation,
        arguments.methods,
        budget=arguments.budget,
        search=arguments.search,
        seeds=arguments.seeds,
        redraw=arguments.redraw or None,
        conditions=conditions
        | {
            "budget": f"{arguments.budget:g} s a run, evaluation excluded; float64",
            "momentum": "0.9 of SGD, K-FAC and SPRING; factor_decay 0.5; L-BFGS: history 50, strong Wolfe",
            "settings": _settings(arguments.search),
            "seeds": f"{arguments.seeds}, geometric means; a seed is its own network and points",
            "points": f"new after {arguments.redraw} steps" if arguments.redraw else "the same in all steps of a run",
        },
    )
    arguments.out.mkdir(parents=True, exist_ok=True)  # before the work, not after it
    with _Bar(comparison.planned) as shown:
        runs = comparison.go(shown.begin, shown.progress)
    for name in arguments.equation:
        print(f"\n{EQUATIONS[name].title}\n\n{format_errors(name, runs)}")
    print()
    for path in write_pinn_report(runs, comparison.conditions, arguments.out):
        print(f"wrote {path}")
    return 0


class _Bar:
    """The seconds of all runs."""

    def __init__(self, total: float) -> None:
        self._bar: Any = bar(total=total, unit="s")
        self._done, self._run = 0.0, 0.0

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def begin(self, run: Run) -> None:
        self._done += self._run
        self._run = run.budget
        what = "search" if run.searching else f"seed {run.seed}"
        self._bar.set_description_str(f"{run.equation}, {METHODS[run.method].label}, {what}", refresh=False)

    def progress(self, seconds: float, error: float) -> None:
        self._bar.set_postfix_str(f"error {error:.1e}", refresh=False)
        self._bar.update(self._done + min(seconds, self._run) - self._bar.n)


def _settings(search: float) -> str:
    if search:
        return f"one a method, of a grid of four, by the error after {search:g} s with the first seed"
    return "the middle of each method's grid"
