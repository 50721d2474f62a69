"""What one call costs where there is next to nothing to compute, beside torch's own: wrapper, op, torch.

python benchmarks/calls.py [DIR]      writes DIR/calls.md (default: benchmarks/results/cpu)

CPU time of one thread, in turns, the best of many short samples.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from provenance import made

from mfac_kernels import ops

ROUNDS, CALLS = 500, 30  # samples; calls of a sample
_ops = torch.ops.mfac_kernels

Call = Callable[[], object]


def cases() -> dict[str, tuple[Call, Call, str, Call]]:
    """What it is: the function, its op alone, what torch is asked for, torch."""
    x = torch.randn(1, 4, 8)
    a, damping = x @ x.mT + torch.eye(4), 0.1
    window, v, g = torch.randn(8, 64), torch.randn(1, 64), torch.randn(4, 64)
    rows, factor = torch.randn(16, 8), torch.zeros(8, 8)
    return {
        "cholesky_inverse_ex, 1 x 4 x 4": (
            lambda: ops.cholesky_inverse_ex(a, damping),
            lambda: _ops.cholesky_inverse_ex(a, damping),
            "cholesky_ex, cholesky_inverse",
            lambda: torch.cholesky_inverse(torch.linalg.cholesky_ex(a)[0]),
        ),
        "cholesky_factor_ex": (
            lambda: ops.cholesky_factor_ex(a, damping),
            lambda: _ops.cholesky_factor_ex(a, damping),
            "cholesky_ex",
            lambda: torch.linalg.cholesky_ex(a),
        ),
        "cholesky_factor": (
            lambda: ops.cholesky_factor(a, damping),
            lambda: _ops.cholesky_factor_ex(a, damping),
            "cholesky",
            lambda: torch.linalg.cholesky(a),
        ),
        "window_dots, 8 x 64, one vector": (
            lambda: ops.window_dots(window, v),
            lambda: _ops.window_dots(window, v),
            "mm",
            lambda: torch.mm(v, window.mT),
        ),
        "gram, 4 x 64": (lambda: ops.gram(g), lambda: _ops.gram(g, False), "mm", lambda: torch.mm(g, g.mT)),
        "linear_factor_, 16 x 8": (
            lambda: ops.linear_factor_(factor, rows, beta=0.9, alpha=0.1),
            lambda: _ops.linear_factor_(factor, rows, None, False, 0.9, 0.1, None),
            "addmm_",
            lambda: factor.addmm_(rows.mT, rows, beta=0.9, alpha=0.1),
        ),
        "an op without tensors": (
            lambda: _ops.cpu_capability(-1),
            lambda: _ops.cpu_capability(-1),
            "nothing",
            lambda: None,
        ),
    }


def sample(call: Call) -> float:
    """Microseconds of one call."""
    begin = time.process_time()
    for _ in range(CALLS):
        call()
    return (time.process_time() - begin) / CALLS * 1e6


def main(directory: str = "benchmarks/results/cpu") -> None:
    torch.set_num_threads(1)
    found = cases()
    calls = [call for function, op, _, other in found.values() for call in (function, op, other)]
    best = [min(sample(call) for _ in range(10)) for call in calls]
    for _ in range(ROUNDS):
        best = [min(seconds, sample(call)) for seconds, call in zip(best, calls, strict=True)]
    lines = ["# Calls", "", *(f"- {name}: {value}" for name, value in made().items()), ""]
    lines += ["Microseconds of CPU time.", "", "| call | function | its op alone | torch | |", "|---|---|---|---|---|"]
    for i, (name, (_, _, other, _)) in enumerate(found.items()):
        function, op, torchs = best[3 * i : 3 * i + 3]
        lines.append(f"| {name} | {function:.1f} | {op:.1f} | {torchs:.1f} | {other} |")
    Path(directory, "calls.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
