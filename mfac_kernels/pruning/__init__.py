"""Pruning by the optimal brain surgeon on an M-FAC Fisher."""

from mfac_kernels.pruning.obs import obs_prune
from mfac_kernels.pruning.schedule import sparsities

__all__ = ["obs_prune", "sparsities"]
