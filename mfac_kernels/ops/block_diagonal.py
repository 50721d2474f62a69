"""The diagonal blocks of a matrix, and products with a block-diagonal matrix.

A matrix (D, D) cut at every s-th row has g = D // s blocks (s, s) and, if s does not divide D, a last one of D % s.
Blocks of one size are one batch, so that a cut is a list of one or two batches, as the grouped ops take them: nothing
is ever padded.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mfac_kernels.ops._checks import shape_text

__all__ = ["block_diagonal_matmul", "diagonal_blocks", "matmul_block_diagonal"]


def diagonal_blocks(matrix: Tensor, block_size: int) -> list[Tensor]:
    """Views of the diagonal blocks: (..., D, D) -> [(..., g, s, s)], and (..., 1, r, r) if D = g s + r is ragged.

    A block size of D or more gives [(..., 1, D, D)].
    """
    op = "diagonal_blocks"
    if block_size < 1:
        raise RuntimeError(f"{op}: block_size: expected at least 1, got {block_size}")
    if matrix.dim() < 2 or matrix.shape[-1] != matrix.shape[-2]:
        raise RuntimeError(f"{op}: matrix: expected shape (..., D, D), got {shape_text(matrix.shape)}")
    dim = matrix.shape[-1]
    if dim <= block_size:
        return [matrix.unsqueeze(-3)]
    tiles = matrix.unfold(-2, block_size, block_size).unfold(-2, block_size, block_size)  # (..., g, g, s, s)
    blocks = [tiles.diagonal(dim1=-4, dim2=-3).movedim(-1, -3)]
    if ragged := dim % block_size:
        blocks.append(matrix[..., dim - ragged :, dim - ragged :].unsqueeze(-3))
    return blocks


def block_diagonal_matmul(blocks: Tensor | Sequence[Tensor], x: Tensor) -> Tensor:
    """``block_diag(*blocks) @ x``, D the sum of g s: batches (g, s, s), one or a list, x (..., D, k) -> (..., D, k)."""
    op = "block_diagonal_matmul"
    batches = [blocks] if isinstance(blocks, Tensor) else blocks
    _check_blocks(op, batches)
    if any(b.dtype != x.dtype for b in batches):
        kinds = ", ".join(str(b.dtype) for b in batches)
        raise RuntimeError(f"{op}: x: expected the dtype of the blocks, {kinds}, got {x.dtype}")
    rows = [len(b) * b.shape[-1] for b in batches]
    if x.dim() < 2 or x.shape[-2] != sum(rows):
        raise RuntimeError(f"{op}: x: expected {sum(rows)} rows, as the blocks have, got shape {shape_text(x.shape)}")
    parts = zip(batches, x.split_with_sizes(rows, -2), strict=True)
    products = [(b @ part.reshape(*part.shape[:-2], *b.shape[:2], part.shape[-1])).flatten(-3, -2) for b, part in parts]
    return products[0] if len(products) == 1 else torch.cat(products, -2)


def matmul_block_diagonal(x: Tensor, blocks: Tensor | Sequence[Tensor]) -> Tensor:
    """``x @ block_diag(*blocks)``: x (..., k, D) -> (..., k, D). As :func:`block_diagonal_matmul`, all transposed."""
    batches = [blocks] if isinstance(blocks, Tensor) else blocks
    _check_blocks("matmul_block_diagonal", batches)
    if x.dim() < 2:
        raise RuntimeError(f"matmul_block_diagonal: x: expected shape (.., k, D), got {shape_text(x.shape)}")
    return block_diagonal_matmul([b.mT for b in batches], x.mT).mT


def _check_blocks(op: str, batches: Sequence[Tensor]) -> None:
    if not batches:
        raise RuntimeError(f"{op}: blocks: expected at least one batch, got none")
    for i, b in enumerate(batches):
        if b.dim() != 3 or b.shape[-1] != b.shape[-2]:
            raise RuntimeError(f"{op}: blocks[{i}]: expected shape (g, s, s), got {shape_text(b.shape)}")
