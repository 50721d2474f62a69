"""What ptxas says of each kernel, as a table; fails if one spills registers or has a stack frame.

nvcc -Xptxas -v ... 2>&1 | python tools/cuda_resources.py
"""

import re
import subprocess
import sys

log = sys.stdin.read()
pattern = re.compile(
    r"Compiling entry function '(\w+)' for '(\w+)'\n.*\n +(\d+) bytes stack frame, (\d+) bytes spill stores.*\n"
    r".*Used (\d+) registers(?:.* (\d+) bytes smem)?"
)
found = [match.groups(default="0") for match in pattern.finditer(log)]
if not found:
    sys.exit(f"no kernels in what nvcc says:\n{log}")
demangled = subprocess.run(["c++filt"], input="\n".join(row[0] for row in found), capture_output=True, text=True)
names = demangled.stdout.splitlines()
print("| kernel | architecture | registers | shared memory, bytes | stack frame, bytes |\n|---|---|---|---|---|")
for name, (_, architecture, stack, _, registers, shared) in sorted(zip(names, found, strict=True)):
    # without namespaces and the casts that c++filt puts before values of template arguments: (bool)1
    short = re.sub(r"^void |mfac_kernels::|\(anonymous namespace\)::|\([\w:]+\)(?=\d)", "", name)
    short = short.split("(")[0]
    print(f"| {short} | {architecture} | {registers} | {shared} | {stack} |")
if any((row[2], row[3]) != ("0", "0") for row in found):
    sys.exit("a kernel spills registers or has a stack frame")
