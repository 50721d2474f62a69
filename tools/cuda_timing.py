"""Times CUDA work by events: what a kernel takes on the device, with cold caches, whatever the host does meanwhile."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

_HEAD_START = 0.5e-3  # seconds for the host to queue what is timed, while the device waits


class Timer:
    """``timer(work)``: seconds between two events around it.

    Before each run a buffer larger than L2 is written, so that no input is found there; then the device idles for as
    long as the host needs to queue the work, whose launches would be timed otherwise.
    """

    def __init__(self, device: str = "cuda") -> None:
        properties = torch.cuda.get_device_properties(device)
        self._flush = torch.empty(4 * max(properties.L2_cache_size, 32 << 20), dtype=torch.uint8, device=device)
        self._cycles = int(_HEAD_START * 1.8e9)  # a clock that no GPU exceeds by much

    def __call__(self, work: Callable[[], object]) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._flush.zero_()
        torch.cuda._sleep(self._cycles)
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def copy_bandwidth(timer: Timer, gigabytes: float = 4, device: str = "cuda") -> float:
    """Bytes read and written per second by a large copy on the device: the ceiling of what moves memory."""
    source = torch.empty(int(gigabytes * 1e9) // 4, device=device).normal_()
    target = torch.empty_like(source)
    seconds = statistics.median(timer(lambda: target.copy_(source)) for _ in range(7))
    return 2 * source.numel() * source.element_size() / seconds
