"""The `race` fixture: contenders timed in turns in one process; and the table of a run.

Only ratios mean anything on a machine whose speed drifts, and only between figures taken in turns. A benchmark first
verifies the results that it is about to time. `pytest benchmarks --record DIR` writes results.json and results.md
of each bench_FAMILY.py into DIR/FAMILY, and results.png where matplotlib is.

On the CPU ours is timed through pytest-benchmark, and the bound of what it does (ceilings.py) is measured in turns too.
`--device cuda` runs the benchmarks that take the fixture `device`, timed by CUDA events with cold caches, and sets
their GB/s beside those of a large copy.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from ceilings import Bound, table
from cuda_timing import Timer, copy_bandwidth
from plots import plot
from provenance import commit

import mfac_kernels as mk

_SLOW = 0.5  # seconds: a contender slower than this is sampled three times
_ROWS = pytest.StashKey[dict[str, list[dict[str, Any]]]]()  # by family
_COPY = pytest.StashKey[float]()  # bytes per second


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", metavar="DIR", help="write results.json and results.md there, by family")
    parser.addoption("--rounds", type=int, default=11, help="samples per contender (default 11)")
    parser.addoption(
        "--device", choices=["cpu", "cuda"], default="cpu", help="what the benchmarks run on (default cpu)"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--device") == "cpu":
        return
    chosen = [item for item in items if "device" in getattr(item, "fixturenames", ())]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    return str(request.config.getoption("--device"))


@pytest.fixture(scope="session")
def cuda_timer(request: pytest.FixtureRequest) -> Timer:
    timer = Timer()
    request.config.stash[_COPY] = copy_bandwidth(timer)
    return timer


def _seconds(work: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        work()
    return (time.perf_counter() - start) / calls


@pytest.fixture
def race(request: pytest.FixtureRequest) -> Callable[..., None]:
    """race(kernel, case, ours, others, gates={name: ratio}, bound=Bound(flops=, read=, written=))."""

    def run(
        kernel: str,
        case: str,
        ours: Callable[[], object],
        others: dict[str, Callable[[], object]],
        *,
        gates: dict[str, float] | None = None,
        bound: Bound | None = None,
        calls: int = 1,
        megabytes: dict[str, float] | None = None,
    ) -> None:
        """`others` are the baselines; `bound` is the least that ours does; megabytes: what each takes, if known."""
        on_cuda = request.config.getoption("--device") == "cuda"
        timer = request.getfixturevalue("cuda_timer") if on_cuda else lambda work: _seconds(work, calls)
        benchmark = None if on_cuda else request.getfixturevalue("benchmark")
        rounds = request.config.getoption("--rounds")
        samples: dict[str, list[float]] = {name: [] for name in others}
        bounds: list[float] = []

        def time_the_others() -> None:
            for name, contender in others.items():
                if len(samples[name]) > 2 and samples[name][-1] > _SLOW:
                    continue
                samples[name].append(timer(contender))
            if bound and not on_cuda:
                bounds.append(bound.seconds())

        def repeat_ours() -> None:
            for _ in range(calls):
                ours()

        ours()
        time_the_others()
        if benchmark is None:
            timer(ours)  # the first run may still load code or allocate
            times = []
            for _ in range(rounds):
                time_the_others()
                times.append(timer(ours))
        else:
            benchmark.pedantic(repeat_ours, setup=time_the_others, rounds=rounds)
            times = [sample / calls for sample in benchmark.stats.stats.data]
        low, seconds, high = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
        medians = {name: statistics.median(times[1:]) for name, times in samples.items()}
        row: dict[str, Any] = {
            "kernel": kernel,
            "case": case,
            "ms": seconds * 1e3,
            "quartiles": [low * 1e3, high * 1e3],
            "ratios": {name: medians[name] / seconds for name in others},
            "gates": gates or {},
        }
        if megabytes:
            row["MB"] = megabytes
        if bound and bound.moved:
            row["GB/s"] = bound.moved / seconds / 1e9
        if bound and bound.flops:
            row["GFLOP/s"] = bound.flops / seconds / 1e9
        if bounds:
            row["share of the bound"] = statistics.median(bounds) / seconds
        elif bound and bound.moved:
            row["share of copy bandwidth"] = bound.moved / seconds / request.config.stash[_COPY]
        if benchmark is not None:
            benchmark.extra_info.update(row)
        family = request.path.stem.removeprefix("bench_")
        request.config.stash.setdefault(_ROWS, {}).setdefault(family, []).append(row)

    return run


def _table(rows: list[dict[str, Any]]) -> list[str]:
    ceiling = "copy bandwidth" if any("share of copy bandwidth" in row for row in rows) else "the bound"
    with_memory = any("MB" in row for row in rows)
    lines = [
        f"| kernel | case | ms | GB/s or GFLOP/s | share of {ceiling} | ratio to | gate |",
        "|---|---|---|---|---|---|---|",
    ]
    if with_memory:
        lines = [lines[0] + " MB |", lines[1] + "---|"]
    for row in rows:
        rate = f"{row['GB/s']:.1f} GB/s" if "GB/s" in row else ""
        rate = f"{row['GFLOP/s']:.0f} GFLOP/s" if "GFLOP/s" in row else rate
        share = row.get(f"share of {ceiling}")
        ratios = "; ".join(f"{name}: {ratio:.2f}x" for name, ratio in row["ratios"].items())
        gates = "; ".join(f"{gate:g}x" for gate in row["gates"].values())
        cells = [row["kernel"], row["case"], f"{row['ms']:.3f}", rate, f"{share:.0%}" if share else "", ratios, gates]
        if with_memory:
            cells.append("; ".join(f"{name}: {size:.1f}" for name, size in row.get("MB", {}).items()))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _machine(config: pytest.Config) -> dict[str, Any]:
    cpu = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    machine = {"date": date.today().isoformat(), "commit": commit(), "cpu": cpu}
    if _COPY in config.stash:
        machine["gpu"] = torch.cuda.get_device_name()
        machine["copy, GB/s read and written"] = round(config.stash[_COPY] / 1e9)
    return machine | mk.build_info()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    families = config.stash.get(_ROWS, {})
    folder = config.getoption("--record")
    machine = _machine(config) if families and folder else {}
    head = [f"- {key}: {value}" for key, value in machine.items()]
    if machine and config.getoption("--device") == "cpu":
        head += ["", *table()]
    for family, rows in families.items():
        lines = _table(rows)
        terminalreporter.write_line("\n".join(["", *lines]))
        if folder:
            out = Path(folder) / family
            out.mkdir(parents=True, exist_ok=True)
            (out / "results.json").write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
            if find_spec("matplotlib"):
                plot(rows, out / "results.png")
                lines += ["", "![ratios and shares](results.png)"]
            (out / "results.md").write_text("\n".join([*head, "", *lines, ""]))
