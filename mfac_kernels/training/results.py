"""What a run and a comparison leave behind: the numbers that the report is made of."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field

from mfac_kernels.training.optimizers import OptimizerConfig

__all__ = ["TAIL", "Comparison", "Evaluation", "RunResult"]

TAIL = 40  # steps over which the final loss is averaged


@dataclass(frozen=True)
class Evaluation:
    """Accuracy on test images, after so many steps."""

    step: int
    seconds: float  # spent in steps until then, evaluation excluded
    accuracy: float  # 0 to 1
    images: int


@dataclass
class RunResult:
    """What one optimizer did: one entry per step, times in seconds."""

    config: OptimizerConfig
    losses: list[float] = field(default_factory=list)  # of the batch, before the step
    step_seconds: list[float] = field(default_factory=list)  # the whole step, preconditioner too
    # Of the preconditioner's step; what K-FAC gathers in the passes of the network is in the whole step alone.
    preconditioner_seconds: list[float] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)

    @property
    def final_loss(self) -> float:
        """Mean loss of the last steps (at most ``TAIL``); not a number if the run diverged."""
        tail = self.losses[-TAIL:]
        return math.fsum(tail) / len(tail) if all(map(math.isfinite, tail)) else math.nan

    @property
    def accuracy(self) -> float:
        """Accuracy of the last evaluation, on the whole test set."""
        return self.evaluations[-1].accuracy if self.evaluations else math.nan

    @property
    def median_step_seconds(self) -> float:
        return statistics.median(self.step_seconds)

    @property
    def median_preconditioner_seconds(self) -> float:
        return statistics.median(self.preconditioner_seconds)

    @property
    def preconditioner_share(self) -> float:
        """The preconditioner's part of a step, by the two medians."""
        return self.median_preconditioner_seconds / self.median_step_seconds


@dataclass(frozen=True)
class Comparison:
    """Several runs from the same weights, over the same batches, for the same number of steps."""

    results: tuple[RunResult, ...]
    dataset: str
    source: str
    train_images: int
    test_images: int
    model: str
    parameters: int
    batch_size: int
    steps: int
    budget: float | None  # seconds asked for, if the steps come from a budget
    seconds: float  # measured for the whole comparison, evaluation included
    seed: int
    threads: int
    torch_version: str
    device: str
