"""``python tools/cuda_audit.py build/cuda-check benchmarks/results/cuda_audit.md``: what bounds the hot kernels.

Reads the objects that `make cuda-check` left, writes a table for each architecture, and fails if a hot kernel
(tools/cuda_hot_kernels.py) has fewer or narrower loads than expected, or fewer of them in flight, or local memory, or
no tensor cores where it should.

The main loop is the one with most multiply-adds (or bytes loaded, for kernels that add and copy) of those whose way
leads through no other one; among equals the one with the widest loads, then the shortest. A tile is that loop, or the
one around it that loads, or the whole kernel. Inner loops count as often as the list says; of those side by side that
load, the ones that load less in a turn are remainders of an unrolled one and left out. tools/sass.py says which way
through a loop is followed.

The bounds of a tile, in clocks of an SM: bytes at the bandwidth of memory, times what is needed in flight over what is
there (Little's law), or at that of L2 for operands that several tiles share; multiply-adds at the rate of their unit;
instructions at 4 a clock; integer operations; shared memory without conflicts of banks. The largest is the bound, and
what it leaves of memory or of the unit is the share. Latency, conflicts, caches and ragged tiles come on top.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import cuda_resources
import sass
from cuda_devices import DEVICES, Device
from cuda_hot_kernels import HOT_KERNELS, HotKernel

_INTEGER = [
    "IABS",
    "IADD",
    "IADD3",
    "IMNMX",
    "ISETP",
    "LEA",
    "LOP3",
    "PLOP3",
    "PRMT",
    "SEL",
    "SHF",
    "VIADD",
    "VIADDMNMX",
    "VIMNMX",
    "VIMNMX3",
    "FSETP",
    "FSEL",
    "FMNMX",
    "MOV",
]
_FLOAT32 = ("FFMA", "FFMA2", "FADD", "FMUL")
_FLOAT64 = ("DFMA", "DADD", "DMUL", "DSETP")


@dataclass
class Tile:
    """One turn of a thread through the main loop and what feeds it."""

    instructions: list[sass.Instruction]  # inner loops as often as they run

    def count(self, names: Iterable[str]) -> int:
        return sum(i.name in names for i in self.instructions)

    @property
    def loads(self) -> Counter[tuple[str, int]]:
        return Counter((i.name, i.width) for i in self.instructions if i.global_bytes)

    @property
    def bytes(self) -> int:
        return _bytes(self.instructions)

    @property
    def multiply_adds(self) -> int:
        return sum(i.multiply_adds for i in self.instructions)

    @property
    def tensor(self) -> str:
        return next((i.opcode for i in self.instructions if i.name in sass.TENSOR), "")

    @property
    def wavefronts(self) -> int:
        """Of shared memory, of a warp: at least one for a load, whose lanes may share words."""
        total = 0
        for i in self.instructions:
            if i.name == "LDSM":
                total += int(i.opcode[-1]) if i.opcode[-1] in "24" else 1
            elif i.name in ("STS", "LDGSTS"):
                total += max(1, i.width * 32 // 128)
            else:
                total += i.name == "LDS"
        return total


def main_loop(function: sass.Function, hot: HotKernel) -> sass.Loop | None:
    def score(loop: sass.Loop) -> tuple[int, int, int]:
        steps = [step for step in function.path(loop) if isinstance(step, sass.Instruction)]
        work = sum(i.global_bytes if hot.most_loads else i.multiply_adds for i in steps)
        return work, sum(i.global_bytes for i in steps if i.width >= 16), -len(steps)

    def is_innermost(loop: sass.Loop) -> bool:
        return not any(score(step)[0] for step in function.path(loop) if isinstance(step, sass.Loop))

    innermost = filter(is_innermost, function.loops)
    return max(innermost, key=score, default=None)


def tile_of(function: sass.Function, hot: HotKernel) -> Tile:
    main = main_loop(function, hot)

    def unfold(scope: sass.Loop | None) -> list[sass.Instruction]:
        steps = function.path(scope)
        turns = {id(step): unfold(step) for step in steps if isinstance(step, sass.Loop)}
        most = max((_bytes(turn) for loop, turn in turns.items() if loop != id(main)), default=0)
        found: list[sass.Instruction] = []
        for step in steps:
            if isinstance(step, sass.Instruction):
                found.append(step)
                continue
            turn = turns[id(step)]
            if step is main:
                found += turn * max(1, round(hot.multiply_adds / max(1, sum(i.multiply_adds for i in turn))))
            elif _bytes(turn) == most:
                found += turn * max(1, hot.copies // max(1, sum(i.global_bytes > 0 for i in turn)))
        return found

    scope = main
    while scope is not None and not hot.serial and not _bytes(unfold(scope)):
        scope = function.outer(scope)
    return Tile(unfold(scope))


def _bytes(instructions: Iterable[sass.Instruction]) -> int:
    return sum(i.global_bytes for i in instructions)


def faults(function: sass.Function, hot: HotKernel, tile: Tile) -> Iterator[str]:
    if local := sum(i.name in ("LDL", "STL") for i in function.instructions):
        yield f"{local} accesses to local memory"
    count, width = hot.loads
    wide = sum(n for (_, bytes_), n in tile.loads.items() if bytes_ >= width)
    if wide < count:
        yield f"{wide} loads of {width} bytes or more, expected {count}"
    in_flight = sass.most_in_flight(tile.instructions, width)
    if in_flight < hot.in_flight:
        yield f"{in_flight} bytes of them in flight, expected {hot.in_flight}"
    if hot.tensor and not tile.tensor.startswith(hot.tensor):
        yield f"no {hot.tensor} in the main loop"


def bounds(device: Device, hot: HotKernel, tile: Tile, in_flight: int) -> tuple[dict[str, float], str]:
    """Clocks of an SM for one warp's tile, and the name of the unit that multiplies."""
    loaded = sum(i.global_bytes for i in tile.instructions if i.width >= hot.loads[1])
    clocks = {
        "instructions": len(tile.instructions) / 4,
        "integers": tile.count(_INTEGER) * 32 / 64,
        "shared memory": float(tile.wavefronts),
        "float32": tile.count(_FLOAT32) * 32 / device.float32,
        "float64": tile.count(_FLOAT64) * 32 / device.float64,
    }
    if hot.streams:
        clocks["memory"] = loaded * 32 / device.bytes_per_clock
        clocks["loads in flight"] = clocks["memory"] * device.in_flight / max(1, min(in_flight, device.in_flight))
    elif device.l2 and not hot.uniform:
        clocks["L2"] = loaded * 32 / (device.l2 / device.sms)
    unit = "float64" if tile.count(_FLOAT64) > tile.count(_FLOAT32) else "float32"
    if tile.tensor:
        kind = "f64" if tile.tensor.startswith("DMMA") else "tf32" if "TF32" in tile.tensor else "bf16"
        unit = "tensor cores"
        mma = sum(i.multiply_adds for i in tile.instructions if i.name in sass.TENSOR)
        clocks[unit] = mma * 32 / device.tensor[kind] / (device.mma_share if kind != "f64" else 1)
    return clocks, unit


