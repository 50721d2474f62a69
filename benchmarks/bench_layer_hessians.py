"""Layer Hessians, as GPTQ and SparseGPT use them: sums of x x^T, of experts and of whole models, and their factors.

Each result is verified before it is timed. Floors: D (D + 1) flops for each row of an accumulation, 2/3 n^3 for the
factor of an inverse, n^3 / 3 for the inverse of a triangle. MB: the most that a call holds at a time beside its
arguments, its result included: resident memory of a process of its own, or on a GPU what torch's allocator counts.

    python benchmarks/bench_layer_hessians.py --contender "in place" --size 28672
    python benchmarks/bench_layer_hessians.py --out benchmarks/results/cpu/layer_hessians

is such a call, with its error and what it took; and a table of them, calls.md, which takes half an hour.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from ceilings import Bound
from peak_memory import watch
from provenance import made
from torch import Tensor

from mfac_kernels import ops

SIZES = [768, 2048, 4096, 8192]
LARGEST = 28672  # of a layer of Llama 2 70B
TOKENS = 2048  # of one sequence
EXPERTS, ROUTED = 8, 4096


def normal(*shape: int, device: str, seed: int = 0) -> Tensor:
    return torch.randn(*shape, device=device, generator=torch.Generator(device).manual_seed(seed))


def hessian(n: int, device: str, tokens: int | None = None) -> Tensor:
    """Of 2 n tokens, or as many as are given, damped as GPTQ has it."""
    x = normal(tokens or 2 * n, n, device=device)
    h = torch.zeros(n, n, device=device)
    ops.linear_factor_(h, x, alpha=1 / n)
    h.diagonal().add_(0.01 * h.diagonal().mean())
    return h


def three_calls(h: Tensor) -> Tensor:
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)


def one_call(h: Tensor) -> Tensor:
    return ops.cholesky_inverse_factor_ex(h)[0]


def in_place(h: Tensor) -> Tensor:
    return ops.cholesky_inverse_factor_ex(h, out=h)[0]


FACTORS = {"ours": one_call, "in place": in_place, "three calls": three_calls}


def measure(name: str, h: Tensor) -> dict[str, float]:
    """A call of a contender when what is loaded or allocated once is there: MB, seconds, |U^T U H v - v| / |v|.

    Seconds by the clock, and of the CPU, which others on its core take nothing of. The error in float64, a few rows at
    a time; h may be overwritten.
    """
    n, device = len(h), h.device.type
    FACTORS[name](hessian(256, device))
    probe = normal(n, 4, device=device, seed=1).double()
    wanted = torch.cat([rows.double() @ probe for rows in h.split(256)])
    taken = watch(device)
    start, cpu_start = time.perf_counter(), time.process_time()
    u = FACTORS[name](h)
    if device == "cuda":
        torch.cuda.synchronize()
    seconds, cpu_seconds, megabytes = time.perf_counter() - start, time.process_time() - cpu_start, taken() / 1e6
    got = torch.zeros_like(probe)
    for first in range(0, n, 256):
        rows = u[first : first + 256].double()
        got += rows.mT @ (rows @ wanted)
    error = float((got - probe).norm() / probe.norm())
    return {"MB": megabytes, "seconds": seconds, "CPU seconds": cpu_seconds, "error": error}


def alone(name: str, n: int) -> dict[str, float]:
    """:func:`measure` in a process whose allocator keeps nothing that was freed: it would not show."""
    command = [sys.executable, __file__, "--contender", name, "--size", str(n)]
    unkept = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    found: dict[str, float] = json.loads(subprocess.run(command, env=unkept, capture_output=True, check=True).stdout)
    return found


def peaks(n: int, device: str) -> dict[str, float]:
    found = {name: measure(name, hessian(n, device)) if device == "cuda" else alone(name, n) for name in FACTORS}
    return {name: row["MB"] for name, row in found.items()}


def table_of(rows: list[tuple[str, int, dict[str, float]]]) -> str:
    lines = ["# Factors of inverses, a call in a process each", ""]
    lines += [f"- {key}: {value}" for key, value in made().items()]
    lines += ["", "In place: the Hessian's memory is the factor's. Error: |U^T U H v - v| / |v|.", ""]
    lines += ["| n | | CPU seconds | MB beside the Hessian | error |", "|---|---|---|---|---|"]
    for name, n, row in rows:
        lines.append(f"| {n:,} | {name} | {row['CPU seconds']:.3f} | {row['MB']:,.1f} | {row['error']:.1e} |")
    return "\n".join([*lines, ""])


def assert_close(got: Tensor, want: Tensor, tolerance: float) -> None:
    error = float((got - want).norm() / want.norm())
    assert error <= tolerance, error


@pytest.mark.parametrize("n", SIZES)
def test_factor_of_the_inverse(race, device, n):
    h, probe = hessian(n, device), normal(n, 4, device=device, seed=1)
    for contender in FACTORS.values():
        u = contender(h.clone())
        assert_close(u.mT @ (u @ (h @ probe)), probe, 1e-3)
    race(
        "factor of an inverse",
        f"n={n}",
        lambda: one_call(h),
        {"three calls": lambda: three_calls(h)},
        bound=Bound(2 / 3 * n**3),
        megabytes=peaks(n, device),
    )


@pytest.mark.parametrize("n", SIZES)
def test_triangular_inverse(race, device, n):
    lower, identity = torch.linalg.cholesky(hessian(n, device)), torch.eye(n, device=device)
    probe = normal(n, 4, device=device, seed=1)

    def solve() -> Tensor:
        return torch.linalg.solve_triangular(lower, identity, upper=False)

    for inverse in (ops.triangular_inverse(lower), solve()):
        assert_close(lower @ (inverse @ probe), probe, 1e-4)
    race(
        "inverse of a triangle",
        f"n={n}",
        lambda: ops.triangular_inverse_ex(lower),
        {"solve_triangular, identity": solve},
        bound=Bound(n**3 / 3),
    )


@pytest.mark.parametrize("d", SIZES)
def test_accumulation(race, device, d):
    x = normal(TOKENS, d, device=device)
    want = x.mT @ x
    factor, h = torch.zeros_like(want), torch.zeros_like(want)
    ops.linear_factor_(factor, x)
    assert_close(factor, want, 1e-5)
    race(
        "H += x^T x",
        f"T={TOKENS} D={d}",
        lambda: ops.linear_factor_(factor, x),
        {"H.add_(x.mT @ x)": lambda: h.add_(x.mT @ x), "H.addmm_(x.mT, x)": lambda: h.addmm_(x.mT, x)},
        bound=Bound(TOKENS * d * (d + 1)),
    )


@pytest.mark.parametrize("d", [768, 2048])
def test_experts(race, device, d):
    """Loads from 1 to 1/8 of the first: each expert gets less than the one before."""
    x, loads = normal(ROUTED, d, device=device), torch.linspace(1, 1 / EXPERTS, EXPERTS).cumsum(0)
    ends = [0, *(loads / loads[-1] * ROUTED).long().tolist()]
    offsets = torch.tensor(ends, device=device)
    want = torch.stack([part.mT @ part for part in (x[begin:end] for begin, end in pairwise(ends))])
    factors, sums = torch.zeros_like(want), torch.zeros_like(want)
    ops.linear_factor_(factors, x, offsets=offsets)
    assert_close(factors, want, 1e-5)

    def loop() -> None:
        for factor, (begin, end) in zip(factors, pairwise(ends), strict=True):
            ops.linear_factor_(factor, x[begin:end])

    def plain() -> None:
        for h, (begin, end) in zip(sums, pairwise(ends), strict=True):
            h.add_(x[begin:end].mT @ x[begin:end])

    race(
        "experts, ragged",
        f"E={EXPERTS} T={ROUTED} D={d}",
        lambda: ops.linear_factor_(factors, x, offsets=offsets),
        {"loop over linear_factor_": loop, "loop over H.add_(x.mT @ x)": plain},
        bound=Bound(ROUTED * d * (d + 1)),
    )


@pytest.mark.parametrize("rows", [32, 512])
def test_model(race, device, rows):
    """The inputs of the 48 linear layers of 12 transformer blocks of width 768, of a few rows or of more."""
    xs = [normal(rows, d, device=device, seed=i) for i, d in enumerate([768, 768, 768, 3072] * 12)]
    wants = [x.mT @ x for x in xs]
    factors, sums = ([torch.zeros_like(want) for want in wants] for _ in range(2))
    ops.grouped_linear_factor_(factors, xs)
    for factor, want in zip(factors, wants, strict=True):
        assert_close(factor, want, 1e-5)

    def loop(add: Callable[[Tensor, Tensor], object], targets: list[Tensor]) -> None:
        for target, x in zip(targets, xs, strict=True):
            add(target, x)

    race(
        "every layer of a model",
        f"48 layers T={rows}",
        lambda: ops.grouped_linear_factor_(factors, xs),
        {
            "loop over linear_factor_": lambda: loop(ops.linear_factor_, factors),
            "loop over H.add_(x.mT @ x)": lambda: loop(lambda h, x: h.add_(x.mT @ x), sums),
        },
        bound=Bound(sum(rows * x.shape[1] * (x.shape[1] + 1) for x in xs)),
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--contender", choices=FACTORS)
    parser.add_argument("--size", type=int)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.out:
        calls = [(name, n, alone(name, n)) for n in [*SIZES, LARGEST] for name in FACTORS]
        (options.out / "calls.md").write_text(table_of(calls))
    else:
        print(json.dumps(measure(options.contender, hessian(options.size, "cpu", TOKENS))))
