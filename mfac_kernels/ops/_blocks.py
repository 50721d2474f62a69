"""Blocks of the columns of a matrix, the last one ragged."""

from __future__ import annotations

from torch import Tensor

from mfac_kernels.ops._checks import check


def block_count(op: str, matrix: Tensor, block_size: int | None) -> int:
    """How many blocks there are, one of all columns where no size is given; refuses the sizes that the op does."""
    columns = matrix.shape[1]
    if block_size is None:
        return min(1, columns)
    check(block_size > 0, f"{op}: block_size: expected at least 1, got {block_size}")
    return (columns + block_size - 1) // block_size
