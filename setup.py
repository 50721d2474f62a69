"""Builds the two extension modules; everything else about the package stands in pyproject.toml.

    mfac_kernels._ops    the kernels, on torch's stable ABI and without Python: one binary serves
                         every torch >= 2.10
    mfac_kernels._C      the record of the build; links no torch, so it can still speak when _ops
                         does not load

Environment variables:

    MFAC_KERNELS_CUDA       1: fail unless the CUDA kernels can be built; 0: leave them out;
                            unset: build them if torch has CUDA and its toolkit is found
    MFAC_KERNELS_WERROR     1: compiler warnings are errors
    MFAC_KERNELS_SANITIZE   1: AddressSanitizer and UndefinedBehaviorSanitizer, debug symbols
    MFAC_KERNELS_SIMT       1: ops on the CPU run the CUDA kernels, as csrc/common/simt interprets them:
                            for tests; implies MFAC_KERNELS_CUDA=0
    CUDA_HOME, TORCH_CUDA_ARCH_LIST, MAX_JOBS    as in torch.utils.cpp_extension
"""

import os
import re
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup

try:
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, include_paths, library_paths
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    sys.exit(
        f"mfac_kernels is built against an installed torch >= 2.10; {sys.executable} has none.\n"
        "Install torch first, then build in the same environment:\n"
        "    pip install torch 'setuptools>=77' ninja pybind11 numpy\n"
        "    pip install --no-build-isolation ."
    )

try:
    from pybind11 import get_include as pybind11_include
except ModuleNotFoundError:  # torch's headers come with a copy

    def pybind11_include() -> str:
        return include_paths("cpu")[0]


ROOT = Path(__file__).resolve().parent
OLDEST_TORCH = (2, 10)


def flag(name: str) -> bool | None:
    """An environment variable that is 1, 0, or not set."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        sys.exit(f"{name}: expected 0 or 1, got {value!r}")
    return value == "1" if value else None


def toolkit_version() -> tuple[int, int]:
    """The version of the CUDA toolkit that fits torch; LookupError says what is missing."""
    if torch.version.cuda is None:
        raise LookupError(f"torch {torch.__version__} is a build without CUDA: install one with CUDA")
    if CUDA_HOME is None:
        raise LookupError(f"no CUDA toolkit was found: set CUDA_HOME to one of CUDA {torch.version.cuda}")
    nvcc = Path(CUDA_HOME, "bin", "nvcc")
    if not nvcc.is_file():
        raise LookupError(f"{nvcc} does not exist: set CUDA_HOME to a toolkit of CUDA {torch.version.cuda}")
    text = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", text)
    if release is None:
        raise LookupError(f"{nvcc} --version does not name a release: {text!r}")
    major, minor = map(int, release.groups())
    if major != int(torch.version.cuda.split(".")[0]):
        raise LookupError(
            f"the toolkit in {CUDA_HOME} is CUDA {major}.{minor}, "
            f"torch {torch.__version__} has {torch.version.cuda}: the major versions must agree"
        )
    return major, minor


def choose_cuda() -> tuple[int, int] | None:
    """The toolkit to build the CUDA kernels with, or None for a CPU build."""
    wanted = flag("MFAC_KERNELS_CUDA")
    if wanted is False:
        return None
    try:
        toolkit = toolkit_version()
    except LookupError as obstacle:
        if wanted:
            sys.exit(f"MFAC_KERNELS_CUDA=1, but the CUDA kernels cannot be built: {obstacle}")
        print(f"mfac_kernels: building without CUDA: {obstacle}", file=sys.stderr)
        return None
    # torch would take the architectures of the GPUs it sees; a building machine may have none.
    blackwell = toolkit >= (12, 8)
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0;10.0;12.0+PTX" if blackwell else "8.0;9.0+PTX")
    return toolkit


def ops_sources(cuda: bool, simt: bool) -> list[str]:
    """All of csrc but what this build leaves out: cuda/, or cpu/ if the interpreted kernels take its place."""
    left_out = {"cpu"} if simt else {"simt"} if cuda else {"simt", "cuda"}
    files = [path.relative_to(ROOT) for suffix in ("cpp", "cu") for path in (ROOT / "csrc").rglob(f"*.{suffix}")]
    chosen = sorted(path for path in files if path.parent.name not in left_out and path.name != "module.cpp")
    return [as_cpp(path) if simt and path.suffix == ".cu" else str(path) for path in chosen]


def as_cpp(kernels: Path) -> str:
    """A file that a C++ compiler takes for C++, with nothing in it but the kernels."""
    path = Path("build", "simt", "sources", kernels).with_suffix(".cpp")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#include "{kernels.relative_to("csrc")}"\n')
    return str(path)


def system_includes(directories: list[str]) -> list[str]:
    """Flags that keep warnings of other people's headers quiet."""
    return [word for directory in directories for word in ("-isystem", directory)]


