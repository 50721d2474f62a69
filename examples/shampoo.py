"""A step of Shampoo over all layers at once: `python -m examples.shampoo`.

Shampoo (Gupta, Koren, Singer, ICML 2018) preconditions a weight's gradient G (m, n) by the inverse fourth roots of its
statistics, kept here as moving averages:

    L <- b L + (1 - b) G G^T     R <- b R + (1 - b) G^T G     update = (L + e I)^(-1/4) G (R + e I)^(-1/4)

All statistics of a network are one call of :func:`mfac_kernels.ops.grouped_linear_factor_`. The roots come from
eigenvalues in float64, those of one size in one batch: float32 would make small eigenvalues negative.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from examples._timing import before_and_after
from mfac_kernels import ops


def inverse_fourth_roots(matrices: Sequence[Tensor], epsilon: float) -> list[Tensor]:
    """(A + epsilon I)^(-1/4) of each, in its dtype."""
    roots = list(matrices)
    for size in {len(matrix) for matrix in matrices}:
        index = [i for i, matrix in enumerate(matrices) if len(matrix) == size]
        values, vectors = torch.linalg.eigh(torch.stack([matrices[i] for i in index]).double())
        powers = (values.clamp(min=0) + epsilon).pow(-0.25)
        for i, root in zip(index, (vectors * powers.unsqueeze(-2)) @ vectors.mT, strict=True):
            roots[i] = root.to(matrices[i].dtype)
    return roots


class Shampoo:
    """The statistics of a network's weights, each (m, n), and their updates."""

    def __init__(self, weights: Sequence[Tensor], beta: float = 0.95, epsilon: float = 1e-4) -> None:
        self.beta, self.epsilon = beta, epsilon
        self.statistics = [w.new_zeros(size, size) for w in weights for size in w.shape]

    def accumulate(self, gradients: Sequence[Tensor]) -> None:
        rows = [side for g in gradients for side in (g.mT, g)]
        ops.grouped_linear_factor_(self.statistics, rows, beta=self.beta, alpha=1 - self.beta)

    def updates(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """What is to be subtracted from each weight, times the learning rate."""
        self.accumulate(gradients)
        roots = inverse_fourth_roots(self.statistics, self.epsilon)
        return [left @ g @ right for left, g, right in zip(roots[::2], gradients, roots[1::2], strict=True)]


def accumulate_by_torch(statistics: Sequence[Tensor], gradients: Sequence[Tensor], beta: float) -> None:
    """What the one call takes the place of."""
    for i, g in enumerate(gradients):
        statistics[2 * i].mul_(beta).addmm_(g, g.mT, alpha=1 - beta)
        statistics[2 * i + 1].mul_(beta).addmm_(g.mT, g, alpha=1 - beta)


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(128, 64)] * 6 + [(256, 128)] * 4 + [(10, 256)]
    gradients = [torch.randn(*shape, generator=generator) for shape in shapes]
    shampoo = Shampoo(gradients)
    plain = [torch.zeros_like(s) for s in shampoo.statistics]
    for _ in range(3):
        updates = shampoo.updates(gradients)
        accumulate_by_torch(plain, gradients, shampoo.beta)
    error = max(float((s - p).norm() / p.norm()) for s, p in zip(shampoo.statistics, plain, strict=True))
    print(f"{len(plain)} statistics: relative error {error:.1e}")
    print(f"updates of {len(updates)} weights, the first one of norm {float(updates[0].norm()):.3f}")
    times = before_and_after(lambda: accumulate_by_torch(plain, gradients, 0.95), lambda: shampoo.accumulate(gradients))
    print(f"statistics: {times}")


if __name__ == "__main__":
    main()
