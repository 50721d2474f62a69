"""M-FAC on a fixed set of gradients, in float64: the paper's recursion as written, and what it computes.

grads (m, d); n, the divisor, is m unless given. Blocks are of block_size coordinates, the last one ragged.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mfac_kernels.reference.window import core, fisher


def gram(grads: Tensor) -> Tensor:
    """S = G G^T -> (m, m)."""
    return core(grads, 0.0)


def block_gram(grads: Tensor, block_size: int) -> Tensor:
    """gram of each block -> (blocks, m, m)."""
    parts = [gram(part) for part in _blocks(grads, block_size)]
    return torch.stack(parts) if parts else torch.zeros(0, len(grads), len(grads)).double()


def recursion(grads: Tensor, damping: float, n: int | None = None) -> tuple[Tensor, Tensor]:
    """The paper's precomputation -> V (m, d), q (m,):

    v_i = g_i / damping - sum_{j<i} v_j (v_j . g_i) / q_j,    q_i = n + g_i . v_i
    """
    g = grads.double()
    v, q = torch.zeros_like(g), g.new_zeros(len(g))
    for i, gi in enumerate(g):
        v[i] = gi / damping
        for j in range(i):
            v[i] -= v[j] * (v[j] @ gi) / q[j]
        q[i] = (len(g) if n is None else n) + gi @ v[i]
    return v, q


def block_recursion(
    grads: Tensor, block_size: int, damping: float, n: int | None = None
) -> list[tuple[Tensor, Tensor]]:
    """The paper's block version: a recursion for each block of coordinates."""
    return [recursion(part, damping, n) for part in _blocks(grads, block_size)]


def recursion_ihvp(v: Tensor, q: Tensor, damping: float, x: Tensor) -> Tensor:
    """F^-1 x = x / damping - sum_i v_i (v_i . x) / q_i -> (d,)."""
    return x.double() / damping - (v @ x.double() / q) @ v


def recursion_elements(v: Tensor, q: Tensor, damping: float) -> Tensor:
    """[F^-1]_kl = delta_kl / damping - sum_i v_ik v_il / q_i, all of them -> (d, d)."""
    return torch.eye(v.shape[1], dtype=v.dtype) / damping - v.mT @ (v / q[:, None])


def inverse_transform(grads: Tensor, damping: float, n: int | None = None) -> Tensor:
    """L^-1 (m, m), lower triangular, with L L^T = n damping I + G G^T."""
    lower = torch.linalg.cholesky(core(grads, (len(grads) if n is None else n) * damping))
    unit = torch.eye(len(grads), dtype=torch.float64)
    transform: Tensor = torch.linalg.solve_triangular(lower, unit, upper=False)
    return transform.contiguous()


def inverse_diagonal(grads: Tensor, transform: Tensor, damping: float) -> Tensor:
    """(1 - sum_i (T G)_ij^2) / damping -> (d,)."""
    return (1 - (transform.double() @ grads.double()).square().sum(0)) / damping


def block_inverse(grads: Tensor, block_size: int, damping: float, count: int) -> list[Tensor]:
    """(damping I + G_b^T G_b / count)^-1 of each block."""
    return [torch.linalg.inv(fisher(part, damping, count)) for part in _blocks(grads, block_size)]


def constrained_minimum(fisher: Tensor, values: Tensor, fixed: Tensor) -> Tensor:
    """The y that minimises y^T F y / 2 with y = values where fixed, with its multipliers: [F C^T; C 0] [y; u] = [0; v].

    fisher (d, d), values (d,), fixed (d,) bool -> (d,).
    """
    c = torch.eye(len(values), dtype=torch.float64)[fixed]
    zeros = torch.zeros(len(c), len(c), dtype=torch.float64)
    system = torch.cat([torch.cat([fisher.double(), c.mT], dim=1), torch.cat([c, zeros], dim=1)])
    right = torch.cat([torch.zeros(len(values), dtype=torch.float64), values.double()[fixed]])
    solution: Tensor = torch.linalg.solve(system, right)
    return solution[: len(values)]


def _blocks(grads: Tensor, block_size: int) -> list[Tensor]:
    return [grads[:, k : k + block_size] for k in range(0, grads.shape[1], block_size)]
