"""Training of small image classifiers with several optimizers side by side, and its report.

Used by ``mfac-kernels train``; the plots and bars need the ``demo`` extra.
"""

from __future__ import annotations

from mfac_kernels.training.loop import (
    CHOSEN,
    EVALUATIONS,
    GRID,
    GRID_STEPS,
    Comparison,
    Evaluation,
    KFACConfig,
    MFACConfig,
    OptimizerConfig,
    RunResult,
    SGDConfig,
    compare,
    evaluate,
    train,
)
from mfac_kernels.training.models import MODELS, build_model
from mfac_kernels.training.report import format_table, write_grid, write_report

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
    "build_model",
    "compare",
    "evaluate",
    "format_table",
    "train",
    "write_grid",
    "write_report",
]
