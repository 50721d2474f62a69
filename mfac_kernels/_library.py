"""Loads the compiled half of the package, and says what it is."""

from __future__ import annotations

import platform
import re
from pathlib import Path

import torch

_HERE = Path(__file__).parent
_CAPABILITIES = (
    "default",
    "avx2",
    "avx512",
)  # the words of ATEN_CPU_CAPABILITY; the op takes the index
_REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps ."


def _failure(what: str, built: str, reason: object, advice: str) -> ImportError:
    return ImportError(
        f"mfac_kernels: {what} does not load: {reason}\n"
        f"  built with: {built}\n"
        f"  found:      torch {torch.__version__}, CUDA {torch.version.cuda or 'none'}, "
        f"Python {platform.python_version()}, {platform.machine()}\n"
        f"  what to do: {advice}"
    )


def _load_record() -> dict[str, object]:
    try:
        from mfac_kernels import _C
    except ImportError as error:
        binaries = ", ".join(sorted(path.name for path in _HERE.glob("_C*.so")))
        if not binaries:
            advice = "build this source tree first: pip install --no-build-isolation -e ."
        else:
            advice = f"build the package for this Python, in its source tree: {_REBUILD}"
        raise _failure("_C", binaries or "nothing", error, advice) from error
    return _C.build_info()


def _load_ops(record: dict[str, object]) -> None:
    path = _HERE / "_ops.so"
    try:
        if not path.is_file():
            raise OSError(f"{path}: no such file")
        torch.ops.load_library(path)  # type: ignore[no-untyped-call]
    except OSError as error:
        built = (
            f"torch {record['torch_built']}, CUDA {record['cuda_built'] or 'none'}, "
            f"Python {record['python_built']}, {record['compiler']}"
        )
        reason = str(error.__cause__ or error)
        if re.search(r"lib\w*cuda", reason):
            advice = (
                f"install a torch with CUDA {record['cuda_built']}, "
                f"or build against the one found, in the source tree: {_REBUILD}"
            )
        elif "undefined symbol" in reason:
            advice = f"torch 2.10 or newer is needed; if it is there, build against it, in the source tree: {_REBUILD}"
        else:
            advice = f"install again; in a source tree: {_REBUILD}"
        raise _failure("_ops", built, reason, advice) from error


_RECORD = _load_record()
_load_ops(_RECORD)


def get_include() -> str:
    """The folder of ``mfac_kernels.h``, the C interface to the CPU kernels: for a compiler's ``-I``.

    It is versioned and knows neither torch nor Python; examples/c_interface.c is a library on it.
    """
    return str(_HERE / "include")


def get_library() -> str:
    """The file that has the functions of ``mfac_kernels.h``: to link with, or to load once torch is imported."""
    return str(_HERE / "_ops.so")


def build_info() -> dict[str, object]:
    """What the package was built with (``*_built`` and what follows them) and what it runs on.

    version, torch_built, cuda_built (None: without CUDA), cuda_architectures, python_built,
    compiler, cxx_standard, instruction_sets, sanitized, simt; torch, cuda, python, instruction_set (of
    the CPU kernels, in use now), threads.
    """
    return {
        **_RECORD,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "instruction_set": cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def cpu_capability(name: str | None = None) -> str:
    """The instruction set of the CPU kernels in use: ``"default"``, ``"avx2"`` or ``"avx512"``.

    With a name, chooses it first; a CPU that lacks it uses the best it has. The environment
    variable ``ATEN_CPU_CAPABILITY`` chooses at start, for torch's own kernels as well.
    """
    if name is None:
        level = -1
    elif name in _CAPABILITIES:
        level = _CAPABILITIES.index(name)
    else:
        raise ValueError(f"cpu_capability: name: expected one of {', '.join(_CAPABILITIES)}, got {name!r}")
    return _CAPABILITIES[torch.ops.mfac_kernels.cpu_capability(level)]
