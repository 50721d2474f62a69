"""What was built: its record, its instruction sets, and what the binaries contain and ask for."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mfac_kernels as mk

PACKAGE = Path(mk.__file__).parent
ROOT = Path(__file__).parents[2]
OPS = PACKAGE / "_ops.so"
CAPABILITIES = ["default", "avx2", "avx512"]


def output(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def capability():
    """Puts the instruction set back that was in use."""
    before = mk.cpu_capability()
    yield before
    mk.cpu_capability(before)


# ---- the record -----------------------------------------------------------------------------


def test_build_info():
    info = mk.build_info()
    assert set(info) == {
        "version",
        "torch_built",
        "cuda_built",
        "cuda_architectures",
        "python_built",
        "compiler",
        "cxx_standard",
        "instruction_sets",
        "sanitized",
        "simt",
        "torch",
        "cuda",
        "python",
        "instruction_set",
        "threads",
    }
    assert info["torch"] == torch.__version__
    assert info["python"] == platform.python_version()
    assert info["threads"] == torch.get_num_threads()
    assert info["cxx_standard"] == 20
    assert re.match(r"(gcc|clang) \d+", info["compiler"])
    assert info["instruction_set"] in info["instruction_sets"]
    assert (info["cuda_built"] is None) == (info["cuda_architectures"] == [])


def test_the_record_was_made_for_this_python():
    built = mk.build_info()["python_built"].split(".")
    assert built[:2] == platform.python_version().split(".")[:2]


def test_every_instruction_set_is_compiled_in_on_x86():
    expected = CAPABILITIES if platform.machine() == "x86_64" else ["default"]
    assert mk.build_info()["instruction_sets"] == expected


def test_version():
    assert mk.__version__ == importlib.metadata.version("mfac_kernels")
    assert mk.__version__ == mk.build_info()["version"]


# ---- the instruction set in use -------------------------------------------------------------


def test_cpu_capability_chooses_among_what_the_cpu_has(capability):
    best = mk.cpu_capability("avx512")
    for wanted in CAPABILITIES:
        expected = CAPABILITIES[min(CAPABILITIES.index(wanted), CAPABILITIES.index(best))]
        assert mk.cpu_capability(wanted) == expected
        assert mk.cpu_capability() == expected
        assert mk.build_info()["instruction_set"] == expected


def test_cpu_capability_refuses_another_name(capability):
    message = "cpu_capability: name: expected one of default, avx2, avx512, got 'sse9'"
    with pytest.raises(ValueError, match=message):
        mk.cpu_capability("sse9")
    assert mk.cpu_capability() == capability


@pytest.mark.parametrize("wanted", CAPABILITIES)
def test_environment_variable_is_honoured(capability, wanted):
    seen = subprocess.run(
        [sys.executable, "-c", "import mfac_kernels as mk; print(mk.cpu_capability())"],
        env={**os.environ, "ATEN_CPU_CAPABILITY": wanted},
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    assert seen == mk.cpu_capability(wanted)


# ---- the binaries ---------------------------------------------------------------------------

needs_binutils = pytest.mark.skipif(not all(map(shutil.which, ["readelf", "strings"])), reason="needs binutils")
BINARIES = [OPS, *PACKAGE.glob("_C.*.so")]


def test_there_are_two_binaries():
    assert OPS.is_file()
    assert len(BINARIES) >= 2


@needs_binutils
def test_ops_depend_on_torch_but_not_on_python():
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", output("readelf", "--dynamic", OPS))
    assert "libtorch_cpu.so" in needed
    assert not [library for library in needed if "python" in library]


@needs_binutils
def test_ops_use_the_stable_interfaces_only():
    symbols = output("readelf", "--dyn-syms", "--wide", OPS)
    undefined = re.findall(r" UND ([^\s@]+)", symbols)
    assert [name for name in undefined if name.startswith("aoti_torch_")]
    assert not [name for name in undefined if re.match(r"_?Py[A-Z_]", name)]
    # C++ names of torch change from one release to the next.
    assert not [name for name in undefined if re.match(r"_ZN?K?\d*(c10|at|torch|caffe2)", name)]


@needs_binutils
@pytest.mark.parametrize("binary", BINARIES, ids=lambda path: path.name.split(".")[0])
def test_binaries_ask_for_no_library_newer_than_manylinux_2_34(binary):
    newest = {"GLIBC": (2, 34), "GLIBCXX": (3, 4, 29), "CXXABI": (1, 3, 13)}  # auditwheel's policy
    if mk.build_info()["sanitized"]:
        pytest.skip("a sanitizer build is for no wheel")
    if tuple(map(int, platform.libc_ver()[1].split("."))) > (2, 36):
        pytest.skip("wheels are built on an older distribution than this one")
    found = set(re.findall(r"Name: (GLIBC|GLIBCXX|CXXABI)_([0-9.]+)", output("readelf", "-V", "--wide", binary)))
    assert found
    for library, version in found:
        assert tuple(map(int, version.split("."))) <= newest[library], f"{library}_{version}"


@needs_binutils
def test_record_depends_on_no_torch():
    (binary,) = BINARIES[1:]
    assert not re.findall(r"\(NEEDED\).*(?:torch|c10)", output("readelf", "--dynamic", binary))


@needs_binutils
@pytest.mark.parametrize("binary", BINARIES, ids=lambda path: path.name.split(".")[0])
def test_binaries_know_nothing_of_the_machine_that_built_them(binary):
    if mk.build_info()["sanitized"]:
        pytest.skip("a sanitizer build keeps its debug information")
    texts = output("strings", "--all", binary)
    for place in {str(ROOT), str(Path(torch.__file__).parent), str(Path.home())}:
        assert place not in texts
    assert ".debug_info" not in output("readelf", "--sections", "--wide", binary)


# ---- the sources ----------------------------------------------------------------------------


def test_marker_of_typed_packages_is_there():
    assert (PACKAGE / "py.typed").is_file()
    assert (PACKAGE / "_C.pyi").is_file()


@pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="needs the source tree")
def test_sources_are_ascii():
    files = [*ROOT.glob("csrc/**/*.*"), *ROOT.glob("mfac_kernels/**/*.py"), ROOT / "setup.py"]
    assert files
    assert [path for path in files if not path.read_bytes().isascii()] == []


@pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="needs the source tree")
@pytest.mark.parametrize(
    ("setting", "message"),
    [
        pytest.param(
            {"MFAC_KERNELS_CUDA": "1"},
            f"MFAC_KERNELS_CUDA=1, but the CUDA kernels cannot be built: "
            f"torch {torch.__version__} is a build without CUDA",
            marks=pytest.mark.skipif(torch.version.cuda is not None, reason="needs a CPU torch"),
        ),
        pytest.param(
            {"MFAC_KERNELS_CUDA": "1", "CUDA_HOME": "/nonexistent"},
            "/nonexistent/bin/nvcc does not exist",
            marks=pytest.mark.skipif(torch.version.cuda is None, reason="needs a CUDA torch"),
        ),
        ({"MFAC_KERNELS_CUDA": "yes"}, "MFAC_KERNELS_CUDA: expected 0 or 1, got 'yes'"),
    ],
)
def test_a_build_that_cannot_be_fails_at_once(tmp_path, setting, message):
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    result = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=tmp_path,
        env={**os.environ, **setting},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode != 0
    assert message in result.stderr


@pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="needs the source tree")
def test_a_build_without_torch_says_so(tmp_path):
    shutil.copy(ROOT / "setup.py", tmp_path)
    program = "import sys; sys.modules['torch'] = None; exec(open('setup.py').read())"
    result = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "mfac_kernels is built against an installed torch >= 2.10" in result.stderr
    assert "pip install --no-build-isolation ." in result.stderr