def verdict(device: Device, hot: HotKernel, tile: Tile, in_flight: int) -> tuple[str, str]:
    if hot.serial:
        return "latency, on one SM", ""
    clocks, unit = bounds(device, hot, tile, in_flight)
    bound = max(clocks, key=lambda name: clocks[name])
    if hot.streams and clocks["memory"] >= clocks[unit]:
        share, of = clocks["memory"] / clocks[bound], "memory"
    else:
        share, of = clocks[unit] / clocks[bound] * (device.mma_share if "HMMA" in tile.tensor else 1), unit
    if bound == "loads in flight" and in_flight >= device.in_flight:
        bound = "memory"
    return bound, f"{share:.0%} of {of}"


def row(function: sass.Function, hot: HotKernel, registers: int, static: int) -> tuple[str, list[str]]:
    device = DEVICES[function.architecture]
    tile = tile_of(function, hot)
    shared = static + hot.dynamic
    blocks, limit = device.blocks_that_fit(hot.threads, registers, shared)
    in_flight = sass.most_in_flight(tile.instructions, hot.loads[1]) * hot.threads * (1 if hot.serial else blocks)
    if hot.uniform:
        in_flight //= 32
    kinds = {"LDG": "", "LDGSTS": "async "}
    loads = ", ".join(
        f"{n} x {kinds.get(k, k)}{8 * width}" for (k, width), n in sorted(tile.loads.items(), reverse=True)
    )
    others = sum(not i.multiply_adds for i in tile.instructions)
    bound, share = verdict(device, hot, tile, in_flight)
    barriers = sum(i.name == "BAR" for i in tile.instructions)
    cells = [hot.name.replace(" >", ">"), hot.threads, registers, f"{shared / 1024:.1f}"]
    cells += [f"{blocks} ({blocks * hot.threads // 32})", limit, loads, f"{in_flight / 1024:.0f}"]
    cells += [f"{n / tile.bytes:.2g}" if tile.bytes else f"{n} in all" for n in (tile.multiply_adds, others)]
    cells += [".".join(tile.tensor.split(".")[:2]), barriers, bound, share]
    return f"| {' | '.join(map(str, cells))} |", list(faults(function, hot, tile))


