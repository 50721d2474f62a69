"""Float64 Cholesky factors of K = shift I + G G^T, in batches of blocks, for what is not a step."""

from __future__ import annotations

import torch
from torch import Tensor

from mfac_kernels.ops.window import core_refactor_


def cholesky(gram: Tensor, shift: float) -> Tensor:
    """L L^T = shift I + gram for each block -> (blocks, m, m).

    A block that rounding has made indefinite is factored with its pivots held at ``shift``, the bound that they have in
    exact arithmetic.
    """
    shifted = gram.clone()
    shifted.diagonal(dim1=1, dim2=2).add_(shift)
    lower, info = torch.linalg.cholesky_ex(shifted)
    for k in info.nonzero()[:, 0].tolist():
        factor = torch.zeros_like(gram[k])
        core_refactor_(gram[k], factor, torch.tensor([len(factor), 0]).to(gram.device), shift, False)
        lower[k] = factor.mT
    return lower


def append_row(lower: Tensor, dots: Tensor, shift: float) -> Tensor:
    """L of one more gradient: lower (blocks, m, m), its dots with all (blocks, m + 1) -> (blocks, m + 1, m + 1)."""
    m = lower.shape[-1]
    row = torch.linalg.solve_triangular(lower, dots[:, :m, None], upper=False)[:, :, 0]
    pivot = (dots[:, m] + shift - row.square().sum(1)).clamp_min(shift).sqrt()
    grown = torch.nn.functional.pad(lower, (0, 1, 0, 1))
    grown[:, m, :m] = row
    grown[:, m, m] = pivot
    return grown


def inverse_lower(lower: Tensor) -> Tensor:
    """L^-1 for each block."""
    eye = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
    return torch.linalg.solve_triangular(lower, eye.expand_as(lower), upper=False)
