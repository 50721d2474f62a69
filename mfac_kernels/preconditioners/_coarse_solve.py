"""The coarse problem of two-level K-FAC: F_c beta = R0 r, in float64 and on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mfac_kernels import ops
from mfac_kernels.preconditioners.coarse import Blocks, compact, dot, peak

_F64 = torch.float64


class Basis:
    """R0: blocks of shape (kinds, layers), each a row, or with ``by_layer`` false each kind one; scaled to max 1.

    All products are with the scaled rows, which are not formed. A block that is zero is out, and so are those of layers
    that :meth:`restrict` leaves out.

    Attributes:
        finite: (), on the device: whether all blocks that are in are.
    """

    def __init__(self, blocks: Sequence[Blocks], by_layer: bool) -> None:
        self.blocks, self.by_layer = blocks, by_layer
        self._peaks = torch.stack([torch.stack([peak(b) for b in kind]) for kind in blocks]).to(_F64)
        self._pairs = [(i, j) for i in range(len(blocks)) for j in range(i + 1)]
        self._dots = torch.stack([_dots(blocks[i], blocks[j]) for i, j in self._pairs])
        self.restrict(torch.ones_like(self._peaks[0], dtype=torch.bool))

    def restrict(self, present: Tensor) -> None:
        """To these layers, (layers,) bool."""
        peaks = torch.where(present, self._peaks, 0)
        if not self.by_layer:
            peaks = torch.where(present, peaks.amax(1, keepdim=True), 0)
        self.finite = peaks.isfinite().all()
        usable = peaks.isfinite() & (peaks > 0)
        self.scales = torch.where(usable, 1 / torch.where(usable, peaks, 1), 0)  # (kinds, layers)

    def columns(self, by_kind: Sequence[Tensor]) -> Tensor:
        """(n, layers) for each kind, products with unscaled blocks -> (n, rows)."""
        each = torch.stack([dots.to(_F64) for dots in by_kind], 1)  # (n, kinds, layers)
        each = torch.where(self.scales > 0, each * self.scales, 0)
        return each.flatten(1) if self.by_layer else each.sum(2)

    def dots(self, x: Blocks) -> Tensor:
        """R0 x (rows,)."""
        return self.columns([_dots(kind, x)[None] for kind in self.blocks])[0]

    def gram(self) -> Tensor:
        """R0 R0^T (rows, rows)."""
        kinds, layers = len(self.blocks), self.scales.shape[1]
        each = torch.zeros(kinds, kinds, layers, dtype=_F64, device=self.scales.device)
        for (i, j), dots in zip(self._pairs, self._dots, strict=True):
            each[i, j] = each[j, i] = dots
        weights = self.scales[:, None] * self.scales[None]
        each = torch.where(weights > 0, each * weights, 0)
        if not self.by_layer:
            return each.sum(2)
        return torch.diag_embed(each, dim1=1, dim2=3).flatten(2, 3).flatten(0, 1)

    def add_to_(self, x: Blocks, beta: Tensor, ok: Tensor) -> None:
        """x <- x + R0^T beta, if ``ok``; else x stays, whatever the rows are."""
        each = beta.view(-1, self.scales.shape[1]) if self.by_layer else beta[:, None]
        each = torch.where(self.scales > 0, each * self.scales, 0)
        for kind, own in zip(self.blocks, each, strict=True):
            for y, b, c in zip(x, kind, own, strict=True):
                y.addcmul_(torch.where(ok, compact(b), 0), c.to(y.dtype))


class CoarseMatrix:
    """F_c = R0 F R0^T and its inverse. ``ok`` (), on the device: whether it has one; if not, solutions are zero."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        diagonal = matrix.diagonal()
        dead = diagonal == 0  # rows of zeros
        scale = torch.where(dead, 1, diagonal).rsqrt()
        scaled = matrix * scale[:, None] * scale
        scaled = torch.where(dead.diag_embed(), 1, scaled)
        inverse, info = ops.cholesky_inverse_ex(scaled[None])
        # 1 / the inverse's diagonal is what is left of a row of norm 1 apart from the others: rounding, below this
        least = 64 * len(matrix) * torch.finfo(_F64).eps
        self.ok = (info[0] == 0) & (inverse[0].diagonal().amax() * least < 1)
        self._inverse = torch.where(self.ok, inverse[0] * scale[:, None] * scale, 0)

    def solve(self, right: Tensor) -> Tensor:
        """F_c^-1 right, refined once; zero where that is not finite."""
        beta = self._inverse @ right
        beta = beta + self._inverse @ (right - self.matrix @ beta)
        return torch.where(self.ok & beta.isfinite().all(), beta, 0)


def _dots(x: Blocks, y: Blocks) -> Tensor:
    """In each layer (layers,)."""
    return torch.stack([dot(a, b) for a, b in zip(x, y, strict=True)]).to(_F64)
