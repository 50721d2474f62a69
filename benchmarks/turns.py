"""Two builds of the kernels beside each other, for machines on which no two minutes are alike.

python benchmarks/turns.py OLD NEW [--seconds 2] [--only TEXT] [--out FILE]

OLD and NEW are source trees whose extensions are built. Each runs in a process of its own on one thread, and they are
called in turns, a call at a time: CPU time, medians and the best, the ratio of each call to that of the other build
next to it, and the share of what registers can do (ceilings.py, measured in turns with them).
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

Case = tuple[Callable[[], object], float]  # a call, its flops, or 0 where memory is the bound


def cases() -> dict[str, Callable[[], Case]]:
    import torch

    from mfac_kernels import ops

    def spd(op: Callable[..., object], flops: float, n: int, count: int) -> Callable[[], Case]:
        def made() -> Case:
            x = torch.randn(count, n, n)
            blocks, out = x @ x.mT / n + torch.eye(n), torch.empty(count, n, n)
            return lambda: op(blocks, 0.1, out=out), count * n**3 * flops

        return made

    def linear(rows: int, d: int) -> Callable[[], Case]:
        def made() -> Case:
            x, factor = torch.randn(rows, d), torch.zeros(d, d)
            return lambda: ops.linear_factor_(factor, x, beta=0.9, alpha=0.1), rows * d * (d + 1)

        return made

    def channels(n: int, c: int, side: int) -> Callable[[], Case]:
        def made() -> Case:
            x, factor = torch.randn(n, c, side, side), torch.zeros(c, c)
            return lambda: ops.conv2d_factor_(factor, x, 1, beta=0.9, alpha=0.1), n * side**2 * c * (c + 1)

        return made

    def conv(n: int, c: int, side: int, algorithm: str) -> Callable[[], Case]:
        def made() -> Case:
            x, state = torch.randn(n, c, side, side), torch.zeros(ops.conv2d_lags_size(c, 3, padding=1))
            call = lambda: ops.conv2d_lags_(state, x, 3, padding=1, beta=0.9, alpha=0.1, algorithm=algorithm)  # noqa: E731
            return call, n * side**2 * 9 * c * (9 * c + 1)

        return made

    def gram(m: int, d: int) -> Callable[[], Case]:
        def made() -> Case:
            g = torch.randn(m, d)
            return lambda: ops.gram(g), m * (m + 1) * d

        return made

    def window(m: int, d: int, dtype: torch.dtype, combine: bool) -> Callable[[], Case]:
        def made() -> Case:
            g = torch.randn(m, d).to(dtype)
            c, x = torch.randn(1, 1, m, dtype=torch.float64), torch.randn(1, d)
            return (lambda: ops.window_combine(g, c)) if combine else (lambda: ops.window_dots(g, x)), 0

        return made

    found = {f"inverse {count} x {n}": spd(ops.cholesky_inverse_ex, 1, n, count) for n, count in INVERSES}
    found |= {f"factor {count} x {n}": spd(ops.cholesky_factor_ex, 1 / 3, n, count) for n, count in FACTORS}
    found |= {f"linear factor {rows} x {d}": linear(rows, d) for rows, d in LINEAR}
    found |= {f"channel factor {n} x {c} on {s} x {s}": channels(n, c, s) for n, c, s in CHANNELS}
    found |= {f"compressed 3 x 3, {way}, {n} x {c} on {s} x {s}": conv(n, c, s, way) for way, n, c, s in CONVS}
    found |= {f"Gram matrix {m} x {d}": gram(m, d) for m, d in GRAMS}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        found[f"G x, {name}"] = window(64, WINDOW, dtype, False)
        found[f"G^T c, {name}"] = window(64, WINDOW, dtype, True)
    return found


INVERSES = [(16, 512), (32, 512), (64, 256), (128, 64), (256, 16), (512, 4), (1024, 2), (2048, 1)]
FACTORS = [(64, 256), (256, 16), (1024, 2)]
LINEAR = [(65536, 64), (16384, 256), (4096, 1024), (4096, 2048)]
CHANNELS = [(100, 16, 32), (32, 64, 56), (32, 256, 28), (32, 512, 14), (32, 2048, 7)]
CONVS = [("lags", 100, 128, 4), ("fft", 100, 16, 32), ("fft", 100, 32, 16), ("fft", 100, 64, 8), ("fft", 32, 64, 56)]
GRAMS = [(32, 500_000), (256, 65_520)]
WINDOW = 500_000


def serve() -> None:
    """Answers "case NAME" with its flops and "run" with the seconds of a call."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    known, call = cases(), None
    print(*known, sep="\t", flush=True)
    for line in sys.stdin:
        if line.startswith("case "):
            call, flops = known[line[5:].strip()]()
            call()
            print(flops, flush=True)
        else:
            start = time.process_time()
            call()
            print(time.process_time() - start, flush=True)


class Build:
    def __init__(self, tree: str):
        tree = str(Path(tree).resolve())
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=tree,
            env=os.environ | {"PYTHONPATH": tree, "OMP_NUM_THREADS": "1"},
        )
        self.cases = self._answer().split("\t")

    def _answer(self) -> str:
        return self._process.stdout.readline().strip()

    def ask(self, question: str) -> float:
        self._process.stdin.write(question + "\n")
        self._process.stdin.flush()
        return float(self._answer())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old")
    parser.add_argument("new")
    parser.add_argument("--seconds", type=float, default=2, help="of calls of each case")
    parser.add_argument("--only", default="", help="cases whose names hold it")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    import torch
    from ceilings import flops as peak
    from provenance import commit

    torch.set_num_threads(1)
    old, new = Build(options.old), Build(options.new)
    lines = [
        f"# {commit(options.old)} and {commit(options.new)} in turns",
        "",
        f"One thread, torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}. Medians (best).",
        "",
        "| case | old, ms | new, ms | old / new | share of the multiply-adds, old | new |",
        "|---|---|---|---|---|---|",
    ]
    print(*lines, sep="\n")
    for case in (name for name in new.cases if options.only in name and name in old.cases):
        _, flops = (build.ask(f"case {case}") for build in (old, new))
        times: list[tuple[float, float]] = []
        rates = []
        end = time.monotonic() + options.seconds
        while time.monotonic() < end or len(times) < 5:
            times.append((old.ask("run"), new.ask("run")))
            rates.append(peak(threads=1))
        before, after = zip(*times, strict=True)
        ratio = statistics.median(a / b for a, b in times)
        row = f"| {case} "
        for samples in (before, after):
            row += f"| {statistics.median(samples) * 1e3:.3g} ({min(samples) * 1e3:.3g}) "
        row += f"| {ratio:.2f} "
        for samples in (before, after):
            shares = sorted(flops / seconds / rate for seconds, rate in zip(samples, rates, strict=True))
            best = flops / min(samples) / max(rates)
            row += f"| {statistics.median(shares):.0%} ({best:.0%}) " if flops else "| "
        lines.append(row + "|")
        print(lines[-1], flush=True)
    if options.out:
        options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    serve() if sys.argv[1:] == ["--serve"] else main()
