"""The kernels that ``make cuda-audit`` looks at, and what it expects of each: one line for an instance that counts.

Threads and dynamic shared memory are those of the launches in csrc. A tile is one turn of the innermost loop that both
loads and multiplies; where loading comes before the multiplication, it is the whole of a thread's work.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class HotKernel:
    name: str  # as tools/cuda_resources.py has it
    threads: int
    loads: tuple[int, int]  # so many loads a tile, at least, of so many bytes, at least
    in_flight: int = 0  # bytes of such loads that a thread waits for at once, at least
    tensor: str = ""  # the instruction of tensor cores that must be there
    multiply_adds: int = 0  # of a thread and tile, if it makes several turns of an inner loop
    copies: int = 0  # loads that an inner loop makes in all its turns
    dynamic: int = 0  # bytes of shared memory that the launch asks for
    streams: bool = False  # what it loads comes from memory, once; else mostly from L2
    uniform: bool = False  # the lanes of a warp load the same
    serial: bool = False  # a chain of dependent steps on one SM: neither bound says anything
    most_loads: bool = False  # the main loop is the one that loads most, not the one that multiplies most


def _register(result: int, last: int, threads: int, first: int) -> HotKernel:
    name = f"register_kernel<{result}, float, SizeClass<{threads}, {first}, {last}> >"
    tiles = 4 if threads == 32 else last  # n = 32, 64, 128
    return HotKernel(name, threads, (16, 16), multiply_adds=580 * tiles, streams=True)


_FMA = {128: "FmaTile<128, 64, 8, 4, 16>", 64: "FmaTile<64, 64, 4, 4, 32>", 32: "FmaTile<32, 32, 4, 4, 16>"}
_TOTALS = 128 * 64 * 8  # of a tile, in float64
_SQUARE = 64 * 16 * 16  # bytes of kSquareBytes, float32

HOT_KERNELS = [
    # The window: 4 rows of 16 bytes a lane (8 where four vectors meet 16-bit rows)
    HotKernel("dots_kernel<float, 1, false>", 256, (4, 16), 32, streams=True),
    HotKernel("dots_kernel<bf16, 1, false>", 256, (4, 16), 32, streams=True),
    HotKernel("dots_kernel<double, 1, false>", 256, (4, 16), 32, streams=True),
    HotKernel("dots_kernel<float, 4, false>", 256, (4, 16), 32, streams=True),
    HotKernel("dots_kernel<bf16, 4, false>", 256, (4, 8), 32, streams=True),
    HotKernel("dots_kernel<float, 1, true>", 256, (4, 16), 32, streams=True),
    HotKernel("dots_kernel<bf16, 1, true>", 256, (4, 16), 32, streams=True),
    HotKernel("combine_kernel<float, 1>", 256, (4, 16), 32, streams=True),
    HotKernel("combine_kernel<bf16, 1>", 256, (4, 16), 32, streams=True),
    HotKernel("combine_kernel<float, 4>", 256, (4, 16), 32, streams=True),
    # The core, out of L2: 8 pairs of its entries and a vector's, along a row, down a column, and of rows that rotate
    HotKernel("append_kernel<0>", 256, (16, 8), 128),
    HotKernel("append_kernel<1>", 256, (16, 8), 128),
    HotKernel("drop_kernel<2>", 256, (16, 8), 128),
    HotKernel("begin_kernel", 1024, (0, 0), serial=True),
    HotKernel("find_rotations_kernel", 1024, (0, 0), serial=True),
    # Fixed gradients: elements one by one, of any stride and alignment
    HotKernel(f"gram_kernel<float, float, {_FMA[128]} >", 256, (12, 4), multiply_adds=512, dynamic=_TOTALS),
    HotKernel(f"gram_kernel<bf16, float, {_FMA[128]} >", 256, (12, 2), multiply_adds=512, dynamic=_TOTALS),
    HotKernel(f"gram_kernel<float, float, {_FMA[64]} >", 256, (16, 4), multiply_adds=512),
    HotKernel(f"gram_kernel<float, float, {_FMA[32]} >", 64, (16, 4), multiply_adds=256),
    HotKernel("gram_kernel<float, double, MmaTile<128, 64, 4, 2, 8> >", 256, (6, 4), tensor="DMMA"),
    HotKernel("column_squares_kernel<float>", 256, (12, 4), multiply_adds=512),
    HotKernel("column_squares_kernel<double>", 256, (6, 8), tensor="DMMA"),
    HotKernel(f"block_product_kernel<float, {_FMA[128]} >", 256, (12, 4), multiply_adds=512),
    HotKernel(f"block_product_kernel<float, {_FMA[32]} >", 64, (16, 4), multiply_adds=256),
    # Kronecker factors
    HotKernel("products_kernel<float, 128, false, Products>", 256, (8, 4), multiply_adds=512),
    HotKernel("products_kernel<float, 128, false, Together<FactorProducts> >", 256, (8, 4), multiply_adds=512),
    HotKernel("products_kernel<float, 64, false, Products>", 256, (4, 4), multiply_adds=128),
    HotKernel("products_kernel<double, 64, false, Products>", 256, (4, 8), multiply_adds=128),
    HotKernel("tensor_kernel<bf16, Products>", 128, (8, 16), 256, "HMMA", copies=8, dynamic=3 * 2 * 32 * 136 * 2),
    HotKernel("tensor_kernel<float, Products>", 128, (8, 16), 256, "HMMA", copies=8, dynamic=3 * 2 * 16 * 136 * 4),
    HotKernel(
        "tensor_kernel<bf16, Together<FactorProducts> >",
        128,
        (8, 16),
        256,
        "HMMA",
        copies=8,
        dynamic=3 * 2 * 32 * 136 * 2,
    ),
    HotKernel("finish_kernel<float, 32, 1>", 256, (1, 4), streams=True, most_loads=True),
    HotKernel("finish_kernel<float, 8, 4>", 256, (1, 4), streams=True, most_loads=True),
    HotKernel("state_kernel<float>", 256, (1, 4), streams=True, most_loads=True),
    HotKernel("expand_kernel<float>", 256, (2, 4), streams=True),
    # Cholesky: the inverse and the inverse's factor, float32
    _register(0, 7, 32, 1),
    _register(0, 8, 96, 8),
    _register(0, 16, 160, 9),
    _register(2, 16, 160, 9),
    HotKernel("panel_kernel<0, float>", 128, (16, 16), multiply_adds=580 * 8, dynamic=_SQUARE + 64 * 128 * 4),
    HotKernel("update_kernel<0, float>", 64, (48, 16), multiply_adds=4096, copies=16, dynamic=2 * _SQUARE),
    HotKernel("update_kernel<2, float>", 64, (48, 16), multiply_adds=4096, copies=16, dynamic=2 * _SQUARE),
    HotKernel("solve_kernel<float, 1>", 32, (16, 16), uniform=True),
    HotKernel("solve_kernel<float, 8>", 256, (16, 16), uniform=True),
]
