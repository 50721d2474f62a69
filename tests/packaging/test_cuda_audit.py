"""`make cuda-audit` reads machine code right, and notices loads that get narrower and local memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import cuda_audit
import cuda_resources
import pytest
import sass
from cuda_devices import DEVICES
from cuda_hot_kernels import HotKernel

# rows_kernel of the head of the file: two loads of 16 bytes a turn, or, where the row ends, single elements in a loop.
SAMPLE = (Path(__file__).parent / "sample.sass").read_text()
HOT = HotKernel("rows_kernel", 256, (2, 16), streams=True)


def read(text: str = SAMPLE) -> sass.Function:
    (function,) = sass.read(text.splitlines())
    return function


def faults(text: str, hot: HotKernel = HOT) -> list[str]:
    function = read(text)
    return list(cuda_audit.faults(function, hot, cuda_audit.tile_of(function, hot)))


def test_instructions():
    function = read()
    assert (function.name, function.architecture, len(function.instructions)) == ("rows_kernel", "sm_90", 88)
    load = next(i for i in function.instructions if i.name == "LDG")
    assert (load.opcode, load.width, load.global_bytes) == ("LDG.E.128", 16, 16)
    assert load.sets < 6
    branch = next(i for i in function.instructions if i.name == "BRA")
    assert (branch.guard, branch.target, branch.falls_through) == ("@P0", 0x480, True)


@pytest.mark.parametrize(
    "opcode, width, multiply_adds",
    [
        ("LDG.E.U16.CONSTANT", 2, 0),
        ("LDG.E.64", 8, 0),
        ("FFMA", 4, 1),
        ("HMMA.16816.F32.BF16", 4, 64),
        ("HMMA.1688.F32.TF32", 4, 32),
        ("DMMA.884", 4, 8),
        ("DMMA.16x8x8", 4, 32),
        ("HFMA2.MMA", 4, 0),
    ],
)
def test_one_instruction(opcode, width, multiply_adds):
    instruction = sass.Instruction(0, "", opcode, "")
    assert (instruction.width, instruction.multiply_adds) == (width, multiply_adds)


def test_loops():
    function = read()
    inner, outer = function.loops
    assert [function.blocks[loop.header].instructions[0].address for loop in (inner, outer)] == [0x2E0, 0x120]
    assert function.outer(inner) is outer and function.outer(outer) is None
    # The main loop is the outer one, on the way past the inner.
    assert cuda_audit.main_loop(function, HOT) is outer
    assert inner not in function.path(outer)
    tile = cuda_audit.tile_of(function, HOT)
    assert (tile.loads, tile.multiply_adds, tile.bytes) == ({("LDG", 16): 2}, 3, 32)


def test_in_flight():
    """Both loads are on their way before the first is waited for, or one if the second waits for it."""
    path = cuda_audit.tile_of(read(), HOT).instructions
    assert sass.most_in_flight(path) == 32
    assert sass.most_in_flight(path, least=32) == 0
    first, second = (i for i in path if i.name == "LDG")
    waits = replace(second, word=second.word | 1 << 52 + first.sets)
    assert sass.most_in_flight([waits if i is second else i for i in path]) == 16


def test_copies_in_flight():
    copy, commit = sass.Instruction(0, "", "LDGSTS.E.BYPASS.128", ""), sass.Instruction(0, "", "LDGDEPBAR", "")
    wait = sass.Instruction(0, "", "DEPBAR.LE", "SB0, 0x1")
    assert sass.most_in_flight([wait, copy, commit]) == 32  # the newest group may still be on its way
    assert sass.most_in_flight([replace(wait, operands="SB0, 0x0"), copy, commit]) == 16


def test_check():
    assert faults(SAMPLE) == []
    assert faults(SAMPLE.replace("LDG.E.128 R8", "LDG.E.64 R8")) == ["1 loads of 16 bytes or more, expected 2"]
    spilled = SAMPLE.replace("IADD3 R19, R19, 0x400, RZ", "LDL R19, [R1]            ")
    assert faults(spilled) == ["1 accesses to local memory"]
    assert faults(SAMPLE, replace(HOT, in_flight=64)) == ["32 bytes of them in flight, expected 64"]
    assert faults(SAMPLE, replace(HOT, tensor="HMMA")) == ["no HMMA in the main loop"]


def test_bound():
    """Of what latency times bandwidth asks for, one block in eight is on its way: so is the share of memory."""
    device, function = DEVICES["sm_90"], read()
    tile = cuda_audit.tile_of(function, HOT)
    assert cuda_audit.verdict(device, HOT, tile, device.in_flight) == ("memory", "100% of memory")
    assert cuda_audit.verdict(device, HOT, tile, device.in_flight // 8) == ("loads in flight", "12% of memory")
    line, found = cuda_audit.row(function, HOT, registers=32, static=0)
    assert not found
    assert line.startswith("| rows_kernel | 256 | 32 | 0.0 | 8 (64) | threads | 2 x 128 | 64 |")


@pytest.mark.parametrize(
    "architecture, threads, registers, shared, expected",
    [
        ("sm_90", 256, 32, 0, (8, "threads")),
        ("sm_90", 256, 128, 32 << 10, (2, "registers")),
        ("sm_90", 64, 98, 32 << 10, (6, "shared memory")),
        ("sm_80", 128, 254, 63 << 10, (2, "registers")),
        ("sm_120", 128, 254, 63 << 10, (1, "shared memory")),
        ("sm_120", 32, 16, 0, (24, "blocks")),
    ],
)
def test_occupancy(architecture, threads, registers, shared, expected):
    assert DEVICES[architecture].blocks_that_fit(threads, registers, shared) == expected


def test_resources():
    log = (
        "ptxas info    : Compiling entry function '_Z1kv' for 'sm_90'\n"
        "ptxas info    : Function properties for _Z1kv\n"
        "    8 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads\n"
        "ptxas info    : Used 40 registers, used 1 barriers, 256 bytes smem\n"
    )
    assert cuda_resources.kernels(log) == [cuda_resources.Kernel("k", "_Z1kv", "sm_90", 8, 4, 40, 256)]
