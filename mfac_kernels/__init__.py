"""Compiled kernels for second-order information of neural networks; curvature objects and preconditioners over them.

FisherWindow, StaticFisher: inverse-Hessian-vector products from gradients (M-FAC). MFAC: a preconditioner beside any
torch optimizer. pinn: physics-informed networks. ops: the kernels themselves. build_info, cpu_capability: what was
built and what runs.
"""

from mfac_kernels import ops, pinn, pruning
from mfac_kernels._library import build_info, cpu_capability, get_include, get_library
from mfac_kernels.fisher.jacobian import JacobianProduct
from mfac_kernels.fisher.kronecker import KroneckerFisher, KroneckerShape
from mfac_kernels.fisher.kronecker_sum import KroneckerSum, nearest_kronecker_sum
from mfac_kernels.fisher.static import StaticFisher
from mfac_kernels.fisher.window import FisherWindow
from mfac_kernels.preconditioners import layers
from mfac_kernels.preconditioners.coarse import CoarseSpace
from mfac_kernels.preconditioners.kbfgs import KBFGS
from mfac_kernels.preconditioners.kfac import KFAC
from mfac_kernels.preconditioners.mfac import MFAC
from mfac_kernels.preconditioners.mini_block import MiniBlockFisher
from mfac_kernels.preconditioners.two_level import TwoLevelKFAC

__version__ = str(build_info()["version"])

__all__ = [
    "KBFGS",
    "KFAC",
    "MFAC",
    "CoarseSpace",
    "FisherWindow",
    "JacobianProduct",
    "KroneckerFisher",
    "KroneckerShape",
    "KroneckerSum",
    "MiniBlockFisher",
    "StaticFisher",
    "TwoLevelKFAC",
    "__version__",
    "build_info",
    "cpu_capability",
    "get_include",
    "get_library",
    "layers",
    "nearest_kronecker_sum",
    "ops",
    "pinn",
    "pruning",
]
