"""Time and peak memory of one OBS step (build the Fisher, scores, update) at d = 272 thousand and 25.6 million.

    python benchmarks/pruning_cost.py --out benchmarks/results/cpu

Random gradients, half of the weights dropped. Contenders: ours with the paper's update and with the joint one; the same
as the first in plain torch (Gram matrix, Cholesky, triangular solve; for blocks of b <= m their inverses); the paper's
recursion. Each is a process of its own. Memory is the peak above the gradients. What would take more than --memory GiB
in all, or more than --seconds by the bytes that it moves, is not measured. Writes pruning_cost.md and .json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from peak_memory import watch
from provenance import commit
from torch import Tensor

import mfac_kernels as mk

DAMPING = 1e-5
CONTENDERS = ("ours", "ours, joint", "plain torch", "recursion")
CASES = [
    *((272_000, m, block, "float32") for m in (64, 256, 1024) for block in (128, 2000, None)),
    *((25_600_000, m, block, "bfloat16") for m in (64, 128) for block in (128, 2000, None)),
]
BANDWIDTH = 8e9  # bytes per second of one pass, to tell what is hopeless


def blocks_of(g: Tensor, size: int) -> Tensor:
    """(m, d) -> (blocks, m, size) float32, zero-padded."""
    m, d = g.shape
    padded = torch.nn.functional.pad(g, (0, -d % size)).float()
    return padded.view(m, -1, size).transpose(0, 1)


def step(w: Tensor, diagonal: Tensor, product: Callable[[Tensor], Tensor]) -> Tensor:
    """The paper's: drop the cheaper half, add the single updates."""
    rho = w.square() / (2 * diagonal)
    dropped = rho.argsort()[: len(w) // 2]
    z = torch.zeros_like(w)
    z[dropped] = -w[dropped] / diagonal[dropped]
    new = w + product(z)
    new[dropped] = 0
    return new


def plain(g: Tensor, w: Tensor, block: int | None) -> Tensor:
    m, d = g.shape
    size = block or d
    if size <= m:
        gb = blocks_of(g, size)
        fisher = gb.mT @ gb / m
        fisher.diagonal(dim1=1, dim2=2).add_(DAMPING)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(fisher))

        def product(z: Tensor) -> Tensor:
            return (inverse @ blocks_of(z[None], size).mT)[:, :, 0].reshape(-1)[:d]

        return step(w, inverse.diagonal(dim1=1, dim2=2).reshape(-1)[:d], product)
    diagonal = torch.empty(d)
    lowers = []
    for a in range(0, d, size):
        part = g[:, a : a + size].float()
        gram = (part @ part.mT).double()
        gram.diagonal().add_(m * DAMPING)
        lowers.append(torch.linalg.cholesky(gram))
        white = torch.linalg.solve_triangular(lowers[-1].float(), part, upper=False)
        diagonal[a : a + size] = (1 - white.square().sum(0)) / DAMPING

    def product(z: Tensor) -> Tensor:
        out = torch.empty_like(z)
        for lower, a in zip(lowers, range(0, d, size), strict=True):
            part, x = g[:, a : a + size].float(), z[a : a + size]
            weights = torch.cholesky_solve((part @ x).double()[:, None], lower)[:, 0].float()
            out[a : a + size] = (x - weights @ part) / DAMPING
        return out

    return step(w, diagonal, product)


def recursion(g: Tensor, w: Tensor, block: int | None) -> Tensor:
    m, d = g.shape
    gb = blocks_of(g, block or d)
    v, q = torch.zeros_like(gb), gb.new_zeros(len(gb), m)
    for i in range(m):
        gi = gb[:, i, :, None]
        dots = (v[:, :i] @ gi)[:, :, 0] / q[:, :i]
        v[:, i] = gi[:, :, 0] / DAMPING - (dots[:, None] @ v[:, :i])[:, 0]
        q[:, i] = m + (gi[:, :, 0] * v[:, i]).sum(1)

    def product(z: Tensor) -> Tensor:
        x = blocks_of(z[None], block or d)[:, 0]
        weights = (v @ x[:, :, None])[:, :, 0] / q
        return (x / DAMPING - (weights[:, None] @ v)[:, 0]).reshape(-1)[:d]

    diagonal = (1 / DAMPING - (v.square() / q[:, :, None]).sum(1)).reshape(-1)[:d]
    return step(w, diagonal, product)


BASELINES = {"plain torch": plain, "recursion": recursion}


