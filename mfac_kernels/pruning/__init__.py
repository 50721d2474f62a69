"""Pruning by the optimal brain surgeon on an M-FAC Fisher; pruning and quantisation of layers on layer Hessians.

obs_prune: flat weights and a :class:`~mfac_kernels.StaticFisher`. prune: a model, along a schedule, over it. collect:
gradients for a Fisher. Masks: what was dropped, while the model is trained on. LayerHessian: second moments of what
layers are given. sparsegpt, gptq: a layer's weight on them, sparse or on a grid; round_to_nearest: without.
"""

from mfac_kernels.pruning.collect import Each, Gradients, collect
from mfac_kernels.pruning.gptq import gptq
from mfac_kernels.pruning.grid import Quantized, round_to_nearest
from mfac_kernels.pruning.layer_hessian import LayerHessian
from mfac_kernels.pruning.masks import Held, Masks
from mfac_kernels.pruning.model import Pruned, Step, prunable, prune
from mfac_kernels.pruning.obs import obs_prune
from mfac_kernels.pruning.schedule import sparsities
from mfac_kernels.pruning.sparsegpt import sparsegpt

__all__ = [
    "Each",
    "Gradients",
    "Held",
    "LayerHessian",
    "Masks",
    "Pruned",
    "Quantized",
    "Step",
    "collect",
    "gptq",
    "obs_prune",
    "prunable",
    "prune",
    "round_to_nearest",
    "sparsegpt",
    "sparsities",
]
