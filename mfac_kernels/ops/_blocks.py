"""Blocks of the columns of a matrix, the last one ragged."""

from __future__ import annotations

from torch import Tensor

from mfac_kernels.ops._checks import check


def block_width(matrix: Tensor, block_size: int | None) -> int:
    """Columns of a block, no more than there are; None: all. What is no matrix is left to the op to refuse."""
    columns: int = max((1, *matrix.shape[-1:]))
    return columns if block_size is None else min(block_size, columns)


def block_count(op: str, matrix: Tensor, block_size: int) -> int:
    """How many blocks there are; refuses the sizes that the op does."""
    check(block_size > 0, f"{op}: block_size: expected at least 1, got {block_size}")
    return (matrix.shape[1] + block_size - 1) // block_size
