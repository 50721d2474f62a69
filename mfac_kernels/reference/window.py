"""Sliding-window M-FAC from its formulas: dense matrices, float64, a list of gradients."""

from __future__ import annotations

import torch
from torch import Tensor


def fisher(grads: Tensor, damping: float, n: int) -> Tensor:
    """F = damping I + (1/n) sum_i g_i g_i^T: grads (m, d) -> (d, d)."""
    g = grads.double()
    dense: Tensor = damping * torch.eye(g.shape[1], dtype=torch.float64) + g.mT @ g / n
    return dense


def ihvp(grads: Tensor, damping: float, n: int, x: Tensor) -> Tensor:
    """F^-1 x by a dense solve: grads (m, d), x (d,) or (k, d) -> x's shape."""
    columns = x.double().reshape(-1, grads.shape[1]).mT
    product: Tensor = torch.linalg.solve(fisher(grads, damping, n), columns)
    return product.mT.reshape(x.shape)


def woodbury(grads: Tensor, damping: float, n: int, x: Tensor) -> Tensor:
    """F^-1 x = (x - G^T K^-1 G x) / damping with K = n damping I + G G^T, for any d: x (k, d) -> (k, d)."""
    g, x = grads.double(), x.double()
    k = core(grads, n * damping)
    product: Tensor = (x - torch.linalg.solve(k, g @ x.mT).mT @ g) / damping
    return product


def newest(grads: Tensor, damping: float, n: int, row: int) -> Tensor:
    """F^-1 g for g = grads[row], by the push-through identity n G^T K^-1 e_row -> (d,)."""
    unit = torch.zeros(len(grads), dtype=torch.float64)
    unit[row] = 1
    product: Tensor = n * (torch.linalg.solve(core(grads, n * damping), unit) @ grads.double())
    return product


def core(grads: Tensor, shift: float) -> Tensor:
    """K = shift I + G G^T -> (m, m)."""
    g = grads.double()
    return shift * torch.eye(len(g), dtype=torch.float64) + g @ g.mT
