"""The kernels as torch ops: argument checks, dispatch, fake implementations; nothing else."""

from mfac_kernels.ops.kronecker import (
    conv1d_factor_,
    conv2d_factor_,
    conv3d_factor_,
    cross_factor,
    embedding_factor_,
    linear_factor_,
)
from mfac_kernels.ops.static import block_gram, block_inverse, gram, inverse_diagonal
from mfac_kernels.ops.window import (
    core_insert_,
    core_refactor_,
    core_solve,
    window_combine,
    window_dots,
    window_insert_,
)

__all__ = [
    "block_gram",
    "block_inverse",
    "conv1d_factor_",
    "conv2d_factor_",
    "conv3d_factor_",
    "core_insert_",
    "core_refactor_",
    "core_solve",
    "cross_factor",
    "embedding_factor_",
    "gram",
    "inverse_diagonal",
    "linear_factor_",
    "window_combine",
    "window_dots",
    "window_insert_",
]
