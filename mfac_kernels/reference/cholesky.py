"""Damped symmetric positive definite blocks from their formulas: float64, LAPACK's general inverse."""

from __future__ import annotations

import torch
from torch import Tensor


def damped(blocks: Tensor, damping: float | Tensor = 0.0) -> Tensor:
    """A + damping I, A the symmetric matrix of blocks' lower triangle: (..., n, n) -> (..., n, n)."""
    lower = blocks.double().tril()
    shift = torch.as_tensor(damping, dtype=torch.float64)[..., None, None]
    return lower + lower.tril(-1).mT + shift * torch.eye(blocks.shape[-1], dtype=torch.float64)


def inverse(blocks: Tensor, damping: float | Tensor = 0.0) -> Tensor:
    """(A + damping I)^-1 -> (..., n, n).

    Matrix by matrix: after ``torch.set_num_threads`` the LU factors of a batch with n >= 256 are wrong in torch 2.13
        with MKL.
    """
    matrices = damped(blocks, damping)
    n = matrices.shape[-1]
    inverses = [torch.linalg.inv(matrix) for matrix in matrices.reshape(-1, n, n)] if matrices.numel() else []
    return torch.stack(inverses).view_as(matrices) if inverses else matrices


def factor(blocks: Tensor, damping: float | Tensor = 0.0) -> Tensor:
    """L, lower triangular, with L L^T = A + damping I -> (..., n, n)."""
    result: Tensor = torch.linalg.cholesky(damped(blocks, damping))
    return result


def revived(blocks: Tensor, dead: bool | Tensor) -> Tensor:
    """1 on the diagonal of dead rows: those of the mask (..., n), or those whose diagonal is 0 -> (..., n, n)."""
    diagonal = blocks.double().diagonal(dim1=-2, dim2=-1)
    mask = dead if isinstance(dead, Tensor) else (diagonal == 0) & dead
    return blocks.double() + torch.diag_embed(torch.where(mask, 1 - diagonal, 0.0))


def inverse_factor(blocks: Tensor, damping: float | Tensor = 0.0, upper: bool = True) -> Tensor:
    """The triangular M with a positive diagonal and (A + damping I)^-1 = M^T M -> (..., n, n)."""
    if upper:
        result: Tensor = torch.linalg.cholesky(inverse(blocks, damping), upper=True)
        return result
    return triangular_inverse(factor(blocks, damping))


def triangular_inverse(blocks: Tensor, upper: bool = False) -> Tensor:
    """The inverse of the blocks' upper or lower triangle -> (..., n, n)."""
    triangle = blocks.double().triu() if upper else blocks.double().tril()
    identity = torch.eye(blocks.shape[-1], dtype=torch.float64).expand_as(triangle)
    result: Tensor = torch.linalg.solve_triangular(triangle, identity, upper=upper)
    return result


def solve(lower: Tensor, b: Tensor) -> Tensor:
    """(L L^T)^-1 b: (..., n, n), (..., n, k) -> (..., n, k)."""
    lower = lower.double()
    result: Tensor = torch.linalg.solve(lower @ lower.mT, b.double())
    return result


def info(block: Tensor, damping: float = 0.0) -> int:
    """The code of one block (n, n): 0, the order of the first leading minor that is not positive, or -1: not finite."""
    a = damped(block, damping)
    if not bool(a.isfinite().all()):
        return -1
    minors = (order for order in range(1, len(a) + 1) if float(torch.linalg.eigvalsh(a[:order, :order])[0]) <= 0)
    return next(minors, 0)
