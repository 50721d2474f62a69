"""Blocks for the batched Cholesky ops, and what their results are held to.

Bounds. In precision eps the factor is exact for a matrix that is off by c n eps norm(A), and so are solves with it
(Higham, Accuracy and Stability of Numerical Algorithms, theorems 10.3 and 10.4); inverses have a relative error of
c n eps cond(A) (section 14.3). c = 4: a rounding is eps / 2, and there are three stages. Theory has another factor of
up to n, for rounding errors that all point the same way.
"""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

import mfac_kernels as mk
from mfac_kernels.reference import cholesky as reference

FLOATS = [torch.float32, torch.float64]
DTYPES = [*FLOATS, torch.bfloat16, torch.float16]
EPS = {dtype: torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps for dtype in DTYPES}
SIMT = bool(mk.build_info()["simt"])
NAN = float("nan")

dtypes = st.sampled_from(DTYPES)
sizes = st.one_of(st.integers(0, 20), st.sampled_from([31, 32, 33, 48, 64, 65] + [] if SIMT else [96, 100, 128, 129]))
seeds = st.integers(0, 2**31)


def spd(
    batch: tuple[int, ...], n: int, cond: float | Tensor = 100.0, dtype: torch.dtype = torch.float64, seed: int = 0
) -> Tensor:
    """Dense, eigenvalues from 1 down to 1 / cond in even ratios: (*batch, n, n) before it is rounded to dtype."""
    generator = torch.Generator().manual_seed(seed)
    eigenvalues = torch.as_tensor(cond, dtype=torch.float64)[..., None] ** -torch.linspace(0, 1, n, dtype=torch.float64)
    a = torch.diag_embed(eigenvalues.expand(*batch, n))
    for _ in range(2):  # two reflections I - 2 v v^T
        v = torch.nn.functional.normalize(torch.randn(*batch, n, 1, generator=generator, dtype=torch.float64), dim=-2)
        a = a - 2 * v @ (v.mT @ a)
        a = a - 2 * (a @ v) @ v.mT
    return ((a + a.mT) / 2).to(dtype)


def junk_above(blocks: Tensor) -> Tensor:
    """The same lower triangles under NaN, which nothing may read."""
    return blocks.tril() + torch.full_like(blocks, NAN).triu(1)


def truth(blocks: Tensor, damping: float | Tensor = 0.0, cond: float | None = None) -> tuple[Tensor, Tensor]:
    """The inverses in float64 and the condition numbers, computed unless given."""
    a = reference.damped(blocks.cpu(), damping)
    if cond is not None or a.numel() == 0:
        return reference.inverse(a), torch.tensor(cond or 1.0)
    eigenvalues = torch.linalg.eigvalsh(a)
    return reference.inverse(a), eigenvalues[..., -1] / eigenvalues[..., 0]


def assert_is(got: Tensor, want: Tensor, cond: Tensor) -> None:
    """Relative error c n eps cond, and exact symmetry."""
    got, n = got.cpu(), want.shape[-1]
    assert got.shape == want.shape
    assert torch.equal(got, got.mT)
    error = torch.linalg.matrix_norm(got.double() - want)
    bound = 4 * n * EPS[got.dtype] * cond * torch.linalg.matrix_norm(want)
    assert bool((error <= bound).all()), f"{(error / bound).max():g} of the bound at n = {n}"


def assert_inverse(got: Tensor, blocks: Tensor, damping: float | Tensor = 0.0) -> None:
    assert_is(got, *truth(blocks, damping))


def assert_factor(got: Tensor, a: Tensor) -> None:
    lower = got.cpu().double()
    assert torch.equal(lower, lower.tril()) and bool((lower.diagonal(dim1=-2, dim2=-1) > 0).all())
    residual = torch.linalg.matrix_norm(lower @ lower.mT - a)
    assert bool((residual <= 4 * a.shape[-1] * EPS[got.dtype] * torch.linalg.matrix_norm(a)).all())


def indefinite(n: int, pivot: int, dtype: torch.dtype) -> Tensor:
    """L D L^T, D = I but for D_pivot = -1: the leading minor of order pivot + 1 is the first that is not positive."""
    lower = torch.randn(n, n, generator=torch.Generator().manual_seed(pivot), dtype=torch.float64).tril(-1) / max(1, n)
    lower = lower + torch.eye(n, dtype=torch.float64)
    signs = torch.ones(n, dtype=torch.float64)
    signs[pivot] = -1
    return ((lower * signs) @ lower.mT).to(dtype)


MIXED = [(3, 5), (0, 7), (20, 33), (1, 64), (2, 0), (17, 16), (2, 100), (40, 1), (1, 3)]