def verify() -> None:
    """Contenders agree with ours where all are quick."""
    torch.manual_seed(0)
    g, w = torch.randn(32, 1000) / 1000**0.5, torch.randn(1000)
    for block in (16, 100, None):
        want, _ = mk.pruning.obs_prune(w, mk.StaticFisher(g, DAMPING, block_size=block), 0.5)
        for name, baseline in BASELINES.items():
            error = float((baseline(g, w, block) - want).norm() / want.norm())
            assert error < 1e-3, (name, block, error)


def run(contender: str, d: int, m: int, block: int | None, dtype: str, threads: int) -> dict[str, float]:
    """In a process of its own."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    g = torch.empty(m, d, dtype=getattr(torch, dtype))
    for row in g:
        row.normal_(std=d**-0.5)
    w = torch.randn(d)
    taken = watch()
    started = time.perf_counter()
    if contender.startswith("ours"):
        fisher = mk.StaticFisher(g, DAMPING, block_size=block)
        built = time.perf_counter()
        mk.pruning.obs_prune(w, fisher, 0.5, joint=contender.endswith("joint"))
    else:
        BASELINES[contender](g, w, block)
        built = started
    return {
        "seconds": time.perf_counter() - started,
        "build": built - started,
        "gigabytes": taken() / 1e9,
    }


def refused(contender: str, d: int, m: int, block: int | None, dtype: str, limits: argparse.Namespace) -> str:
    """Why a case is not measured, or nothing."""
    size = min(block or d, d)
    held = m * d * (2 if dtype == "bfloat16" else 4)
    extra = 10 * 4 * d  # weights, scores, order and the like
    if contender == "recursion":
        extra += 8 * m * d
    elif size <= m:
        extra += (4 if contender.startswith("ours") else 12) * d * size + (4 * m * d if contender[0] == "p" else 0)
    else:
        matrices = {"ours": 1, "ours, joint": 3, "plain torch": 2}[contender]
        extra += 8 * matrices * m * m * -(-d // size) + (12 * m * size if contender[0] == "p" else 0)
    if held + extra > limits.memory * 2**30:
        return f"needs {(held + extra) / 1e9:.0f} GB"
    if contender == "recursion" and (seconds := m * m * d * 4 / BANDWIDTH) > limits.seconds:
        return f"moves {seconds * BANDWIDTH / 1e12:.1f} TB"
    if contender == "plain torch" and size > m and d // size > 100_000:
        return "a loop over blocks"
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cpu"))
    parser.add_argument("--memory", type=float, default=8.0, help="GiB (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=60.0, help="for one case (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="at the smaller d; the fastest counts")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(run(*json.loads(arguments.case), arguments.threads)))
        return
    verify()
    rows = []
    for d, m, block, dtype in CASES:
        row: dict[str, object] = {"d": d, "m": m, "block": block, "dtype": dtype}
        for contender in CONTENDERS:
            if reason := refused(contender, d, m, block, dtype, arguments):
                row[contender] = reason
                continue
            case = json.dumps([contender, d, m, block, dtype])
            command = [sys.executable, __file__, "--case", case, "--threads", str(arguments.threads)]
            times = range(arguments.repeats if d < 1_000_000 else 1)
            runs = [json.loads(subprocess.run(command, capture_output=True, check=True).stdout) for _ in times]
            row[contender] = min(runs, key=lambda r: r["seconds"])
            print(d, m, block, contender, row[contender], flush=True)
        rows.append(row)
        write(rows, arguments)  # after every row: what is there is there


def write(rows: list[dict[str, object]], arguments: argparse.Namespace) -> None:
    conditions = {
        "date": date.today().isoformat(),
        "commit": commit(),
        "torch": torch.__version__,
        "threads": arguments.threads,
        "repeats": f"{arguments.repeats} at the smaller d, 1 at the larger; the fastest counts",
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    content = {"conditions": conditions, "rows": rows}
    (arguments.out / "pruning_cost.json").write_text(json.dumps(content, indent=1) + "\n")
    lines = ["# Cost of one OBS step", "", "Seconds (peak memory above the gradients in GB); ours: build included.", ""]
    lines += [f"| d | m | block | gradients | {' | '.join(CONTENDERS)} |", "|---" * (4 + len(CONTENDERS)) + "|"]
    for row in rows:
        cells = [f"{row['d']:,}", row["m"], row["block"] or "full", row["dtype"]]
        for contender in CONTENDERS:
            result = row[contender]
            measured = isinstance(result, dict)
            cells.append(
                f"{result['seconds']:.2f} ({result['gigabytes']:.2f})" if measured else f"not measured: {result}"
            )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += ["", *(f"- {key}: {value}" for key, value in conditions.items()), ""]
    (arguments.out / "pruning_cost.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
