"""Pruning by the optimal brain surgeon on an M-FAC Fisher.

obs_prune: flat weights and a :class:`~mfac_kernels.StaticFisher`. prune: a model, along a schedule, over it. collect:
gradients for a Fisher. Masks: what was dropped, while the model is trained on.
"""

from mfac_kernels.pruning.collect import Each, Gradients, collect
from mfac_kernels.pruning.masks import Held, Masks
from mfac_kernels.pruning.model import Pruned, Step, prunable, prune
from mfac_kernels.pruning.obs import obs_prune
from mfac_kernels.pruning.schedule import sparsities

__all__ = [
    "Each",
    "Gradients",
    "Held",
    "Masks",
    "Pruned",
    "Step",
    "collect",
    "obs_prune",
    "prunable",
    "prune",
    "sparsities",
]
