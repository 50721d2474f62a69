"""Errors of physics-informed networks against the clock (after Dangel et al. 2024), on one core: `make paper-pinn`.

    SGD, Adam, L-BFGS, implicit SGD, K-FAC, K-FAC*, SPRING, ENGD

Four equations, 3 seeds, the same seconds for every run; about 30 minutes, to be run alone. Each method's setting is the
best of its grid by the error after fewer seconds on one seed. Written to --out after every run: pinn.json; a
run that is in it is not repeated. At the end: pinn.md, pinn.png. Equations can be run apart, and merged:

    paper_pinn.py --equation heat --out runs/heat
    paper_pinn.py --merge runs/heat runs/rest --out benchmarks/results
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from provenance import made

from mfac_kernels.training.pinn import command
from mfac_kernels.training.pinn.equations import EQUATIONS
from mfac_kernels.training.pinn.report import write_pinn_report
from mfac_kernels.training.pinn.runs import read_runs


def merge(folders: list[Path], out: Path) -> None:
    """The report of several folders' runs, made on the same conditions but for the day."""
    every = [json.loads((folder / "pinn.json").read_text())["conditions"] for folder in folders]
    for folder, conditions in zip(folders, every, strict=True):
        if conditions | {"date": ""} != every[0] | {"date": ""}:
            raise SystemExit(f"{folder}: expected the conditions {every[0]}, got {conditions}")
    write_pinn_report([run for folder in folders for run in read_runs(folder / "pinn.json")], every[0], out)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_arguments(parser)
    parser.add_argument("--merge", type=Path, nargs="+", metavar="DIR", help="run nothing; report what is there")
    parser.set_defaults(
        equation=list(EQUATIONS), budget=14.0, search=3.0, seeds=3, threads=1, out=Path("benchmarks/results")
    )
    options = parser.parse_args(arguments)
    if options.merge:
        merge(options.merge, options.out)
    else:
        torch.set_num_threads(options.threads)
        command.compare(options, dict(made()))


if __name__ == "__main__":
    main()
