"""Damped inverses of batches of blocks in one call: what cannot be inverted keeps the inverse it had, and is told."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mfac_kernels import ops


class Inversion:
    """Writes inverses where they are kept.

    ``counts``: blocks since the start that were inverted in float64, with a larger damping, and not at all.
    """

    def __init__(self, device: torch.device | None) -> None:
        self.counts = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(3)]

    def run(
        self, batches: Sequence[Tensor], dampings: Sequence[Tensor], targets: Sequence[Tensor], known: Sequence[Tensor]
    ) -> None:
        """targets[i] <- (batches[i] + dampings[i] I)^-1, (n, blocks, s, s) each with dampings (n, blocks) or ().

        ``known`` (n,): where it is False the target stays as it is.
        """
        dense = [i for i, batch in enumerate(batches) if batch.shape[-1] > 1]
        found = ops.robust_cholesky_inverse([batches[i] for i in dense], [dampings[i] for i in dense])
        for i, inverse, attempts in zip(dense, found.inverses, found.attempts, strict=True):
            target, seen = targets[i], known[i]
            if target.device.type == "cpu" and not bool(attempts.any()) and bool(seen.all()):
                target.copy_(inverse)
                continue
            failed = attempts < 0
            target.copy_(torch.where((failed | ~seen[:, None])[..., None, None], target, inverse))
            for count, became in zip(self.counts, (attempts == 1, attempts > 1, failed), strict=True):
                count += became.sum()
        for i in set(range(len(batches))) - set(dense):
            inverse = (batches[i] + dampings[i][..., None, None].to(batches[i])).reciprocal()
            targets[i].copy_(torch.where(known[i][:, None, None, None], inverse, targets[i]))

    def diagnostics(self) -> dict[str, float]:
        """Blocks since the start: inverted in float64; with a larger damping; not at all, their last inverse kept."""
        names = ("blocks_in_float64", "blocks_damped", "blocks_kept")
        return {name: int(count) for name, count in zip(names, self.counts, strict=True)}
