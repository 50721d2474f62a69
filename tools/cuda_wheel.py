"""Builds a wheel against a torch with CUDA, on a machine that may have no GPU, and checks what such a machine can.

    python tools/cuda_wheel.py [--out dist/cuda] [--torch 'torch===2.13.0'] [--env DIR]

In a fresh environment with that torch (from the package index; folders of local wheels are left aside): builds,
imports, fake-runs every op on CUDA tensors. Then imports the wheel beside the torch of the interpreter that runs this:
without CUDA that must end in the import error that says what to do. Needs the CUDA toolkit in CUDA_HOME, and 8 GB of
disk.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@contextmanager
def timed(what: str) -> Iterator[None]:
    print(f"{what} ...", flush=True)
    start = time.monotonic()
    yield
    print(f"{what}: {time.monotonic() - start:.0f} s", flush=True)


def run(*command: str | Path, cwd: Path = ROOT, **environment: str) -> str:
    # Local folders of wheels may hold a torch without CUDA, which pip would prefer.
    inherited = {key: value for key, value in os.environ.items() if key not in ("PIP_FIND_LINKS", "PYTHONPATH")}
    result = subprocess.run(
        command, cwd=cwd, env=inherited | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if result.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}: exit status {result.returncode}\n{result.stdout[-8000:]}")
    return result.stdout


def make_environment(env: Path, torch: str) -> None:
    with timed(f"environment with {torch}"):
        run(sys.executable, "-m", "venv", env)
        needed = [torch, "setuptools>=77", "ninja", "pybind11", "numpy"]
        run(env / "bin" / "python", "-m", "pip", "install", "--quiet", *needed)


def architectures_in(library: Path, env: Path) -> str:
    """What cuobjdump, which comes with Triton, finds in it."""
    for tool in env.glob("lib/python*/site-packages/triton/backends/nvidia/bin/cuobjdump"):
        binaries = re.findall(r"\.(sm_\w+)\.cubin", run(tool, "--list-elf", library))
        ptx = re.findall(r"\.(sm_\w+)\.ptx", run(tool, "--list-ptx", library))
        count = {name: binaries.count(name) for name in sorted(set(binaries), key=lambda name: int(name[3:]))}
        return ", ".join([f"{n} x {name}" for name, n in count.items()] + [f"PTX {name}" for name in sorted(set(ptx))])
    return "cuobjdump not found"


def check_import_without_cuda(wheel: Path, scratch: Path) -> None:
    unpacked = scratch / "unpacked"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unpacked)
    program = "import torch, sys; sys.exit(0 if torch.version.cuda else 9)"
    if subprocess.run([sys.executable, "-c", program], check=False).returncode == 0:
        print("import without CUDA: not checked, as this interpreter's torch has CUDA")
        return
    result = subprocess.run(
        [sys.executable, "-c", "import mfac_kernels"],
        env={**os.environ, "PYTHONPATH": str(unpacked)},
        cwd=scratch,
        capture_output=True,
        text=True,
        check=False,
    )
    words = (
        r"ImportError: mfac_kernels: _ops does not load",
        r"built with: torch",
        "CUDA none",
        "install a torch with CUDA",
    )
    if result.returncode == 0 or not all(word in result.stderr for word in words):
        sys.exit(f"import beside a torch without CUDA: expected the error that says what to do, got\n{result.stderr}")
    print("import without CUDA:", result.stderr[result.stderr.index("ImportError") :].strip(), sep="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "dist" / "cuda")
    parser.add_argument("--torch", default="torch===2.13.0", help="a requirement; === leaves local versions aside")
    parser.add_argument("--env", type=Path, help="use and keep this environment; it is made if it is not there")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        env = (options.env or scratch / "env").resolve()
        python = env / "bin" / "python"
        if not python.exists():
            make_environment(env, options.torch)
        print(run(python, "-c", "import torch; print('torch', torch.__version__, 'CUDA', torch.version.cuda)").strip())

        with timed("build"):
            # build/lib* would carry files into the wheel that the tree no longer has.
            command = [
                "-m",
                "pip",
                "wheel",
                "--no-build-isolation",
                "--no-deps",
                "--wheel-dir",
                options.out.resolve(),
                ".",
            ]
            for old in [*options.out.glob("*.whl"), *ROOT.glob("build/lib*")]:
                shutil.rmtree(old) if old.is_dir() else old.unlink()
            run(python, *command, MFAC_KERNELS_CUDA="1", MFAC_KERNELS_WERROR="1")
        (wheel,) = options.out.glob("*.whl")
        run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--force-reinstall", wheel)
        print(
            run(
                python, "-c", "import mfac_kernels as mk; print(mk.__file__); print(mk.build_info())", cwd=scratch
            ).strip()
        )
        (library,) = env.glob("lib/python*/site-packages/mfac_kernels/_ops.so")
        print(f"{wheel.name}: {wheel.stat().st_size} bytes, _ops.so {library.stat().st_size} bytes")
        print("machine code:", architectures_in(library, env))
        with timed("fake run"):
            print(run(python, ROOT / "tools" / "run_ops.py", "--fake", cwd=scratch).strip())
        check_import_without_cuda(wheel, scratch)


if __name__ == "__main__":
    main()
