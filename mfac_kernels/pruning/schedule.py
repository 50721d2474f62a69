"""The sparsities at which curvature is estimated again."""

from __future__ import annotations


def sparsities(target: float, steps: int, start: float = 0.0) -> list[float]:
    """s_j = 1 - (1 - start) f^j for j = 1 .. steps, with f^steps = (1 - target) / (1 - start): each step keeps the
    same share of what is left.

    Raises:
        ValueError: ``steps`` < 1, or not 0 <= start <= target < 1.
    """
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")
    if not 0 <= start <= target < 1:
        raise ValueError(f"target: expected a sparsity in [{start:g}, 1), got {target}")
    factor = ((1 - target) / (1 - start)) ** (1 / steps)
    return [1 - (1 - start) * factor**j for j in range(1, steps)] + [target]
