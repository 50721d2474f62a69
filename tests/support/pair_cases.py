"""M = sum_r w_r g_r g_r^T (x) a_r a_r^T dense, and what its nearest Kronecker product is, in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def dense(a: Tensor, g: Tensor, weights: Tensor | float = 1.0) -> Tensor:
    """(p, p) of rows (n, inputs) and (n, outputs), over the gradient row-major; weights (n,)."""
    rows = torch.einsum("no,ni->noi", g, a).flatten(1)
    return (rows.mT * weights) @ rows


def rearranged(m: Tensor, outputs: int) -> Tensor:
    """R (inputs^2, outputs^2) with R(B (x) A) = vec(A) vec(B)^T."""
    inputs = len(m) // outputs
    return m.view(outputs, inputs, outputs, inputs).permute(1, 3, 0, 2).reshape(inputs**2, outputs**2)


def nearest(m: Tensor, outputs: int, rank: int = 1) -> Tensor:
    """The sum of ``rank`` products B (x) A that is nearest to M, by the SVD of the rearrangement."""
    u, s, v = torch.linalg.svd(rearranged(m, outputs), full_matrices=False)
    r = (u[:, :rank] * s[:rank]) @ v[:rank]
    inputs = len(m) // outputs
    return r.view(inputs, inputs, outputs, outputs).permute(2, 0, 3, 1).reshape(len(m), len(m))


def partial_traces(m: Tensor, outputs: int) -> tuple[Tensor, Tensor]:
    """Over outputs, in A's shape, and over inputs, in B's."""
    inputs = len(m) // outputs
    x = m.view(outputs, inputs, outputs, inputs)
    return torch.einsum("oioj->ij", x), torch.einsum("oipi->op", x)
