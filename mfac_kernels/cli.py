"""The command line: ``mfac-kernels info | train | prune | pinn | bench``.

Exit codes: 0 done; 1 it could not be done, with one line on stderr that says why; 2 wrong usage;
130 interrupted. ``bench`` hands on pytest's exit code.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from mfac_kernels import training
from mfac_kernels.training import datasets, pruning_command
from mfac_kernels.training._arguments import names, positive_float, positive_int
from mfac_kernels.training.pinn import command as pinn_command

__all__ = ["main"]

_DEFAULT_DATA = "cifar10"
_FALLBACK_DATA = "digits"
_DEFAULT_BUDGET = 300.0
_DEFAULT_MODELS = {
    "cifar10": "resnet20",
    "mnist": "cnn",
    "fashion-mnist": "cnn",
    "digits": "mlp",
}

_EXAMPLES = """\
examples:
  mfac-kernels info                                    what this build can do
  mfac-kernels train                                   SGD, Adam, M-FAC, K-FAC, two-level K-FAC on CIFAR-10
  mfac-kernels train --data digits --steps 300         no network needed
  mfac-kernels train --help
"""
_TRAIN_EXAMPLES = """\
examples:
  mfac-kernels train --budget 600 --out runs/demo      ten minutes on CIFAR-10
  mfac-kernels train --data cifar10 --data-dir ~/data  a folder in torchvision's layout
  mfac-kernels train --optimizers mfac --steps 1000    M-FAC alone, 1000 steps
  mfac-kernels train --grid --out runs/grid            the search the default settings come from
"""
_BENCH_EXAMPLES = """\
examples:
  mfac-kernels bench                                   every benchmark
  mfac-kernels bench -- -k window                      what follows -- goes to pytest
