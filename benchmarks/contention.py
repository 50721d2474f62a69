"""Short calls on two threads beside a process that keeps one of the two cores busy.

python benchmarks/contention.py
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch

from mfac_kernels import ops

CALLS = 400


def spread(call: Callable[[], object]) -> str:
    for _ in range(20):
        call()
    times = []
    for _ in range(CALLS):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    cuts = statistics.quantiles(times, n=100)
    return f"{cuts[49]:.2f} | {cuts[89]:.2f} | {cuts[98]:.2f}"


def main() -> None:
    rows, factor, square = torch.randn(2048, 128), torch.zeros(128, 128), torch.randn(320, 320)
    blocks = torch.eye(32).expand(256, 32, 32).contiguous()
    calls: dict[str, Callable[[], object]] = {
        "linear_factor_, 2048 x 128": lambda: ops.linear_factor_(factor, rows, beta=0.9, alpha=0.1),
        "cholesky_inverse_ex, 256 x 32 x 32": lambda: ops.cholesky_inverse_ex(blocks, 0.1),
        "torch.mm, 320 x 320": lambda: torch.mm(square, square),
    }

    def show(beside: str, threads: int) -> None:
        torch.set_num_threads(threads)
        for name, call in calls.items():
            print(f"| {beside} | {threads} | {name} | {spread(call)} |")

    print("| beside | threads | call | median, ms | 90% | 99% |\n|---|---|---|---|---|---|")
    cores = sorted(os.sched_getaffinity(0))[:2]
    os.sched_setaffinity(0, cores)
    show("nothing", 2)
    keep_busy = f"import os\nos.sched_setaffinity(0, {cores[1:]})\nwhile True: pass"
    busy = subprocess.Popen([sys.executable, "-c", keep_busy])
    try:
        time.sleep(0.5)
        show("a busy process", 2)
        show("a busy process", 1)
    finally:
        busy.kill()


if __name__ == "__main__":
    main()
