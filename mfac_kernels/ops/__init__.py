"""The kernels as torch ops: argument checks, dispatch, fake implementations; nothing else."""

from mfac_kernels.ops.block_diagonal import block_diagonal_matmul, diagonal_blocks, matmul_block_diagonal
from mfac_kernels.ops.cholesky import (
    cholesky_factor,
    cholesky_factor_ex,
    cholesky_inverse,
    cholesky_inverse_ex,
    cholesky_solve,
    grouped_cholesky_inverse_ex,
)
from mfac_kernels.ops.cholesky_robust import (
    RobustInverse,
    RobustInverseFactor,
    robust_cholesky_inverse,
    robust_cholesky_inverse_factor,
)
from mfac_kernels.ops.inverse_factor import (
    cholesky_inverse_factor,
    cholesky_inverse_factor_ex,
    grouped_cholesky_inverse_factor_ex,
)
from mfac_kernels.ops.kronecker import (
    conv1d_factor_,
    conv2d_factor_,
    conv3d_factor_,
    cross_factor,
    embedding_factor_,
    grouped_linear_factor_,
    linear_factor_,
)
from mfac_kernels.ops.lags import conv2d_expand_, conv2d_lags_, conv2d_lags_size
from mfac_kernels.ops.static import block_gram, block_inverse, gram, inverse_diagonal
from mfac_kernels.ops.triangular import triangular_inverse, triangular_inverse_ex
from mfac_kernels.ops.window import (
    core_insert_,
    core_refactor_,
    core_solve,
    window_combine,
    window_dots,
    window_insert_,
)

__all__ = [
    "RobustInverse",
    "RobustInverseFactor",
    "block_diagonal_matmul",
    "block_gram",
    "block_inverse",
    "cholesky_factor",
    "cholesky_factor_ex",
    "cholesky_inverse",
    "cholesky_inverse_ex",
    "cholesky_inverse_factor",
    "cholesky_inverse_factor_ex",
    "cholesky_solve",
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
    "diagonal_blocks",
    "embedding_factor_",
    "gram",
    "grouped_cholesky_inverse_ex",
    "grouped_cholesky_inverse_factor_ex",
    "grouped_linear_factor_",
    "inverse_diagonal",
    "linear_factor_",
    "matmul_block_diagonal",
    "robust_cholesky_inverse",
    "robust_cholesky_inverse_factor",
    "triangular_inverse",
    "triangular_inverse_ex",
    "window_combine",
    "window_dots",
    "window_insert_",
]
