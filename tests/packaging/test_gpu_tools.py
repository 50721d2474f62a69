"""The tools that need a GPU, as far as they go without one."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import cuda_timing
import gpu
import pytest
import torch


class Event:
    """The time of the device is that of `clock`."""

    clock = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = Event.clock

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: Event) -> float:
        return other.at - self.at


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(
        name="a GPU", major=9, minor=0, multi_processor_count=132, total_memory=141 << 30, L2_cache_size=60 << 20
    )
    for name, value in {
        "is_available": lambda: True,
        "get_device_capability": lambda: (9, 0),
        "get_device_properties": lambda device: properties,
        "Event": Event,
        "_sleep": lambda cycles: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)


def test_time_is_that_between_the_events(card, monkeypatch):
    timer = cuda_timing.Timer("cpu")

    def work() -> None:
        Event.clock += 2.5

    assert timer(work) == 2.5e-3


@pytest.mark.parametrize(
    ("options", "phases"),
    [
        ((), ["build", "tests", "curvature", "graphs", "benchmarks", *gpu.SANITIZERS]),
        (("--quick",), ["build", "tests", "graphs", "benchmarks", "memcheck"]),
    ],
)
def test_phases_on_a_gpu(card, monkeypatch, tmp_path, options, phases):
    """Every phase runs, whatever becomes of the others; what they say is kept."""
    ran: list[gpu.Phase] = []

    def run(phase: gpu.Phase, seconds: float, log: Path) -> dict[str, object]:
        ran.append(phase)
        log.write_text("said\n")
        assert 0 < seconds <= phase.seconds
        return {"phase": phase.name, "outcome": "ok" if phase.name != "tests" else "exit status 1", "seconds": 1.0}

    monkeypatch.setattr(gpu, "run", run)
    monkeypatch.setattr(sys, "argv", ["gpu.py", str(tmp_path), *options])
    with pytest.raises(SystemExit, match="1"):
        gpu.main()
    assert [phase.name for phase in ran] == phases
    assert ran[0].environment["TORCH_CUDA_ARCH_LIST"] == "9.0"
    assert ran[1].environment["MFAC_KERNELS_TEST_DEVICES"] == "cuda"
    summary = json.loads((tmp_path / "gpu.json").read_text())
    assert summary["machine"]["GPU"] == "a GPU"
    assert [one["outcome"] for one in summary["phases"]].count("ok") == len(ran) - 1
    assert "| tests | exit status 1 | 1.0 |" in (tmp_path / "gpu.md").read_text()


def test_a_phase_that_fails_or_overruns_is_recorded(tmp_path):
    log = tmp_path / "log"
    for code, limit, outcome in [
        ("print('hello')", 60, "ok"),
        ("raise SystemExit(3)", 60, "exit status 3"),
        ("import time; time.sleep(60)", 1, "stopped after 1 s"),
    ]:
        assert gpu.run(gpu.Phase("one", [sys.executable, "-c", code], 60), limit, log)["outcome"] == outcome
    assert gpu.run(gpu.Phase("one", ["/nonexistent"], 60), 60, log)["outcome"].startswith("[Errno 2]")
    assert "hello" in log.read_text()


def test_without_a_gpu_it_says_so(monkeypatch, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setattr(sys, "argv", ["gpu.py", str(tmp_path)])
    with pytest.raises(SystemExit, match="finds no GPU; --dry-run"):
        gpu.main()
