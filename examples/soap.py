"""A step of SOAP with its linear algebra from here: `python -m examples.soap`.

SOAP (Vyas et al., "SOAP: Improving and stabilizing Shampoo using Adam", 2024, algorithm 3) runs Adam in the eigenbasis
of Shampoo's statistics L and R of a weight's gradients, and turns the basis by one step of subspace iteration:

    L <- b L + (1 - b) G G^T     Q <- orthogonalise(L Q)

The statistics are :func:`mfac_kernels.ops.linear_factor_`, half of a product's flops. In place of torch.linalg.qr the
basis comes from two passes of Cholesky-QR (Yamamoto et al., 2015), matrix products all of it: S = Y^T Y in float64,
S = C C^T, Q = Y C^-T. A basis whose statistics cannot be factorised stays as it was, and nothing waits for the device
to know.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from examples._timing import before_and_after
from mfac_kernels import ops

Orthogonalise = Callable[[Tensor, Tensor], Tensor]


def by_torch(statistics: Tensor, basis: Tensor) -> Tensor:
    """The Q of torch.linalg.qr(statistics @ basis): what is replaced."""
    return torch.linalg.qr(statistics @ basis).Q


def cholesky_qr(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (n, n) float32 or float64 -> rows that are orthonormal and span the same, each with those before it; info.

    One pass loses c eps64 cond^2 + eps cond of orthogonality; a second one, on what the first one leaves, c eps.
    """
    factor, failed = ops.cholesky_factor_ex(ops.gram(rows, double_precision=True))
    inverse, singular = ops.triangular_inverse_ex(factor)
    return inverse.to(rows.dtype) @ rows, failed | singular


def by_cholesky(statistics: Tensor, basis: Tensor) -> Tensor:
    """The same Q up to the signs of its columns; ``basis`` where info says that there is none."""
    rows = basis.mT @ statistics  # (L Q)^T, whose rows Cholesky-QR wants of like norms: that does not change Q
    rows = rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    for _ in range(2):
        rows, info = cholesky_qr(rows)
    return torch.where(info == 0, rows.mT, basis)


class Soap:
    """The state of one weight (m, n) and its update."""

    def __init__(
        self, weight: Tensor, orthogonalise: Orthogonalise = by_cholesky, betas: tuple[float, float] = (0.95, 0.95)
    ) -> None:
        self.orthogonalise, self.betas, self.steps = orthogonalise, betas, 0
        self.mean, self.square = torch.zeros_like(weight), torch.zeros_like(weight)
        self.statistics = [weight.new_zeros(size, size) for size in weight.shape]
        self.bases: list[Tensor] = []

    def update(self, g: Tensor) -> Tensor:
        """What is to be subtracted from the weight, times the learning rate."""
        b1, b2 = self.betas
        self.steps += 1
        for statistics, rows in zip(self.statistics, (g.mT, g), strict=True):
            ops.linear_factor_(statistics, rows, beta=b2, alpha=1 - b2)
        if not self.bases:
            self.bases = [torch.linalg.eigh(s).eigenvectors for s in self.statistics]
        else:
            self.bases = [self.orthogonalise(s, q) for s, q in zip(self.statistics, self.bases, strict=True)]
        left, right = self.bases
        self.mean.lerp_(g, 1 - b1)
        turned = left.mT @ g @ right
        self.square.lerp_(turned.square(), 1 - b2)
        scale = (1 - b2**self.steps) ** 0.5 / (1 - b1**self.steps)
        return left @ (scale * (left.mT @ self.mean @ right) / (self.square.sqrt() + 1e-8)) @ right.mT


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(192, 128, generator=generator) for _ in range(20)]
    ours, theirs = Soap(gradients[0]), Soap(gradients[0], by_torch)
    for g in gradients:
        got, want = ours.update(g), theirs.update(g)
    print(f"update after {len(gradients)} steps: relative error {float((got - want).norm() / want.norm()):.1e}")
    s, q = ours.statistics[1], ours.bases[1]
    eye = torch.eye(len(q))
    for name, found in {"torch.linalg.qr": by_torch(s, q), "Cholesky-QR": by_cholesky(s, q)}.items():
        print(f"orthogonality of {name}: largest error {float((found.mT @ found - eye).abs().max()):.1e}")
    print(
        f"orthogonalisation of {tuple(q.shape)}: {before_and_after(lambda: by_torch(s, q), lambda: by_cholesky(s, q))}"
    )


if __name__ == "__main__":
    main()
