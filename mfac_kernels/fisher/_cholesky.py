"""Float64 Cholesky factors of K = shift I + G G^T, in batches of blocks, for what is not a step."""

from __future__ import annotations

import torch
from torch import Tensor

from mfac_kernels.ops.static import inverse_diagonal
from mfac_kernels.ops.triangular import triangular_inverse_ex


def cholesky(gram: Tensor, shift: float) -> Tensor:
    """L L^T = shift I + gram for each block -> (blocks, m, m). Of ``gram`` the lower triangle is read.

    A gram that rounding has made indefinite beyond the shift is replaced by the nearest one that is not: its negative
    eigenvalues are set to zero.
    """
    shifted = gram.clone()
    shifted.diagonal(dim1=1, dim2=2).add_(shift)
    lower: Tensor
    lower, info = torch.linalg.cholesky_ex(shifted)
    # No Schur complement of shift I + gram is below shift if gram is positive semidefinite.
    lost = lower.diagonal(dim1=1, dim2=2).square().lt(shift / 2).any(1) | (info != 0)
    for k in lost.nonzero()[:, 0].tolist():
        lower[k] = _projected(gram[k], shift)
    return lower


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


def inverse_lower(lower: Tensor) -> Tensor:
    """L^-1 for each block."""
    return triangular_inverse_ex(lower)[0]


def diagonal_of(grads: Tensor, transform: Tensor, damping: float, n: int) -> Tensor:
    """diag(F^-1) (d,) for grads (m, d) and L^-1 (m, m), held to its bound 1 / F_jj, which rounding could cross."""
    diagonal = inverse_diagonal(grads, transform, damping)
    norms = torch.linalg.vector_norm(grads, dim=0, dtype=diagonal.dtype)
    return torch.maximum(diagonal, 1 / (damping + norms.square() / n))
