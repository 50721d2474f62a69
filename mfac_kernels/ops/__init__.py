"""The kernels as torch ops: argument checks, dispatch, fake implementations; nothing else."""

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
    "core_insert_",
    "core_refactor_",
    "core_solve",
    "gram",
    "inverse_diagonal",
    "window_combine",
    "window_dots",
    "window_insert_",
]
