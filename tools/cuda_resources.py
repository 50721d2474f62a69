"""What ptxas says of each kernel, as a table; fails if one spills registers or has a stack frame.

nvcc -Xptxas -v ... 2>&1 | python tools/cuda_resources.py
"""

import re
import subprocess
import sys
from dataclasses import dataclass

_KERNEL = re.compile(
    r"Compiling entry function '(\w+)' for '(\w+)'\n.*\n +(\d+) bytes stack frame, (\d+) bytes spill stores.*\n"
    r".*Used (\d+) registers(?:.* (\d+) bytes smem)?"
)


@dataclass(frozen=True, order=True)
class Kernel:
    name: str  # without namespaces and arguments
    mangled: str
    architecture: str
    stack: int  # bytes
    spilled: int  # bytes
    registers: int
    shared: int  # bytes, without what launches ask for


def kernels(log: str) -> list[Kernel]:
    found = [match.groups(default="0") for match in _KERNEL.finditer(log)]
    if not found:
        sys.exit(f"no kernels in what nvcc says:\n{log}")
    demangled = subprocess.run(["c++filt"], input="\n".join(row[0] for row in found), capture_output=True, text=True)
    result = []
    for name, (mangled, architecture, *numbers) in zip(demangled.stdout.splitlines(), found, strict=True):
        # without the casts that c++filt puts before values of template arguments, too: (bool)1
        short = re.sub(r"^void |mfac_kernels::|\(anonymous namespace\)::|\([\w:]+\)(?=\d)", "", name)
        result.append(Kernel(short.split("(")[0], mangled, architecture, *map(int, numbers)))
    return sorted(result)


def main() -> None:
    found = kernels(sys.stdin.read())
    print("| kernel | architecture | registers | shared memory, bytes | stack frame, bytes |\n|---|---|---|---|---|")
    for k in found:
        print(f"| {k.name} | {k.architecture} | {k.registers} | {k.shared} | {k.stack} |")
    if any(k.stack or k.spilled for k in found):
        sys.exit("a kernel spills registers or has a stack frame")


if __name__ == "__main__":
    main()
