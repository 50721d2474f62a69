"""Float64 Cholesky factors of K = shift I + G G^T, in batches of blocks, for what is not a step.

The blocks of a network may take gigabytes: they are factored in place, and what else is needed of them is made of a few
at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mfac_kernels.ops.cholesky import cholesky_factor_ex
from mfac_kernels.ops.triangular import triangular_inverse_ex

_GROUP_ELEMENTS = 1 << 22  # what is made of a few blocks, or columns, at a time


def _groups(blocks: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """A few blocks (m, m) at a time, and memory for as many results, the same every time."""
    parts = torch.split(blocks, max(1, _GROUP_ELEMENTS // max(1, blocks.shape[1] * blocks.shape[2])))
    memory = torch.empty_like(parts[0])
    for part in parts:
        yield part, memory[: len(part)]


def cholesky(gram: Tensor, shift: float) -> Tensor:
    """``gram`` (blocks, m, m) <- L of L L^T = shift I + gram for each block. Of ``gram`` the lower triangle is read.

    A gram that rounding has made indefinite beyond the shift is replaced by the nearest one that is not: its negative
    eigenvalues are set to zero.
    """
    for group, lower in _groups(gram):
        _, info = cholesky_factor_ex(group, shift, out=lower)
        # No Schur complement of shift I + gram is below shift if gram is positive semidefinite.
        lost = lower.diagonal(dim1=1, dim2=2).square().lt(shift / 2).any(1) | (info != 0)
        for k in lost.nonzero()[:, 0].tolist():
            lower[k] = _projected(group[k], shift)
        group.copy_(lower)
    return gram


def _projected(gram: Tensor, shift: float) -> Tensor:
    """L of shift I + the positive semidefinite part of gram (m, m): K = A^T A with A = Q R, so that L = R^T."""
    eigenvalues, vectors = torch.linalg.eigh(gram)
    _, r = torch.linalg.qr((eigenvalues.clamp_min(0) + shift).sqrt()[:, None] * vectors.mT)
    lower: Tensor = (r * r.diagonal().sign()[:, None]).mT
    return lower


def append_row(lower: Tensor, dots: Tensor, shift: float) -> Tensor:
    """L of one more gradient: lower (blocks, m, m), its dots with all (blocks, m + 1) -> (blocks, m + 1, m + 1)."""
    m = lower.shape[-1]
    row = torch.linalg.solve_triangular(lower, dots[:, :m, None], upper=False)[:, :, 0]
    pivot = dots[:, m] + shift - row.square().sum(1)
    grown = torch.nn.functional.pad(lower, (0, 1, 0, 1))
    grown[:, m, :m] = row
    grown[:, m, m] = pivot.clamp_min(shift).sqrt()
    for k in (pivot < shift / 2).nonzero()[:, 0].tolist():  # as in cholesky
        gram = torch.nn.functional.pad(lower[k] @ lower[k].mT, (0, 1, 0, 1))
        gram.diagonal()[:m].sub_(shift)
        gram[m] = dots[k]
        grown[k] = _projected(gram, shift)
    return grown


def solve(lower: Tensor, b: Tensor) -> Tensor:
    """(L L^T)^-1 b for each block: b (blocks, m, k)."""
    half = torch.linalg.solve_triangular(lower, b, upper=False)
    solution: Tensor = torch.linalg.solve_triangular(lower.mT, half, upper=True)
    return solution


def inverse_lower(lower: Tensor) -> Tensor:
    """L^-1 for each block."""
    return triangular_inverse_ex(lower)[0]


def each_inverse_lower(lower: Tensor) -> Iterator[Tensor]:
    """L^-1 of one block after the other, each until the next is asked for."""
    for group, inverse in _groups(lower):
        yield from triangular_inverse_ex(group, out=inverse)[0]


def bounded(diagonal: Tensor, grads: Tensor, damping: float, n: int) -> Tensor:
    """diag(F^-1) (d,) for grads (m, d), held to its bound 1 / F_jj, which rounding could cross."""
    width = max(1, _GROUP_ELEMENTS // max(1, len(grads)))
    squares = torch.empty_like(diagonal)
    for part, norms in zip(torch.split(grads, width, dim=1), torch.split(squares, width), strict=True):
        torch.sum(part.to(diagonal.dtype).square(), 0, out=norms)
    return torch.maximum(diagonal, 1 / (damping + squares / n))
