"""The kernels as torch ops: argument checks, dispatch, fake implementations; nothing else."""

from mfac_kernels.ops.conv_lags import conv2d_expand_, conv2d_lags_, conv2d_lags_size
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
    "conv2d_expand_",
    "conv2d_factor_",
    "conv2d_lags_",
    "conv2d_lags_size",
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
