"""Sums of two Kronecker products: their exact inverse, and the one that is nearest to a Fisher matrix."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from mfac_kernels import ops
from mfac_kernels.fisher._checks import positive_int
from mfac_kernels.fisher._pairs import Product


class KroneckerSum:
    """F = (B1 + sqrt(damping) I) (x) (A1 + sqrt(damping) I) + B2 (x) A2, and products with its inverse.

    The two factors of a side are diagonal in one basis: with U A1 U^T = I, U upper, and U A2 U^T = E diag(s) E^T,
    K = U^T E has K^T A1 K = I and K^T A2 K = diag(s), so that

        F^-1 vec(X) = vec(K_B [(K_B^T X K_A) / (1 + s_B s_A^T)] K_A^T)

    exactly, however ill-conditioned the pairs are, with four products of matrices. The first product must be positive
    definite once damped; of the second only symmetry is asked, but F has an inverse only where no 1 + s_B s_A is 0, and
    is positive definite where all are above it: :attr:`values` has them, relative to the first product.

    Args:
        first, second: A (..., a, a) and B (..., b, b) each, with the same leading dimensions: batches of layers.
            float32 or float64; ill-conditioned pairs want float64.
        damping: >= 0, of the first product: F >= damping I if the second is positive semidefinite.
        floor: what lies below it in :attr:`values` is raised to it, as rounding and deflation may ask for; None: not.

    Sources: Martens, Grosse, "Optimizing neural networks with Kronecker-factored approximate curvature", ICML 2015;
    Dangel et al., "Kronecker-factored approximate curvature for physics-informed neural networks", NeurIPS 2024.

    Raises:
        ValueError: shapes that do not fit, a damping or floor out of range.
        torch.linalg.LinAlgError: the first product is not positive definite, one is not finite: waits for the device.
    """

    def __init__(self, first: Product, second: Product, damping: float = 0.0, *, floor: float | None = None) -> None:
        for argument, product in (("first", first), ("second", second)):
            if len(product) != 2:
                raise ValueError(f"{argument}: expected A and B, got {len(product)} matrices")
        for name, one, two in zip("AB", first, second, strict=True):
            if one.dim() < 2 or one.shape[-1] != one.shape[-2] or one.shape != two.shape:
                raise ValueError(
                    f"second: {name}: expected square matrices of one shape in both products, got {tuple(one.shape)} "
                    f"and {tuple(two.shape)}"
                )
        if first[0].shape[:-2] != first[1].shape[:-2]:
            batches = tuple(first[0].shape[:-2]), tuple(first[1].shape[:-2])
            raise ValueError(f"first: expected the same leading dimensions of A and B, got {batches[0]}, {batches[1]}")
        kinds = [x.dtype for product in (first, second) for x in product]
        if len(set(kinds)) > 1 or kinds[0] not in (torch.float32, torch.float64):
            raise ValueError(f"second: expected float32 or float64 throughout, got {', '.join(map(str, kinds))}")
        if not damping >= 0:
            raise ValueError(f"damping: expected a number >= 0, got {damping}")
        if floor is not None and not 0 < floor <= torch.finfo(kinds[0]).max:
            raise ValueError(f"floor: expected a positive number that {kinds[0]} holds, or None, got {floor}")
        (self._inputs, s_a), (self._outputs, s_b) = (
            _joint_basis(one, two, damping**0.5) for one, two in zip(first, second, strict=True)
        )
        values = 1 + s_b[..., :, None] * s_a[..., None, :]
        self.values = values if floor is None else values.clamp_min(floor)

    def ihvp(self, x: Tensor) -> Tensor:
        """F^-1 vec(x), x (..., b, a) -> the same shape."""
        shape = self.values.shape
        if x.shape != shape:
            raise ValueError(f"x: expected shape {tuple(shape)}, got {tuple(x.shape)}")
        x = (self._outputs.mT @ x.to(self.values.dtype) @ self._inputs) / self.values
        return self._outputs @ x @ self._inputs.mT


def _joint_basis(one: Tensor, two: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """K and s with K^T (one + damping I) K = I and K^T two K = diag(s)."""
    root = ops.cholesky_inverse_factor(one, damping)
    product = root @ two.to(root.dtype) @ root.mT
    if not bool(product.isfinite().all()):
        raise LinAlgError("second: expected a product that is finite relative to the first, got NaN or infinity")
    values, vectors = torch.linalg.eigh(product)
    return root.mT @ vectors, values


@torch.no_grad()
def nearest_kronecker_sum(
    inputs: Tensor,
    gradients: Tensor,
    rank: int = 1,
    *,
    weights: Tensor | None = None,
    start: list[Product] | None = None,
    iterations: int = 50,
) -> list[Product]:
    """The sum of ``rank`` products B (x) A that is nearest to (1/n) sum_r w_r g_r g_r^T (x) a_r a_r^T, never formed.

    KPSVD by power iteration on the rearranged matrix R, and deflation: what the first products have is taken away,

        R vec(V) = (1/n) sum_r w_r (g_r^T V g_r) a_r a_r^T - sum_k <V, B_k> A_k
        R^T vec(U) = (1/n) sum_r w_r (a_r^T U a_r) g_r g_r^T - sum_k <U, A_k> B_k

    The first product is positive semidefinite, and the sum that is nearest need not be: see ``floor`` of
    :class:`KroneckerSum`. A and B of a product have the same Frobenius norm, and are zero where R is.

    Args:
        inputs, gradients: (n, a) and (n, b), float32 or float64.
        weights: (n,).
        start: products to begin with, as those of an earlier batch.
        iterations: the error falls with the square of the ratio of two singular values in each.

    Source: Koroko et al., "Efficient approximations of the Fisher matrix in neural networks using Kronecker product
    singular value decomposition", 2022.
    """
    if inputs.dim() != 2 or gradients.dim() != 2 or len(inputs) != len(gradients):
        raise ValueError(
            f"gradients: expected shape (n, outputs) with inputs (n, inputs), got {tuple(gradients.shape)} and "
            f"{tuple(inputs.shape)}"
        )
    positive_int("rank", rank), positive_int("iterations", iterations)
    if weights is not None and tuple(weights.shape) != (len(inputs),):
        raise ValueError(f"weights: expected shape ({len(inputs)},), got {tuple(weights.shape)}")
    if inputs.dtype not in (torch.float32, torch.float64) or gradients.dtype != inputs.dtype:
        raise ValueError(
            f"gradients: expected float32 or float64 as inputs have, got {gradients.dtype} and {inputs.dtype}"
        )
    each = inputs.new_ones(len(inputs)) if weights is None else weights.to(inputs.dtype)
    each = each / max(1, len(inputs))
    found: list[Product] = []
    for k in range(rank):
        # Not I: what is left may have no part in it
        v = torch.linspace(1, 2, gradients.shape[1], dtype=inputs.dtype, device=inputs.device).diag()
        if start is not None:
            v = start[k][1]
        v = _unit(v)
        for _ in range(iterations):
            u = _unit(_product(inputs, gradients, v, each, found))
            v = _product(gradients, inputs, u, each, [(b, a) for a, b in found])
            size = torch.linalg.matrix_norm(v)
            v = _unit(v)
        root = size.sqrt()
        found.append((u * root, v * root))
    return found


def _product(rows: Tensor, partners: Tensor, matrix: Tensor, weights: Tensor, known: list[Product]) -> Tensor:
    """sum_r w_r (p_r^T matrix p_r) r r^T - sum_k <matrix, B_k> A_k."""
    total = rows.new_zeros(rows.shape[1], rows.shape[1])
    by = weights * torch.linalg.vecdot(partners @ matrix, partners)
    ops.linear_factor_(total, rows, weights=by, beta=0.0)
    for a, b in known:
        total -= (matrix * b).sum() * a
    return total


def _unit(matrix: Tensor) -> Tensor:
    norm = torch.linalg.matrix_norm(matrix)
    return matrix / torch.where(norm > 0, norm, 1)
