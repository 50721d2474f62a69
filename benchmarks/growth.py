"""How the time of each kernel grows with its size: the exponent, measured beside the one that its count says.

python benchmarks/growth.py [DIR]      writes DIR/growth.md (default: benchmarks/results/cpu)

Three sizes each, in turns; the exponent is the slope of log time over log size. Sizes are past the caches or within
them together, so that the memory is the same for all of a row.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from provenance import made

import mfac_kernels as mk
from mfac_kernels import ops

ROUNDS, SHORTEST = 9, 2e-2  # samples of a size; seconds of a sample, in several calls where one is shorter


def window_step(m: int, d: int) -> Callable[[], object]:
    window, g = mk.FisherWindow(d, m, damping=1e-5), torch.randn(d)
    for _ in range(m):
        window.update(torch.randn(d))
    return lambda: window.update_ihvp(g)


def inversion(batch: int, n: int) -> Callable[[], object]:
    x = torch.randn(batch, 2 * n, n)
    blocks = x.mT @ x / (2 * n)
    out = torch.empty_like(blocks)
    return lambda: ops.cholesky_inverse_ex(blocks, 1e-2, out=out)


def linear_factor(rows: int, d: int) -> Callable[[], object]:
    x, factor = torch.randn(rows, d), torch.zeros(d, d)
    return lambda: ops.linear_factor_(factor, x, beta=0.95, alpha=0.05)


def conv_factor(samples: int, channels: int) -> Callable[[], object]:
    x, state = torch.randn(samples, channels, 16, 16), torch.zeros(ops.conv2d_lags_size(channels, 3, padding=1))
    return lambda: ops.conv2d_lags_(state, x, 3, padding=1, beta=0.95, alpha=0.05)


@dataclass
class Case:
    title: str
    grows: str
    exponent: float  # of the count
    sizes: list[int]
    make: Callable[[int], Callable[[], object]]


CASES = [
    Case("window step, m = 256", "d", 1, [250_000, 500_000, 1_000_000], lambda d: window_step(256, d)),
    Case("window step, d = 500,000", "m", 1, [128, 256, 512], lambda m: window_step(m, 500_000)),
    Case("m x m core (a window step, d = 16)", "m", 2, [512, 1024, 2048], lambda m: window_step(m, 16)),
    Case("batched inverse, n = 64", "blocks", 1, [512, 1024, 2048], lambda batch: inversion(batch, 64)),
    Case("batched inverse, 8 blocks", "n", 3, [256, 512, 1024], lambda n: inversion(8, n)),
    Case("linear factor, D = 256", "rows", 1, [8192, 16384, 32768], lambda rows: linear_factor(rows, 256)),
    Case("linear factor, 4096 rows", "D", 2, [512, 1024, 2048], lambda d: linear_factor(4096, d)),
    Case("3 x 3 factor by lags, C = 64, 16 x 16", "samples", 1, [32, 64, 128], lambda n: conv_factor(n, 64)),
]


def seconds_of(call: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def measure(case: Case) -> tuple[list[float], float]:
    """Median seconds of each size, and the exponent."""
    calls = [case.make(size) for size in case.sizes]
    repeats = [max(1, math.ceil(SHORTEST / seconds_of(call, 2))) for call in calls]
    samples: list[list[float]] = [[] for _ in calls]
    for _ in range(ROUNDS):
        for own, call, times in zip(samples, calls, repeats, strict=True):
            own.append(seconds_of(call, times))
    medians = [statistics.median(own) for own in samples]
    slope = statistics.linear_regression([math.log(s) for s in case.sizes], [math.log(s) for s in medians]).slope
    return medians, slope


def main() -> None:
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "benchmarks/results/cpu")
    lines = ["# Growth", "", *(f"- {key}: {value}" for key, value in made().items()), ""]
    lines += ["| kernel | grows | sizes | ms | exponent | of the count |", "|---|---|---|---|---|---|"]
    for case in CASES:
        medians, slope = measure(case)
        sizes, ms = ", ".join(f"{s:,}" for s in case.sizes), ", ".join(f"{1e3 * s:.2f}" for s in medians)
        lines.append(f"| {case.title} | {case.grows} | {sizes} | {ms} | {slope:.2f} | {case.exponent:g} |")
        print(lines[-1], flush=True)
    (out / "growth.md").write_text("\n".join([*lines, ""]))


if __name__ == "__main__":
    main()
