"""The kernels from a C library that knows neither torch nor Python: `python -m examples.c_interface`.

Compiles c_interface.c beside this file, links it with mfac_kernels, and calls it. Needs a C compiler.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

import mfac_kernels as mk


def build(source: Path, folder: Path) -> ctypes.CDLL:
    """The library of a C file. torch is imported, so what ``_ops.so`` needs is there."""
    library = Path(mk.get_library())
    command = [os.environ.get("CC", "cc"), "-std=c99", "-O2", "-Wall", "-Werror", "-shared", "-fPIC"]
    paths = [f"-I{mk.get_include()}", str(source), f"-L{library.parent}", f"-l:{library.name}"]
    found_at_run_time = f"-Wl,-rpath,{library.parent}"
    target = folder / source.with_suffix(".so").name
    subprocess.run([*command, *paths, found_at_run_time, "-o", str(target)], check=True)
    return ctypes.CDLL(str(target))


def layer_inverse(library: ctypes.CDLL, x: Tensor, damping: float) -> Tensor:
    """(x^T x / rows + damping I)^-1 of x (rows, columns), float32, contiguous, on the CPU."""
    rows, columns = x.shape
    inverse = torch.empty(columns, columns)
    status = library.layer_inverse(
        ctypes.c_int64(rows),
        ctypes.c_int64(columns),
        ctypes.c_void_p(x.data_ptr()),
        ctypes.c_double(damping),
        ctypes.c_void_p(inverse.data_ptr()),
    )
    if status:
        raise torch.linalg.LinAlgError(f"layer_inverse: failed with {status}")
    return inverse


def main() -> None:
    x = torch.randn(512, 64, generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        inverse = layer_inverse(build(Path(__file__).with_suffix(".c"), Path(folder)), x, 0.1)
    want = torch.linalg.inv(x.double().mT @ x.double() / len(x) + 0.1 * torch.eye(64))
    print(f"inverse by C: relative error {float((inverse - want).norm() / want.norm()):.1e}")


if __name__ == "__main__":
    main()