HEAD = """# What bounds the CUDA kernels

`make cuda-audit`, from the machine code of CUDA 13.0: **bounds from the code, not measured**. `tools/cuda_audit.py`
says how the main loop and its bounds are found, `tools/cuda_devices.py` has the devices' constants and their sources.

- **Blocks** on an SM, and warps; then what limits them.
- **Loads** from global memory by a thread in one tile (a turn of the main loop and what feeds it), in bits; `async`
  ones go past registers.
- **In flight**: KB that an SM waits for at most, by the barriers for which instructions wait; what hides the latency at
  full bandwidth stands with each device.
- **Per byte** loaded: multiply-adds, and other instructions. **Barriers**: those of a thread block, in a tile.
- **Share**: the most that the bound leaves of the bandwidth of memory, or of the rate of the unit that multiplies.
  Latency between barriers, conflicts of banks and ragged tiles come on top. Kernels that do not stream take operands
  from L2.
- Tensor cores are used by `mma` (HMMA, DMMA) everywhere: one source runs from sm_80 on. On sm_90 that reaches 63% of
  what `wgmma` (HGMMA) does, which needs swizzled operands in shared memory and groups of four warps; it has no float64.
"""
COLUMNS = [
    *("kernel", "threads", "registers", "shared KB", "blocks (warps)", "limited by", "loads of a tile", "in flight KB"),
    *("multiply-adds per byte", "others per byte", "tensor cores", "barriers", "bound", "share"),
]


def disassemble(build: Path, names: set[str]) -> Iterator[sass.Function]:
    """Of every architecture; the tools are those of the toolkit or of PyPI's nvidia-cuda-cuobjdump and -nvdisasm."""
    wheels = [str(path) for path in Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin")]
    path = os.pathsep.join([*wheels, os.environ.get("PATH", os.defpath)])
    for binary in build.glob("*.cu.o"):
        file = binary.name.split(".")[-3]  # which mangled names contain
        if chosen := sorted(name for name in names if f"_{file}_cu_" in name):
            command = ["cuobjdump", "-sass", "-fun", ",".join(chosen), str(binary)]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PATH": path}) as tool:
                assert tool.stdout
                yield from sass.read(tool.stdout)
            if tool.returncode:
                sys.exit(f"cuobjdump: exit status {tool.returncode} for {binary}")


def main() -> None:
    build, report = Path(sys.argv[1]), Path(sys.argv[2])
    log = build / "log"
    newest = max(path.stat().st_mtime for path in Path("csrc").rglob("*.cu*"))
    if not log.exists() or log.stat().st_mtime < newest:
        sys.exit(f"{build}: expected objects of the present csrc: make cuda-check")
    kernels = {(k.mangled, k.architecture): k for k in cuda_resources.kernels(log.read_text())}
    hot = {kernel.name: kernel for kernel in HOT_KERNELS}
    functions = {
        (kernels[f.name, f.architecture].name, f.architecture): f
        for f in disassemble(build, {k.mangled for k in kernels.values() if k.name in hot})
    }
    text, wrong = HEAD, []
    for architecture, device in DEVICES.items():
        rates = {"float32": device.float32, "float64": device.float64}
        rates |= {f"{kind} on tensor cores": rate for kind, rate in device.tensor.items()}
        text += (
            f"\n## {architecture}: {device.name}\n\n"
            f"{device.sms} SMs at {device.clock} GHz, {device.bandwidth:.0f} GB/s "
            f"({device.bytes_per_clock:.1f} bytes a clock and SM), "
            f"{device.in_flight / 1024:.0f} KB in flight on an SM. "
            f"Multiply-adds a clock and SM: {', '.join(f'{rate} {unit}' for unit, rate in rates.items())}.\n\n"
            f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}\n"
        )
        for kernel in HOT_KERNELS:
            function = functions.get((kernel.name, architecture))
            if function is None:
                wrong.append(f"{kernel.name}, {architecture}: not found")
                continue
            resources = kernels[function.name, architecture]
            line, found = row(function, kernel, resources.registers, resources.shared)
            text += line + "\n"
            wrong += [f"{kernel.name}, {architecture}: {fault}" for fault in found]
    report.write_text(text)
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
