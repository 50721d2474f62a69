"""The inverse of a sum of two Kronecker products, the first of them damped, in the joint bases of its factors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mfac_kernels.fisher._inverses import Eigenbases, State, by_group, damping_of, eigen, nonzero, runs
from mfac_kernels.fisher._stack import Stack


class JointBases(Eigenbases):
    """F = (B1 + sqrt(damping / pi) I) (x) (A1 + sqrt(damping pi) I) + B2 (x) A2, inverted exactly.

    K_A has K_A^T (A1 + ..) K_A = I and K_A^T A2 K_A = diag(s_A), and K_B likewise, so that

        F^-1 = (K_B (x) K_A) diag(1 / v) (K_B (x) K_A)^T,   v = 1 + s_B (x) s_A

    which is what eigenbases do, in bases that are not orthogonal. The second product has either sign, so that F may be
    indefinite where the Fisher matrix is not. Along a column k of K_B (x) K_A it has the curvature v / |k|^2: v is
    raised to damping |k|^2, since the damped Fisher matrix has none below the damping. With damping I as a third term
    nothing would be diagonal: hence the damping of the first product's factors.

    Source: Koroko et al., 2022 (:mod:`mfac_kernels.fisher._pairs`), whose program takes |s_A| and |s_B| instead.

    ``raised``: how many v were, since the start.
    """

    def __init__(self, stacks: Sequence[Stack], pi_correction: bool) -> None:
        super().__init__(stacks, eigen_correction=False)
        self.pi_correction = pi_correction
        self.raised = torch.zeros(1, dtype=torch.int64, device=stacks[0].weight.device if stacks else None)

    def refresh(self, damping: float, rows: Sequence[list[int]]) -> None:
        for i, (stack, chosen) in enumerate(zip(self.stacks, rows, strict=True)):
            shape = stack.shape
            for row in runs(chosen):
                seen = (stack.weight[row] > 0)[:, None, None, None]
                weight = nonzero(stack.weight[row])[:, None, None, None]
                (a, b), *second = [(shape.expand(x) / weight, y / weight) for x, y in stack.products(row)]
                shifts = damping_of(shape, a, b, damping, self.pi_correction)
                others = second[0] if second else (None, None)
                widths = (shape.input_width, shape.outputs)
                values: list[Tensor] = []
                lengths: list[Tensor] = []
                for one, two, shift, width, target in zip(
                    (a, b), others, shifts, widths, (self._inputs[i][row], self._outputs[i][row]), strict=True
                ):
                    basis, s = _joint_basis(one, two, shift, width)
                    values.append(by_group(s, shape.groups, width))
                    lengths.append(by_group(basis.square().sum(-2), shape.groups, width))
                    unit = torch.eye(basis.shape[-1], dtype=basis.dtype, device=basis.device)
                    target.copy_(torch.where(seen, basis, unit))
                v, least = (x[1][..., None, None] * x[0][:, :, None, None] for x in (values, lengths))
                v, least = 1 + v, damping * least
                v, least = (torch.where(seen[..., None], x, 1) for x in (v, least))
                self.moments[i][row] = torch.maximum(v, least)
                self.raised += (v < 0.999 * least).sum()  # where the first product is zero both are 1, but for rounding

    def state_dict(self) -> State:
        return {**super().state_dict(), "raised": [self.raised]}

    def diagnostics(self) -> dict[str, float]:
        """Since the start: directions in which the sum of both products was raised to the damping."""
        return {"directions_raised": int(self.raised)}


def _joint_basis(one: Tensor, two: Tensor | None, shift: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """K (layers, blocks, size, size) and s (layers, blocks, size) with K^T (one + shift I) K = I, K^T two K = diag(s).

    By eigenvalues, not by Cholesky: what rounding leaves below zero in ``one`` is zero, and nothing fails.
    """
    values, vectors = eigen(one, width)
    root = vectors * (values.clamp_min(0) + shift[..., None]).rsqrt()[..., None, :]
    if two is None:
        return root, torch.zeros_like(values)
    s, rotation = eigen(root.mT @ two @ root, width)
    return root @ rotation, s
