"""What this machine can do, measured by loops of our own: multiply-adds in registers, reads and writes of memory.

    python benchmarks/ceilings.py        the table of this machine, for one thread and for all

A share is the time of the bound over that of the kernel: its multiply-adds at the rate of registers, or its bytes at
the rate of a buffer of the same size, which lies in the same level of the memory. The loops (ceilings.cpp) are compiled
for the instruction set that the kernels use; ATEN_CPU_CAPABILITY lowers both.
"""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import mfac_kernels as mk

LARGEST = 256 << 20  # bytes: no cache holds it
_ROUNDS, _BYTES = 1 << 21, 256 << 20  # of a measurement: several milliseconds, for threads are started in each
_FLAGS = ["-O3", "-std=c++20", "-ffp-contract=fast", "-shared", "-fPIC", "-pthread"]
_OF_ISA = {"avx2": ["-mavx2", "-mfma"], "avx512": ["-mavx512f", "-mfma"], "default": []}


@functools.cache
def _loops() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "ceilings.so"
        source = Path(__file__).with_name("ceilings.cpp")
        flags = [*_FLAGS, *_OF_ISA[mk.build_info()["instruction_set"]]]
        subprocess.run([os.environ.get("CXX", "c++"), *flags, str(source), "-o", str(library)], check=True)
        loops = ctypes.CDLL(str(library))
    loops.multiply_adds_of_a_round.restype = ctypes.c_int64
    for name in ("multiply_adds_float32", "multiply_adds_float64"):
        getattr(loops, name).argtypes = [ctypes.c_int64, ctypes.c_int]
    for name in ("read_memory", "write_memory"):
        getattr(loops, name).argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int]
    return loops


@functools.cache
def _buffer() -> torch.Tensor:
    return torch.zeros(LARGEST, dtype=torch.uint8)


def flops(dtype: torch.dtype = torch.float32, threads: int | None = None) -> float:
    """A second: multiplications and additions of float32 or float64, two for each multiply-add."""
    threads = threads or torch.get_num_threads()
    loop = getattr(_loops(), f"multiply_adds_{str(dtype)[6:]}")
    start = time.perf_counter()
    loop(_ROUNDS, threads)
    seconds = time.perf_counter() - start
    return 2 * _ROUNDS * threads * _loops().multiply_adds_of_a_round(dtype.itemsize) / seconds


def bandwidth(kind: str, size: float, threads: int | None = None) -> float:
    """Bytes a second of "read" or "write" passes over a buffer of so many bytes, LARGEST at most."""
    threads = threads or torch.get_num_threads()
    size = min(max(int(size), 1 << 16), LARGEST) >> 13 << 13
    passes = max(1, _BYTES // size)
    loop, address = getattr(_loops(), f"{kind}_memory"), _buffer().data_ptr()
    start = time.perf_counter()
    loop(address, size, passes, threads)
    return size * passes / (time.perf_counter() - start)


@dataclass(frozen=True)
class Bound:
    """The least that a kernel does. read, written: bytes; dtype: of the multiply-adds, float32 or float64."""

    flops: float = 0
    read: float = 0
    written: float = 0
    dtype: torch.dtype = torch.float32

    @property
    def moved(self) -> float:
        return self.read + self.written

    def seconds(self) -> float:
        """Measured now. Arithmetic goes on while memory is waited for; reads and writes share the way to it."""
        parts = (("read", self.read), ("write", self.written))
        moved = sum(part / bandwidth(kind, self.moved) for kind, part in parts if part)
        return max(self.flops / flops(self.dtype) if self.flops else 0.0, moved)


def table() -> list[str]:
    lines = ["| ceiling | 1 thread | all threads |", "|---|---|---|"]
    each = (1, torch.get_num_threads())
    for dtype in (torch.float32, torch.float64):
        rates = (max(flops(dtype, threads) for _ in range(5)) / 1e9 for threads in each)
        lines.append(f"| multiply-adds, {str(dtype)[6:]}, GFLOP/s | {' | '.join(f'{rate:.0f}' for rate in rates)} |")
    for kind in ("read", "write"):
        for size in (256 << 10, 8 << 20, LARGEST):
            rates = (max(bandwidth(kind, size, threads) for _ in range(5)) / 1e9 for threads in each)
            name = f"{size >> 20} MB" if size >> 20 else f"{size >> 10} KB"
            lines.append(f"| {kind}, {name}, GB/s | {' | '.join(f'{rate:.1f}' for rate in rates)} |")
    return lines


if __name__ == "__main__":
    print(f"{torch.get_num_threads()} threads, {mk.build_info()['instruction_set']}", *table(), sep="\n")
