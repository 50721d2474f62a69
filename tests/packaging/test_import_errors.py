"""An import that fails says what the package was built with, what was found, and what to do."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mfac_kernels as mk

PACKAGE = Path(mk.__file__).parent


@pytest.fixture
def copied(tmp_path):
    """A copy of the loader and the binaries as a package of the same name."""
    package = tmp_path / "mfac_kernels"
    package.mkdir()
    for path in [PACKAGE / "_library.py", *PACKAGE.glob("*.so")]:
        shutil.copy(path, package)
    (package / "__init__.py").write_text("from mfac_kernels._library import build_info\n")
    return package


def import_error(package: Path, prelude: str = "") -> str:
    program = f"""
import sys
sys.path.insert(0, {str(package.parent)!r})
# An editable installation would find in the source tree what the copy lacks.
sys.meta_path[:] = [f for f in sys.meta_path if getattr(f, "__name__", "") != "_EditableFinder"]
{prelude}
try:
    import mfac_kernels
except ImportError as error:
    print(error)
else:
    print("imported", mfac_kernels.__file__)
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=package.parent,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    return result.stdout


def found() -> str:
    return (
        f"found:      torch {torch.__version__}, CUDA {torch.version.cuda or 'none'}, "
        f"Python {platform.python_version()}"
    )


def built() -> str:
    info = mk.build_info()
    return (
        f"built with: torch {info['torch_built']}, CUDA {info['cuda_built'] or 'none'}, "
        f"Python {info['python_built']}, {info['compiler']}"
    )


def test_the_copy_imports(copied):
    assert import_error(copied) == f"imported {copied / '__init__.py'}\n"


def test_truncated_ops(copied):
    ops = copied / "_ops.so"
    ops.write_bytes(ops.read_bytes()[:32])
    text = import_error(copied)
    assert "mfac_kernels: _ops does not load" in text
    assert "file too short" in text
    assert built() in text
    assert found() in text
    assert "what to do: install again" in text


def test_missing_ops(copied):
    (copied / "_ops.so").unlink()
    text = import_error(copied)
    assert "_ops.so: no such file" in text
    assert built() in text
    assert found() in text


@pytest.mark.parametrize(
    ("reason", "advice"),
    [
        ("undefined symbol: aoti_torch_device_type_cuda", "torch 2.10 or newer is needed"),
        ("libcudart.so.13: cannot open shared object file", "install a torch with CUDA"),
        ("libtorch_cuda.so: cannot open shared object file", "install a torch with CUDA"),
    ],
)
def test_advice_fits_the_reason(copied, reason, advice):
    text = import_error(
        copied,
        f"""
import torch
def refuse(path):
    raise OSError("Could not load this library") from OSError({reason!r})
torch.ops.load_library = refuse
""",
    )
    assert reason in text
    assert advice in text
    assert built() in text


def test_binary_of_another_python(copied):
    for path in copied.glob("_C.*.so"):
        path.rename(copied / "_C.cpython-39-x86_64-linux-gnu.so")
    text = import_error(copied)
    assert "mfac_kernels: _C does not load" in text
    assert "built with: _C.cpython-39-x86_64-linux-gnu.so" in text
    assert found() in text
    assert "build the package for this Python" in text


def test_tree_that_was_never_built(copied):
    for path in copied.glob("*.so"):
        path.unlink()
    text = import_error(copied)
    assert "built with: nothing" in text
    assert "build this source tree first: pip install --no-build-isolation -e ." in text
