"""Everything that needs a GPU, in one command and a few minutes: build, tests, CUDA graphs, benchmarks, sanitizers.

    python3 tools/gpu.py RESULTS [--minutes 8] [--quick] [--dry-run]

For a machine with a GPU and no network: its python3 brings torch >= 2.10 with CUDA, ninja and pytest, its toolkit nvcc
(found in CUDA_HOME, else as torch finds it). Builds in place, for the GPU that is there. A phase that fails or overruns
its share of the time is recorded and the next one runs; the exit status tells whether all went well.

RESULTS/gpu.json and gpu.md: device, versions, commit, the phases, the benchmarks. RESULTS/benchmarks: their records.
RESULTS/logs.txt: what the phases printed.

--quick is done in 3 minutes: samples and errors of the ops, CUDA graphs, benchmarks of 3 rounds, memcheck. --dry-run
runs the same phases on the CPU, on a part of each, to find mistakes before there is a GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
SANITIZERS = ("memcheck", "racecheck", "initcheck")


@dataclass
class Phase:
    name: str
    command: list[str]
    seconds: int  # its share of the time
    environment: dict[str, str] = field(default_factory=dict)


def has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def sanitizer() -> str:
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    places = [shutil.which("compute-sanitizer"), *(f"{home}/bin/compute-sanitizer" for home in homes if home)]
    return next((place for place in places if place and Path(place).is_file()), "compute-sanitizer")


def phases(results: Path, dry: bool, quick: bool) -> list[Phase]:
    device = "cpu" if dry else "cuda"
    python = sys.executable
    pytest = [python, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider"]
    # A kernel that faults takes its process with it: another worker goes on with the rest.
    workers = str(max(1, min(12, (os.cpu_count() or 1) - 2)))
    spread = ["-n", workers, "--max-worker-restart", "100"] if has("xdist") and not dry else []
    devices = {"MFAC_KERNELS_TEST_DEVICES": device, "CI": "1"}  # CI: the same examples every time
    build = {"MFAC_KERNELS_CUDA": "0" if dry else "1", "MAX_JOBS": str(os.cpu_count())}
    if not dry:
        build["TORCH_CUDA_ARCH_LIST"] = "{}.{}".format(*torch.cuda.get_device_capability())
    part = ["-k", "samples"] if dry else ["-k", "samples or opcheck or errors"] if quick else []
    few = ["--rounds", "1", "-k", "test_core and 256"] if dry else ["--rounds", "3" if quick else "7"]
    record = ["--record", str(results / "benchmarks")]
    check = [sanitizer(), "--error-exitcode", "7", "--print-limit", "20", "--tool"]
    run_ops = [python, "tools/run_ops.py", "--device", device]
    # One allocation for each tensor: an access past its end is not into another one's memory.
    alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    curvature = ["tests/fisher", "tests/preconditioners", "tests/pruning"]
    everything = [
        Phase("build", [python, "setup.py", "--quiet", "build_ext", "--inplace"], 150, build),
        Phase("tests", [*pytest, *spread, *part, "tests/ops"], 120, devices),
        Phase("curvature", [*pytest, *spread, *part, *curvature], 120, devices),
        Phase("graphs", [*pytest, "tests/cuda"], 60, devices),
        Phase("benchmarks", [*pytest, "benchmarks", "--device", device, *few, *record], 120),
        *(Phase(tool, [*([] if dry else [*check, tool]), *run_ops], 60, alone) for tool in SANITIZERS),
    ]
    return [phase for phase in everything if not quick or phase.name not in ("curvature", *SANITIZERS[1:])]


def run(phase: Phase, seconds: float, log: Path) -> dict[str, Any]:
    """Runs it for so long at most; what it leaves running is ended with it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **phase.environment}
    start = time.monotonic()
    with log.open("a") as out:
        out.write(f"\n==== {phase.name}: {' '.join(phase.command)}\n")
        out.flush()
        try:
            process = subprocess.Popen(
                phase.command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )
        except OSError as error:
            out.write(f"{error}\n")
            return {"phase": phase.name, "outcome": str(error), "seconds": 0.0}
        try:
            status = process.wait(timeout=max(1.0, seconds))
            outcome = "ok" if status == 0 else f"exit status {status}"
        except subprocess.TimeoutExpired:
            outcome = f"stopped after {seconds:.0f} s"
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return {"phase": phase.name, "outcome": outcome, "seconds": round(time.monotonic() - start, 1)}


def output_of(*command: str) -> str:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def machine(dry: bool) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "date": date.today().isoformat(),
        "commit": output_of("git", "describe", "--always", "--dirty") or "unknown",
        "torch": torch.__version__,
        "CUDA": torch.version.cuda,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "missing": [name for name in ("hypothesis", "xdist", "pytest_benchmark") if not has(name)],
    }
    if not dry:
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "GPU": properties.name,
            "compute capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory, GiB": round(properties.total_memory / 2**30, 1),
            "L2, MiB": round(properties.L2_cache_size / 2**20, 1),
            "driver": output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        }
    return facts


def write(results: Path, facts: dict[str, Any], outcomes: list[dict[str, Any]]) -> None:
    records = sorted((results / "benchmarks").glob("*/results.json"))
    measured = {record.parent.name: json.loads(record.read_text()) for record in records}
    summary = {"machine": facts, "phases": outcomes, "benchmarks": measured}
    (results / "gpu.json").write_text(json.dumps(summary, indent=1) + "\n")
    lines = [f"- {key}: {value}" for key, value in facts.items()]
    lines += ["", "| phase | outcome | seconds |", "|---|---|---|"]
    lines += [f"| {one['phase']} | {one['outcome']} | {one['seconds']} |" for one in outcomes]
    for record in records:
        table = record.with_suffix(".md").read_text().strip()
        at = record.parent.relative_to(results)
        lines += ["", f"## {record.parent.name}", "", table.replace("(results.png)", f"({at}/results.png)")]
    if not records:
        lines += ["", "benchmarks: not measured"]
    (results / "gpu.md").write_text("\n".join(lines).rstrip() + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--minutes", type=float, help="default: 8, or 3")
    parser.add_argument("--quick", action="store_true", help="a part, in 3 minutes")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, a part of each phase")
    options = parser.parse_args()
    deadline = time.monotonic() + 60 * (options.minutes or (3 if options.quick else 8))
    if not options.dry_run and not torch.cuda.is_available():
        sys.exit(f"torch {torch.__version__} finds no GPU; --dry-run does what can be done without")

    results = options.results.resolve()
    shutil.rmtree(results / "benchmarks", ignore_errors=True)
    results.mkdir(parents=True, exist_ok=True)
    log = results / "logs.txt"
    log.unlink(missing_ok=True)
    facts, outcomes = machine(options.dry_run), []
    for phase in phases(results, options.dry_run, options.quick):
        before = log.stat().st_size if log.exists() else 0
        left = deadline - time.monotonic()
        outcome = run(phase, min(phase.seconds, left), log) if left > 1 else {"outcome": "no time left", "seconds": 0}
        outcomes.append({"phase": phase.name} | outcome)
        said = log.read_bytes()[before:].decode(errors="replace")
        shown = 3 if outcome["outcome"] == "ok" else 40
        lines = [line[:200] for line in said.splitlines()[-shown:]]
        print(f"== {phase.name}: {outcome['outcome']}, {outcome['seconds']} s", *lines, sep="\n")
        sys.stdout.flush()
        write(results, facts, outcomes)
    print((results / "gpu.md").read_text())
    if any(one["outcome"] != "ok" for one in outcomes):
        sys.exit(1)


if __name__ == "__main__":
    main()
