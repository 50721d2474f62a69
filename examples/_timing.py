"""Time before and after, in turns in one process: only the ratio means anything on a machine that others use."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable


def before_and_after(before: Callable[[], object], after: Callable[[], object], rounds: int = 5) -> str:
    """The medians of ``rounds`` calls each, as text."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds + 1):  # the first one warms up
        for work, taken in zip((before, after), seconds, strict=True):
            start = time.perf_counter()
            work()
            taken.append(time.perf_counter() - start)
    old, new = (1e3 * statistics.median(taken[1:]) for taken in seconds)
    return f"{old:.2f} ms before, {new:.2f} ms after, {old / new:.2f}x"
