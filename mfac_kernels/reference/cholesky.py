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
