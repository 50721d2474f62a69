"""Training of small image classifiers with several optimizers side by side, and its report.

Used by ``mfac-kernels train``; the plots, the bar and two of the datasets need the ``demo`` extra.
"""

from __future__ import annotations

from mfac_kernels.training.comparison import compare
from mfac_kernels.training.loop import EVALUATIONS, evaluate, train
from mfac_kernels.training.models import MODELS, build_model
from mfac_kernels.training.optimizers import (
    CHOSEN,
    GRID,
    GRID_STEPS,
    KFACConfig,
    MFACConfig,
    OptimizerConfig,
    SGDConfig,
    TwoLevelConfig,
)
from mfac_kernels.training.report import format_table, write_grid, write_report
from mfac_kernels.training.results import Comparison, Evaluation, RunResult

__all__ = [
    "CHOSEN",
    "EVALUATIONS",
    "GRID",
    "GRID_STEPS",
    "MODELS",
    "Comparison",
    "Evaluation",
    "KFACConfig",
    "MFACConfig",
    "OptimizerConfig",
    "RunResult",
    "SGDConfig",
    "TwoLevelConfig",
    "build_model",
    "compare",
    "evaluate",
    "format_table",
    "train",
    "write_grid",
    "write_report",
]
