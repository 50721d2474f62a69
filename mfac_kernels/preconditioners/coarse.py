"""Coarse spaces of two-level K-FAC: rows of R0, zero outside one layer each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

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
        gradients, update: the gradients, and what K-FAC makes of them; to be read.
        residual: gradients - F update, to be written to, too; only where :attr:`CoarseSpace.needs_residual` is set.
    """

    fisher: KroneckerFisher
    gradients: Blocks
    update: Blocks
    residual: Blocks | None

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
    matrix singular, and the step is K-FAC's. A block that is one number (``expand``) is the cheapest.

    Attributes:
        needs_residual: whether :meth:`rows` reads ``step.residual``, which costs a weight's gradient.
        of_inverses: whether rows depend on the factors and their inverses alone: they are kept until these are new.
        by_layer: each block is a row of R0, zero in other layers; else all blocks together are one row.
    """

    needs_residual = False
    of_inverses = False
    by_layer = True

    @abstractmethod
    def rows(self, step: Step) -> Sequence[Blocks]:
        """As many times as there are rows for each layer: a block for each."""


def _ones(gradients: Blocks) -> Blocks:
    return [torch.ones((), dtype=g.dtype, device=g.device).expand(g.shape) for g in gradients]


class Nicolaides(CoarseSpace):
    """Ones: the mean of each layer (Nicolaides, SIAM J. Numer. Anal. 1987)."""

    of_inverses = True

    def rows(self, step: Step) -> Sequence[Blocks]:
        return [_ones(step.gradients)]


class Residual(CoarseSpace):
    """M r: K-FAC's step from where its step has led."""

    needs_residual = True

    def rows(self, step: Step) -> Sequence[Blocks]:
        assert step.residual is not None
        return [step.fisher.ihvp_(step.residual)]


class KrylovNicolaides(CoarseSpace):
    """Ones, and M times them."""

    of_inverses = True

    def rows(self, step: Step) -> Sequence[Blocks]:
        ones = _ones(step.gradients)
        return [ones, _apart_(step.inverse(ones), ones)]


class KrylovResidual(CoarseSpace):
    """M r and M^2 r."""

    needs_residual = True

    def rows(self, step: Step) -> Sequence[Blocks]:
        assert step.residual is not None
        first = step.fisher.ihvp_(step.residual)
        return [first, _apart_(step.inverse(first), first)]


class Spectral(CoarseSpace):
    """Eigenvectors of the smallest eigenvalues of both factors."""

    of_inverses = True

    def rows(self, step: Step) -> Sequence[Blocks]:
        return [step.fisher.smallest_eigenvectors()]


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


def _apart_(second: Blocks, first: Blocks) -> Blocks:
    """The second blocks, less what they have of the first ones: the same space. Zero where nothing else is left."""
    for y, x in zip(second, first, strict=True):
        norm, least = dot(x, x), 64 * torch.finfo(y.dtype).eps * peak(y)
        y.addcmul_(compact(x), -dot(x, y) / torch.where(norm > 0, norm, 1))
        y.mul_(peak(y) > least)
    return second


def compact(x: Tensor) -> Tensor:
    """x; of one that is a number, expanded, that number (1, 1)."""
    return x if any(x.stride()) else x[:1, :1]


def dot(x: Tensor, y: Tensor) -> Tensor:
    """The product of two blocks, summed over all elements, ()."""
    if not any(x.stride()):
        return compact(x)[0, 0] * y.sum()
    product: Tensor = torch.linalg.vecdot(x.reshape(-1), y.reshape(-1))
    return product


def peak(x: Tensor) -> Tensor:
    """The largest absolute value of a block, (); NaN if it has one."""
    least, most = torch.aminmax(compact(x))
    return torch.maximum(-least, most)
