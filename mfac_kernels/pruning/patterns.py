"""Which weights may be dropped together: groups of consecutive weights, as rows of an index."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mfac_kernels.fisher import _checks

_MOST_SUBSETS = 256


@dataclass(frozen=True)
class Pattern:
    """Groups of ``size`` consecutive weights, of which ``drop`` are dropped together."""

    size: int
    drop: int

    @property
    def choice(self) -> bool:
        """Whether a group leaves a choice of what to drop, as 2:4 does."""
        return self.drop < self.size

    @property
    def sparsity(self) -> float:
        """The highest there is."""
        return self.drop / self.size

    def subsets(self) -> Tensor:
        """What may be dropped of a group -> (subsets, drop) positions in it."""
        return torch.tensor(list(itertools.combinations(range(self.size), self.drop)))

    def groups(self, rows: Sequence[tuple[int, int]]) -> Tensor:
        """The groups of weights that lie as matrices one after another, ``rows`` being (rows, columns) of each.

        -> (q, size) int64: indices into all weights. No group crosses a row. The last one of a row that ``size`` does
        not divide is filled up with -1; where a group leaves a choice it is left out.
        """
        parts, start = [torch.empty(0, self.size, dtype=torch.int64)], 0
        for count, columns in rows:
            row = torch.arange(columns)
            row = (
                row[: columns - columns % self.size]
                if self.choice
                else torch.nn.functional.pad(row, (0, -columns % self.size), value=-1)
            )
            at = start + torch.arange(count)[:, None] * columns
            parts.append(torch.where(row < 0, row, at + row).view(-1, self.size))
            start += count * columns
        return torch.cat(parts)


def parse(pattern: str, group_size: int | None = None) -> Pattern:
    """``"unstructured"``, ``"n:m"``, ``"1xk"`` or ``"block"`` (of ``group_size``, 16 if None), else ValueError."""
    if group_size is not None:
        if pattern != "block":
            raise ValueError(f"group_size: expected None with pattern {pattern!r}, got {group_size}")
        _checks.positive_int("group_size", group_size)
    if pattern == "unstructured":
        return Pattern(1, 1)
    if pattern == "block":
        size = 16 if group_size is None else group_size
        return Pattern(size, size)
    if isinstance(pattern, str) and (match := re.fullmatch(r"1x([1-9]\d*)", pattern)):
        return Pattern(int(match[1]), int(match[1]))
    if isinstance(pattern, str) and (match := re.fullmatch(r"([1-9]\d*):([1-9]\d*)", pattern)):
        kept, size = int(match[1]), int(match[2])
        if kept < size and math.comb(size, kept) <= _MOST_SUBSETS:
            return Pattern(size, size - kept)
    raise ValueError(
        "pattern: expected 'unstructured', 'block', '1xk' or 'n:m' with n < m and at most "
        f"{_MOST_SUBSETS} ways to choose n of m, got {pattern!r}"
    )