"""


class _UserError(RuntimeError):
    """Something the user asked for cannot be done; the message says why."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line on ``argv`` (default: the process's) and return the exit code."""
    arguments = _parser().parse_args(argv)
    command: Callable[[argparse.Namespace], int] = arguments.command
    try:
        return command(arguments)
    except KeyboardInterrupt:
        print("mfac-kernels: interrupted", file=sys.stderr)
        return 130
    except (
        _UserError,
        datasets.DatasetUnavailable,
        datasets.MissingDependency,
        ImportError,
        OSError,
        ValueError,
    ) as error:
        print(f"mfac-kernels: error: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mfac-kernels",
        description="Compiled kernels for second-order information of neural networks.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    info = commands.add_parser("info", help="show how the package was built and what it uses here")
    info.add_argument("--json", action="store_true", help="print JSON")
    info.set_defaults(command=_info)

    train = commands.add_parser(
        "train",
        help="train a network with several optimizers side by side and report",
        description="Train one network with each optimizer: same initial weights, same batches, "
        "same number of steps. Prints a table and writes results.json, report.md and curves.png.",
        epilog=_TRAIN_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train.add_argument(
        "--data",
        choices=datasets.NAMES,
        help=f"dataset (default: {_DEFAULT_DATA}, or {_FALLBACK_DATA} if that cannot be had)",
    )
    train.add_argument("--data-dir", type=Path, metavar="DIR", help="folder with the dataset")
    train.add_argument(
        "--fallback",
        action="store_true",
        help=f"run on {_FALLBACK_DATA} if the dataset asked for cannot be had",
    )
    train.add_argument("--model", choices=tuple(training.MODELS), help="network (default: by dataset)")
    train.add_argument(
        "--optimizers",
        type=names("optimizer", training.CHOSEN),
        default=list(training.CHOSEN),
        metavar="NAME[,NAME]",
        help=f"from {', '.join(training.CHOSEN)} (default: all)",
    )
    length = train.add_mutually_exclusive_group()
    length.add_argument(
        "--budget",
        type=positive_float,
        metavar="SECONDS",
        help="time for all runs, evaluation included; the number of steps follows from the "
        f"measured time of a step (default: {_DEFAULT_BUDGET:g})",
    )
    length.add_argument("--steps", type=positive_int, metavar="N", help="steps of each run")
    train.add_argument(
        "--grid",
        action="store_true",
        help="run the grid of settings that the defaults come from and write grid.json and "
        f"grid.md instead ({training.GRID_STEPS} steps each unless told)",
    )
    train.add_argument(
        "--out",
        type=Path,
        default=Path("runs/train"),
        metavar="DIR",
        help="folder for what is written (default: %(default)s)",
    )
    train.add_argument("--batch-size", type=positive_int, default=128, metavar="N", help="default: %(default)s")
    train.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    train.add_argument("--threads", type=positive_int, metavar="N", help="CPU threads for torch")
    train.add_argument("--device", default="cpu", metavar="DEVICE", help="cpu or cuda (default: %(default)s)")
    train.set_defaults(command=_train)

    prune = commands.add_parser(
        "prune",
        help="prune a network with several methods and report accuracy against sparsity",
        description="Prune one network to several sparsities, by magnitude and by the optimal brain surgeon on Fishers "
        "of several kinds. Prints a table and writes pruning.json, pruning.md and pruning.png.",
        epilog=pruning_command.EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    pruning_command.add_arguments(prune)
    prune.set_defaults(command=pruning_command.prune)

    pinn = commands.add_parser(
        "pinn",
        help="solve an equation with a network, by several optimizers, and report errors against time",
        description="Train a physics-informed network with each method for the same seconds. Prints a table and writes "
        "pinn.json, pinn.md and pinn.png.",
        epilog=pinn_command.EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    pinn_command.add_arguments(pinn)
    pinn.set_defaults(command=pinn_command.pinn)

    bench = commands.add_parser(
        "bench",
        help="run the benchmarks of a source checkout",
        epilog=_BENCH_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    bench.add_argument("pytest_arguments", nargs="*", metavar="ARG", help="handed to pytest")
    bench.set_defaults(command=_bench)
    return parser


def _info(arguments: argparse.Namespace) -> int:
    from mfac_kernels import build_info

    info = build_info()
    if arguments.json:
        print(json.dumps(info, indent=2, default=str))
        return 0
    width = max(map(len, info))
    for name, value in info.items():
        shown = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
        print(f"{name:{width}}  {shown}")
    return 0


def _train(arguments: argparse.Namespace) -> int:
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        raise _UserError(f"--device {arguments.device}: this torch finds no CUDA device")
    try:
        torch.zeros((), device=arguments.device).item()
    except (RuntimeError, AssertionError) as error:
        raise _UserError(f"--device {arguments.device}: {str(error).splitlines()[0]}") from error
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    # Before the training, not after it: a folder that cannot be written to.
    arguments.out.mkdir(parents=True, exist_ok=True)
    data = _load_data(arguments)
    model = arguments.model or _DEFAULT_MODELS[data.name]
    print(f"data: {data.name}, {len(data.train_images)} training images ({data.source})")

    names: list[str] = arguments.optimizers
    if arguments.grid:
        configs = [config for name in names for config in training.GRID[name]]
    else:
        configs = [training.CHOSEN[name] for name in names]
    budget, steps = arguments.budget, arguments.steps
    if budget is None and steps is None:
        if arguments.grid:
            steps = training.GRID_STEPS
        else:
            budget = _DEFAULT_BUDGET
    if budget is not None:
        print(f"measuring the time of a step, to fill {budget:g} s")
    comparison = training.compare(
        data,
        model,
        configs,
        steps=steps,
        budget=budget,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        evaluations=1 if arguments.grid else training.EVALUATIONS,
        device=arguments.device,
        progress=True,
    )
    print(f"\n{training.format_table(comparison, settings=arguments.grid)}\n")
    write = training.write_grid if arguments.grid else training.write_report
    for path in write(comparison, arguments.out):
        print(f"wrote {path}")
    return 0


def _load_data(arguments: argparse.Namespace) -> datasets.Dataset:
    name = arguments.data or _DEFAULT_DATA
    print(f"loading {name}", flush=True)  # the first time it may be a long download
    try:
        return datasets.load(name, arguments.data_dir)
    except datasets.DatasetUnavailable as error:
        by_default = arguments.data is None and arguments.data_dir is None
        if not by_default and not arguments.fallback:
            raise
        print(
            f"mfac-kernels: {error}\nmfac-kernels: {name} cannot be had: running on {_FALLBACK_DATA} instead",
            file=sys.stderr,
        )
        data = datasets.load(_FALLBACK_DATA)
        return dataclasses.replace(data, source=f"{data.source}; in place of {name}, which could not be had")


def _bench(arguments: argparse.Namespace) -> int:
    for folder in (Path.cwd() / "benchmarks", Path(__file__).parents[1] / "benchmarks"):
        if any(folder.glob("bench_*.py")):
            break
    else:
        raise _UserError(
            "no benchmarks folder here: the benchmarks are part of the source repository, not of "
            "the installed package; run this from the root of a checkout"
        )
    for module in ("pytest", "pytest_benchmark"):
        if importlib.util.find_spec(module) is None:
            raise _UserError(f'{module} is not installed: pip install "mfac_kernels[test]"')
    command = [sys.executable, "-m", "pytest", "-o", "python_files=bench_*.py", str(folder)]
    return subprocess.run([*command, *arguments.pytest_arguments], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