if tuple(int(part) for part in torch.__version__.split(".")[:2]) < OLDEST_TORCH:
    sys.exit(f"mfac_kernels needs torch >= {'.'.join(map(str, OLDEST_TORCH))}, got {torch.__version__}")

simt = bool(flag("MFAC_KERNELS_SIMT"))
cuda = None if simt else choose_cuda()
sanitize = flag("MFAC_KERNELS_SANITIZE")

torch_includes = include_paths("cuda" if cuda else "cpu")
cxx_flags = [
    "-std=c++20",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
    # Messages name source files; where they lay on the machine that built them concerns nobody.
    f"-fmacro-prefix-map={ROOT}/=",
    f"-fmacro-prefix-map={Path(torch.__file__).parent}=torch",
]
link_flags = []
if simt:
    cxx_flags += ["-Wno-unknown-pragmas"]  # nvcc's
if flag("MFAC_KERNELS_WERROR"):
    cxx_flags += ["-Werror"]
if sanitize:
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    cxx_flags += ["-O1", "-g", "-fno-omit-frame-pointer", *sanitizers]
    link_flags += sanitizers
else:
    cxx_flags += ["-O3", "-g0"]
    link_flags += ["-Wl,-s"]

# What _C.build_info() reports. _ops gets it too, so that another torch or toolkit recompiles it.
record = [
    ("MFAC_KERNELS_TORCH_VERSION", f'"{torch.__version__}"'),
    ("MFAC_KERNELS_SANITIZED", str(int(sanitize or False))),
]
if simt:
    record += [("MFAC_KERNELS_SIMT", None)]
if cuda:
    record += [
        ("MFAC_KERNELS_WITH_CUDA", None),
        ("MFAC_KERNELS_CUDA_VERSION", '"{}.{}"'.format(*cuda)),
        ("MFAC_KERNELS_CUDA_ARCHITECTURES", f'"{os.environ["TORCH_CUDA_ARCH_LIST"]}"'),
    ]

ops = Extension(
    "mfac_kernels._ops",
    ops_sources(cuda is not None, simt),
    language="c++",
    include_dirs=[str(ROOT / "csrc"), str(ROOT / "mfac_kernels" / "include")],
    define_macros=[
        *record,
        ("TORCH_TARGET_VERSION", "0x020a000000000000"),
        ("TORCH_STABLE_ONLY", None),
        *([("USE_CUDA", None)] if cuda else []),  # torch's headers then declare the current stream
    ],
    library_dirs=library_paths("cuda" if cuda else "cpu"),
    libraries=[
        "c10",
        "torch",
        "torch_cpu",
        *(["cudart", "c10_cuda", "torch_cuda"] if cuda else []),
    ],
    extra_compile_args={
        "cxx": [*cxx_flags, *system_includes(torch_includes)],
        # Kernels know no torch; the CUDA headers are nvcc's own.
        "nvcc": [
            "-std=c++20",
            "-O3",
            "-Xcompiler=-fvisibility=hidden",
            f"-Xcompiler=-fmacro-prefix-map={ROOT}/=",
        ],
    },
    extra_link_args=link_flags,
)
build_record = Extension(
    "mfac_kernels._C",
    ["csrc/module.cpp"],
    language="c++",
    include_dirs=[str(ROOT / "csrc")],
    define_macros=record,
    extra_compile_args={"cxx": [*cxx_flags, *system_includes([pybind11_include()])]},
    extra_link_args=link_flags,
)


class BuildExtensions(BuildExtension):
    def finalize_options(self) -> None:
        super().finalize_options()
        if self.inplace or self.editable_mode:
            # pip gives each editable build a new folder; a lasting one compiles only what changed.
            self.build_temp = str(ROOT / "build" / "editable")

    def get_ext_filename(self, ext_name: str) -> str:
        # _ops is no Python module and carries no Python ABI in its name.
        if ext_name.split(".")[-1] == "_ops":
            return str(Path(*ext_name.split(".")).with_suffix(".so"))
        return super().get_ext_filename(ext_name)

    def build_extensions(self) -> None:
        for extension in self.extensions:
            extension.define_macros.append(("MFAC_KERNELS_VERSION", f'"{self.distribution.get_version()}"'))
        super().build_extensions()


setup(ext_modules=[ops, build_record], cmdclass={"build_ext": BuildExtensions})
