"""The shim that runs CUDA kernels on the CPU: sound kernels are right in every order, planted faults are caught."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
ORDERS = ["forward", "reverse", "random"]
FAULTS = {
    "missing_barrier": "wrong",
    "ragged_end": "wrong",
    "unwritten_output": "wrong",
    "wrong_mask": r"error: warp operation whose mask leaves out the lane that calls it: block \(\d, 0, 0\), thread",
    "shared_read": r"error: shared memory accessed out of bounds: block \(\d, 0, 0\), thread \(0, 0, 0\)",
    "shared_write": r"error: shared memory written out of bounds: block \(\d, 0, 0\)",
    "divergent_barrier": r"error: __syncthreads that threads reach at different lines: block .*kernels\.cpp:\d+",
}

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    binary = tmp_path_factory.mktemp("simt") / "kernels"
    sources = [HERE / "kernels.cpp", CSRC / "common" / "simt.cpp"]
    flags = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror", "-DMFAC_KERNELS_SIMT"]
    subprocess.run(["g++", *flags, f"-I{CSRC}", *sources, "-o", binary], check=True)
    return binary


def run(kernels: Path, fault: str, order: str) -> str:
    command = [kernels, fault, order]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.parametrize("order", ORDERS)
def test_sound_kernel_is_right(kernels: Path, order: str) -> None:
    assert run(kernels, "none", order) == "right"


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_caught(kernels: Path, fault: str) -> None:
    outcomes = {run(kernels, fault, order) for order in ORDERS} - {"right"}
    assert outcomes and all(re.match(FAULTS[fault], outcome) for outcome in outcomes)
