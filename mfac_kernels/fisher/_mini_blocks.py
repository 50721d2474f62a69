"""Averages of many small diagonal blocks of a Fisher matrix, and their damped inverses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mfac_kernels.fisher._inversion import Inversion


@dataclass(frozen=True)
class MiniBlockShape:
    """How a gradient (rows, columns) is cut: each row into blocks of ``width``, a last column that is ``apart`` not.

    ``mean``: all rows (of blocks as wide as these) have one block, the mean of theirs.
    """

    rows: int
    columns: int
    width: int
    apart: bool = False
    mean: bool = False

    @property
    def blocks(self) -> list[tuple[int, int]]:
        """(count, size) of each kind."""
        kinds = [(1 if self.mean else self.rows * ((self.columns - self.apart) // self.width), self.width)]
        return [*kinds, (self.rows, 1)] if self.apart else kinds

    @property
    def elements(self) -> int:
        return sum(count * size**2 for count, size in self.blocks)

    def cut(self, x: Tensor) -> list[Tensor]:
        """(..., rows, columns) -> (..., blocks, size) of each kind; with ``mean`` (..., rows, size)."""
        wide = x[..., : self.columns - self.apart].reshape(*x.shape[:-2], -1, self.width)
        return [wide, x[..., -1:]] if self.apart else [wide]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        wide = parts[0].reshape(self.rows, -1)
        return torch.cat([wide, parts[1]], 1) if self.apart else wide


class MiniBlocks:
    """E[j j^T] of the blocks j of samples' gradients, averaged over batches, and (E + damping I)^-1.

    What is stored of an average = sum / weight is the inverse of sum + weight * damping, and the weight as a scale.
    """

    def __init__(self, shapes: Sequence[MiniBlockShape], dtype: torch.dtype, device: torch.device) -> None:
        self.shapes = list(shapes)
        self._weight = torch.zeros(len(self.shapes), dtype=torch.float64, device=device)
        self._scales = torch.ones_like(self._weight)
        self._sums = [
            [torch.zeros(1, count, size, size, dtype=dtype, device=device) for count, size in shape.blocks]
            for shape in self.shapes
        ]
        self._inverses = [
            [torch.eye(t.shape[-1], dtype=dtype, device=device).expand_as(t).contiguous() for t in parts]
            for parts in self._sums
        ]
        self._inversion = Inversion(device)

    def empty(self, layer: int) -> list[Tensor]:
        """Sums of zero, (count, size, size) of each kind."""
        return [torch.zeros_like(total[0]) for total in self._sums[layer]]

    def add_(self, layer: int, totals: Sequence[Tensor], gradients: Tensor) -> None:
        """To such sums, those over samples: gradients (n, rows, columns)."""
        for total, part in zip(totals, self.shapes[layer].cut(gradients), strict=True):
            total.baddbmm_(part.permute(1, 2, 0), part.transpose(0, 1))

    def add_mean_(self, layer: int, totals: Sequence[Tensor], inputs: Tensor, gradients: Tensor) -> None:
        """The same with ``mean``, from inputs (n, positions, columns) and output gradients (n, positions, rows).

        The sum over neurons and samples of the outer products of sum_s g_so a_s is sum_st (g_s^T g_t) a_s a_t^T.
        """
        weighted = (gradients @ gradients.mT) @ inputs
        totals[0][0].addmm_(inputs.flatten(0, 1).mT, weighted.flatten(0, 1), alpha=1 / self.shapes[layer].rows)

    def update(self, sums: dict[int, list[Tensor]], decay: float, accepted: Tensor) -> Tensor:
        """Let the sums of these layers enter the averages if ``accepted`` () and finite; () whether they did."""
        finite = accepted & torch.stack([t.isfinite().all() for totals in sums.values() for t in totals]).all()
        for layer, totals in sums.items():
            for average, total in zip(self._sums[layer], totals, strict=True):
                average.lerp_(torch.where(finite, total[None], average), 1 - decay)
            weight = self._weight[layer]
            weight.lerp_(torch.where(finite, torch.ones_like(weight), weight), 1 - decay)
        return finite

    def refresh(self, damping: float) -> None:
        """Compute all inverses, in one call; of a layer that has seen nothing it stays the identity."""
        seen = self._weight > 0
        self._scales.copy_(torch.where(seen, self._weight, 1))
        layers = [layer for layer, parts in enumerate(self._sums) for _ in parts]
        self._inversion.run(
            [total for parts in self._sums for total in parts],
            [(damping * self._scales[layer]).expand(1, 1) for layer in layers],
            [inverse for parts in self._inverses for inverse in parts],
            [seen[layer : layer + 1] for layer in layers],
        )

    def ihvp(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """The inverses times a gradient (rows, columns) for each layer."""
        results = []
        for shape, inverses, scale, g in zip(self.shapes, self._inverses, self._scales, gradients, strict=True):
            x = (g.to(inverses[0].dtype) * scale).to(inverses[0].dtype)
            parts = [
                part @ inverse[0, 0] if shape.mean else torch.bmm(inverse[0], part[..., None])[..., 0]
                for inverse, part in zip(inverses, shape.cut(x), strict=True)
            ]
            results.append(shape.join(parts))
        return results

    def blocks(self, layer: int) -> list[Tensor]:
        """The debiased averages of each kind, (count, size, size)."""
        return [total[0] / self._weight[layer].clamp_min(1e-300).to(total) for total in self._sums[layer]]

    def diagnostics(self) -> dict[str, float]:
        return self._inversion.diagnostics()

    def state_dict(self) -> dict[str, Any]:
        return {
            "weight": self._weight,
            "scales": self._scales,
            "sums": self._sums,
            "inverses": self._inverses,
            "counts": self._inversion.counts,
        }
