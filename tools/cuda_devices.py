"""What an SM has, by architecture, and how many blocks of a kernel fit it: published constants, each with its source.

1. CUDA C++ Programming Guide 13.0, "Technical Specifications per Compute Capability" (threads, blocks, registers,
   shared memory) and "Throughput of Native Arithmetic Instructions" (results a clock); integers at 64 a clock, which
   it has for 8.0 and 9.0, are taken for all. An SM starts 4 instructions of a warp a clock and moves 128 bytes of
   shared memory.
2. NVIDIA's data sheets and architecture whitepapers of A100 (80 GB, SXM), H200 (SXM), B200 (HGX) and GeForce RTX 5090:
   SMs, boost clock, bandwidth, dense rates of tensor cores with sums in float32; L2 of A100: 5120 bytes a clock, taken
   for H200, whose figure is not published, as those of the later ones are not.
3. NVIDIA CCCL, cub/device/dispatch/tuning/tuning_transform.cuh, ``arch_to_min_bytes_in_flight``: bytes that an SM must
   have on their way for the whole bandwidth, which is latency times bandwidth: 16 KB on A100, 32 on H100, 48 on H200,
   64 on B200. RTX 5090, which it does not have: B200's latency times the card's bandwidth.
4. arXiv:2402.13499, "Benchmarking and Dissecting the Nvidia Hopper GPU Architecture": mma reaches 63% of the rate of
   Hopper's tensor cores, wgmma all of it. What it reaches of Blackwell's (tcgen05) is not published: no limit is set.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil


@dataclass(frozen=True)
class Device:
    name: str
    sms: int
    clock: float  # GHz
    bandwidth: float  # GB/s
    in_flight: int  # bytes of an SM
    threads: int
    blocks: int
    shared: int  # bytes
    float32: int  # results a clock, here and below
    float64: int
    tensor: dict[str, int]  # multiply-adds a clock, by the type of the operands
    mma_share: float = 1
    l2: float = 0  # bytes a clock of the whole device

    @property
    def bytes_per_clock(self) -> float:
        """Of memory, for each SM."""
        return self.bandwidth / self.sms / self.clock

    def blocks_that_fit(self, threads: int, registers: int, shared: int) -> tuple[int, str]:
        """On an SM, and what limits them."""
        warps = ceil(threads / 32)
        of_warp = ceil(registers * 32 / 256) * 256  # registers come in units of 256 for a warp, warps for 4 schedulers
        limits = {
            "threads": self.threads // (warps * 32),
            "blocks": self.blocks,
            "registers": 65536 // of_warp // 4 * 4 // warps,
            "shared memory": self.shared // (ceil(shared / 128) * 128 + 1024),  # 1 KB of each is the system's
        }
        limit = min(limits, key=lambda name: limits[name])
        return limits[limit], limit


_KB = 1024
_5090_IN_FLIGHT = int(64 * _KB * 148 / 8000 * 1792 / 170)
DEVICES = {
    "sm_80": Device(
        "A100", 108, 1.41, 2039, 16 * _KB, 2048, 32, 164 * _KB, 64, 32, {"bf16": 1024, "tf32": 512, "f64": 64}, l2=5120
    ),
    "sm_90": Device(
        "H200",
        132,
        1.98,
        4800,
        48 * _KB,
        2048,
        32,
        228 * _KB,
        128,
        64,
        {"bf16": 2048, "tf32": 1024, "f64": 128},
        0.63,
        5120,
    ),
    "sm_100": Device(
        "B200", 148, 1.965, 8000, 64 * _KB, 2048, 32, 228 * _KB, 128, 64, {"bf16": 4096, "tf32": 2048, "f64": 64}
    ),
    "sm_120": Device(
        "RTX 5090", 170, 2.407, 1792, _5090_IN_FLIGHT, 1536, 24, 100 * _KB, 128, 2, {"bf16": 256, "tf32": 128, "f64": 2}
    ),
}
