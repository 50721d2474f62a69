"""Inverses of Kronecker factors, kept by BFGS updates: K-BFGS's state and formulas."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mfac_kernels import ops
from mfac_kernels.fisher._layout import KroneckerShape


class Pair(NamedTuple):
    """What a batch says of a layer's factors: of A its covariance (groups, a, a) and mean input (groups, a); of B the
    differences of mean outputs and of mean gradients (groups, b); S."""

    covariance: Tensor
    input: Tensor
    output: Tensor
    gradient: Tensor
    positions: float


class InverseFactors:
    """H_A and H_B of every layer, the identity at first.

    ``left_out`` (): updates whose s^T y was not positive; ``started``: which H_A have an inverse to go on from.
    """

    def __init__(self, shapes: Sequence[KroneckerShape], dtype: torch.dtype, device: torch.device) -> None:
        self.shapes = list(shapes)
        self.left_out = torch.zeros((), dtype=torch.int64, device=device)

        def each(*size: int) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        self._averages = [each(s.groups, s.columns, s.columns) for s in shapes]  # of A
        self._weights = torch.zeros(len(self.shapes), dtype=torch.float64, device=device)  # of these
        self.started = [False] * len(self.shapes)
        self._pairs = [each(2, s.groups, s.outputs) for s in shapes]  # averages of s and of y
        self._inputs = [torch.eye(s.columns).to(each(1)).repeat(s.groups, 1, 1) for s in shapes]
        self._outputs = [torch.eye(s.outputs).to(each(1)).repeat(s.groups, 1, 1) for s in shapes]

    def apply(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """H_B dW H_A for each layer's gradient (groups * outputs, columns)."""
        return [
            (b @ g.to(b.dtype).view(s.groups, s.outputs, s.columns) @ a).flatten(0, 1)
            for s, a, b, g in zip(self.shapes, self._inputs, self._outputs, gradients, strict=True)
        ]

    def inverses(self, layer: int) -> tuple[Tensor, Tensor]:
        """H_A and H_B, (groups, size, size) each."""
        return self._inputs[layer], self._outputs[layer]

    def update(
        self,
        layers: Sequence[int],
        pairs: Sequence[Pair],
        damping: float,
        decay: float,
        pair_decay: float,
        mu: float,
        accepted: Tensor,
    ) -> Tensor:
        """Both of these layers, if the batch is ``accepted`` () and finite; () whether it was."""
        finite = [t.isfinite().all() for pair in pairs for t in pair[:4]]
        accepted = accepted & torch.stack(finite).all()
        take = accepted.double()
        damped = []
        for layer, pair in zip(layers, pairs, strict=True):
            average = self._averages[layer]
            average.lerp_(torch.where(accepted, pair.covariance, average), 1 - decay)
            self._weights[layer].lerp_(torch.where(accepted, take, self._weights[layer]), 1 - decay)
            weight = torch.where(self._weights[layer] > 0, self._weights[layer], 1)
            matrix = (average / weight).to(average)
            matrix.diagonal(dim1=-2, dim2=-1).add_(math.sqrt(damping * pair.positions))
            damped.append(matrix)
        fresh = [k for k, layer in enumerate(layers) if not self.started[layer]]
        if fresh:
            self._start([layers[k] for k in fresh], [damped[k] for k in fresh], accepted)
        for k, (layer, pair, matrix) in enumerate(zip(layers, pairs, damped, strict=True)):
            inputs, outputs = self._inputs[layer], self._outputs[layer]
            if k not in fresh:
                s = (inputs @ pair.input[..., None])[..., 0]
                self._take(inputs, s, (matrix @ s[..., None])[..., 0], accepted)
            kept = self._pairs[layer]
            kept.lerp_(torch.where(accepted, torch.stack([pair.output, pair.gradient]), kept), 1 - pair_decay)
            shift = math.sqrt(damping / pair.positions)
            self._take(outputs, *double_damped(outputs, kept[0], kept[1], mu, shift), accepted)
        return accepted

    def _start(self, layers: Sequence[int], damped: Sequence[Tensor], accepted: Tensor) -> None:
        """H_A of layers that have seen no batch: the inverse. Elsewhere than on the CPU nobody asks whether their first
        batch was accepted: if it was not, H_A goes on from the identity."""
        found = ops.robust_cholesky_inverse(damped)
        for layer, inverse, attempts in zip(layers, found.inverses, found.attempts, strict=True):
            use = (accepted & (attempts >= 0))[:, None, None]
            self._inputs[layer].copy_(torch.where(use, inverse, self._inputs[layer]))
            self.started[layer] = accepted.device.type != "cpu" or bool(accepted)

    def _take(self, h: Tensor, s: Tensor, y: Tensor, accepted: Tensor) -> None:
        updated, fits = bfgs(h, s, y)
        self.left_out += (accepted & ~fits).sum()
        h.copy_(torch.where((accepted & fits)[:, None, None], updated, h))

    def state_dict(self) -> dict[str, Any]:
        return {
            "averages": self._averages,
            "weights": self._weights,
            "started": torch.tensor(self.started),
            "pairs": self._pairs,
            "inputs": self._inputs,
            "outputs": self._outputs,
            "left_out": self.left_out,
        }


def bfgs(h: Tensor, s: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(I - r s y^T) H (I - r y s^T) + r s s^T with r = 1 / s^T y: it maps y to s. h (n, d, d), s and y (n, d).

    Also (n,) whether s^T y is positive and the result finite.
    """
    hy = (h @ y[..., None])[..., 0]
    sy = torch.linalg.vecdot(s, y)
    r = 1 / torch.where(sy > 0, sy, 1)
    outer = hy[..., :, None] * (r[..., None] * s)[..., None, :]
    scale = (1 + r * torch.linalg.vecdot(y, hy)) * r
    updated = h - (outer + outer.mT) + scale[..., None, None] * (s[..., :, None] * s[..., None, :])
    return updated, (sy > 0) & updated.isfinite().all(-1).all(-1)


def double_damped(h: Tensor, s: Tensor, y: Tensor, mu: float, shift: float) -> tuple[Tensor, Tensor]:
    """s and y (n, d) so that s^T y >= mu y^T H y for the given y (Powell), and y + shift s (Levenberg, Marquardt)."""
    hy = (h @ y[..., None])[..., 0]
    sy, yhy = torch.linalg.vecdot(s, y), torch.linalg.vecdot(y, hy)
    short = sy < mu * yhy
    theta = torch.where(short, (1 - mu) * yhy / torch.where(short, yhy - sy, 1), 1)[..., None]
    s = theta * s + (1 - theta) * hy
    return s, y + shift * s
