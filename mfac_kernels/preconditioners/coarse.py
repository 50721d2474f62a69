"""Coarse spaces of two-level K-FAC: rows of R0, zero outside one layer each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mfac_kernels.fisher.kronecker import KroneckerFisher

__all__ = [
    "COARSE_SPACES",
    "Blocks",
    "CoarseSpace",
    "FixedSpace",
    "KrylovNicolaides",
    "KrylovResidual",
    "Nicolaides",
    "Residual",
    "Spectral",
    "Step",
]

Blocks = list[Tensor]
"""One for each layer, in the shape of K-FAC's gradient: (groups * outputs, columns), the bias last."""


@dataclass
class Step:
    """What a coarse space is made from.

    Attributes:
        fisher: factors and inverses of the layers: ``factors(layer)``, ``shapes``.
        gradients, update: the gradients, and what K-FAC makes of them.
        residual: gradients - F update; only where :attr:`CoarseSpace.needs_residual` is set.
        refreshed: whether the inverses are new in this step.
    """

    fisher: KroneckerFisher
    gradients: Blocks
    update: Blocks
    residual: Blocks | None
    refreshed: bool

    def inverse(self, blocks: Blocks) -> Blocks:
        """M times blocks: K-FAC's damped inverse of each layer."""
        return self.fisher.ihvp(blocks)


class CoarseSpace(ABC):
    """Spans the corrections of a step by a few vectors: R0, with the fields :meth:`rows` gives.

        class SignedGradient(mk.CoarseSpace):
            def rows(self, step):
                return [[g.sign() for g in step.gradients]]

        preconditioner = mk.TwoLevelKFAC(model, coarse_space=SignedGradient())

    A row may be of any scale, and of zeros: it then counts for nothing. Rows that depend on each other make the coarse
    matrix singular, and the step is K-FAC's. A block whose rows are one (``expand``) is the cheapest.

    Attributes:
        needs_residual: whether :meth:`rows` reads ``step.residual``, which costs a weight's gradient.
        by_layer: each block is a row of R0, zero in other layers; else all blocks together are one row.
    """

    needs_residual = False
    by_layer = True

    @abstractmethod
    def rows(self, step: Step) -> Sequence[Blocks]:
        """As many times as there are rows for each layer: a block for each."""

    def state_dict(self) -> dict[str, Any]:
        """What a resume needs: what :meth:`rows` keeps from one step to the next."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # noqa: B027  (most keep nothing)
        """Load a :meth:`state_dict`."""


def _ones(gradients: Blocks) -> Blocks:
    return [torch.ones((), dtype=g.dtype, device=g.device).expand(g.shape) for g in gradients]


class Nicolaides(CoarseSpace):
    """Ones: the mean of each layer (Nicolaides, SIAM J. Numer. Anal. 1987)."""

    def rows(self, step: Step) -> Sequence[Blocks]:
        return [_ones(step.gradients)]


class Residual(CoarseSpace):
    """M r: K-FAC's step from where its step has led."""

    needs_residual = True

    def rows(self, step: Step) -> Sequence[Blocks]:
        assert step.residual is not None
        return [step.inverse(step.residual)]


class KrylovNicolaides(CoarseSpace):
    """Ones, and M times them."""

    def rows(self, step: Step) -> Sequence[Blocks]:
        ones = _ones(step.gradients)
        return [ones, _apart(step.inverse(ones), ones)]


class KrylovResidual(CoarseSpace):
    """M r and M^2 r."""

    needs_residual = True

    def rows(self, step: Step) -> Sequence[Blocks]:
        assert step.residual is not None
        first = step.inverse(step.residual)
        return [first, _apart(step.inverse(first), first)]


class Spectral(CoarseSpace):
    """Eigenvectors of the smallest eigenvalues of both factors, computed when the inverses are."""

    def __init__(self) -> None:
        self._rows: Blocks = []

    def rows(self, step: Step) -> Sequence[Blocks]:
        if step.refreshed or not self._rows:
            self._rows = step.fisher.smallest_eigenvectors()
        return [self._rows]

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self._rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._rows = [row.clone() for row in state_dict["rows"]]


class FixedSpace(CoarseSpace):
    """R0 given: a block for each layer in each row. With ``by_layer`` each block is a row of its own."""

    def __init__(self, rows: Sequence[Sequence[Tensor]], *, by_layer: bool = False) -> None:
        self._rows = [list(row) for row in rows]
        self.by_layer = by_layer

    def rows(self, step: Step) -> Sequence[Blocks]:
        for k, row in enumerate(self._rows):
            if [tuple(b.shape) for b in row] != [tuple(g.shape) for g in step.gradients]:
                raise ValueError(
                    f"coarse_space: row {k}: expected blocks of shapes {[tuple(g.shape) for g in step.gradients]}, got "
                    f"{[tuple(b.shape) for b in row]}"
                )
        return [[b.to(g) for b, g in zip(row, step.gradients, strict=True)] for row in self._rows]


COARSE_SPACES: dict[str, Callable[[], CoarseSpace]] = {
    "nicolaides": Nicolaides,
    "residual": Residual,
    "spectral": Spectral,
    "krylov_nicolaides": KrylovNicolaides,
    "krylov_residual": KrylovResidual,
}


def _apart(second: Blocks, first: Blocks) -> Blocks:
    """The second blocks less what they have of the first ones: the same space. Zero where nothing else is left."""
    rest = []
    for y, x in zip(second, first, strict=True):
        x, y = x.double(), y.double()
        norm = x.square().sum()
        z = y - (x * y).sum() / torch.where(norm > 0, norm, 1) * x
        least = 64 * torch.finfo(second[0].dtype).eps
        rest.append(torch.where(z.abs().amax() > least * y.abs().amax(), z, 0).to(second[0].dtype))
    return rest
