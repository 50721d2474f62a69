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
    "shared_size": "error: launch: expected at most 49152 bytes of shared memory, got 52768",
    "divergent_barrier": r"error: __syncthreads that threads reach at different lines: block .*kernels\.cpp:\d+",
}

CASES = [
    "tf32",
    "bf16",
    "fp16",
    "rounding",
    "load_x1",
    "load_x2",
    "load_x4",
    "load_x1_transposed",
    "load_x2_transposed",
    "load_x4_transposed",
    "loaded_tf32",
    "loaded_bf16",
    "loaded_fp16_transposed_a",
    "loaded_bf16_transposed_b",
    "loaded_fp16_transposed_both",
    "copies",
]
HARDWARE_FAULTS = {
    "absent_lane": r"error: deadlock in block .*waits at a warp operation, .*tensor_cores\.cpp:\d+, mask 0xffffffff",
    "returned_lane": "error: an operation of the whole warp, of which lanes have returned or do not exist: block",
    "load_wrong_rows": "wrong",
    "load_beyond_the_end": r"error: shared memory accessed out of bounds: block .*tensor_cores\.cpp:\d+",
    "load_misaligned": "error: shared memory accessed at an address that is no multiple of the size: block",
    "copies_missing_wait": "wrong",
    "copies_short_wait": "wrong",
    "copies_missing_commit": "wrong",
    "copies_missing_barrier": "wrong",
    "copies_beyond_the_end": "error: shared memory accessed out of bounds: block",
    "copies_misaligned": "error: shared memory accessed at an address that is no multiple of the size: block",
    "copies_too_many": "error: an asynchronous copy of more bytes than its size: block",
}

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@pytest.fixture(scope="module", params=["switch", "ucontext"])
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the programs; fibers are switched by the instructions of the shim or, as elsewhere, by ucontext."""
    folder = tmp_path_factory.mktemp("simt")
    flags = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror", "-DMFAC_KERNELS_SIMT"]
    if request.param == "ucontext":
        flags.append("-DMFAC_KERNELS_SIMT_UCONTEXT")
    for name in ("kernels", "tensor_cores"):
        sources = [HERE / f"{name}.cpp", CSRC / "common" / "simt" / "simt.cpp"]
        subprocess.run(["g++", *flags, f"-I{CSRC}", *sources, "-o", folder / name], check=True)
    return folder


def run(program: Path, case: str, order: str) -> str:
    return subprocess.run([program, case, order], check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.parametrize("order", ORDERS)
def test_sound_kernel_is_right(compiled: Path, order: str) -> None:
    assert run(compiled / "kernels", "none", order) == "right"


@pytest.mark.parametrize("case", CASES)
def test_hardware_operation_is_right(compiled: Path, case: str) -> None:
    assert {run(compiled / "tensor_cores", case, order) for order in ORDERS} == {"right"}


@pytest.mark.parametrize(
    ("program", "fault", "outcome"),
    [("kernels", *item) for item in FAULTS.items()] + [("tensor_cores", *item) for item in HARDWARE_FAULTS.items()],
)
def test_fault_is_caught(compiled: Path, program: str, fault: str, outcome: str) -> None:
    outcomes = {run(compiled / program, fault, order) for order in ORDERS} - {"right"}
    assert outcomes and all(re.match(outcome, found) for found in outcomes)
