"""The bar that is shown while optimizers are compared."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any

from mfac_kernels.training._extra import require
from mfac_kernels.training.optimizers import OptimizerConfig
from mfac_kernels.training.results import RunResult

__all__ = ["Progress", "bar"]


def bar(*, total: float, unit: str) -> Any:
    """A bar of tqdm's with the time elapsed and left.

    Raises:
        MissingDependency: tqdm is not installed.
    """
    tqdm = require("tqdm", "tqdm", "for the progress bar").tqdm
    return tqdm(
        total=total,
        unit=unit,
        mininterval=0.5 if sys.stderr.isatty() else 20.0,  # a log file gets few lines
        dynamic_ncols=True,
        bar_format="{desc} {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} "
        "[{elapsed} elapsed, {remaining} left{postfix}]",
    )


class Progress:
    """One bar over all runs, so that its time left is that of the whole comparison."""

    def __init__(self, *, total: int, enabled: bool) -> None:
        self._bar: Any = None
        self._loss: float | None = None
        if enabled:
            self._bar = bar(total=total, unit="step")

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def begin(self, config: OptimizerConfig) -> None:
        self._loss = None
        if self._bar is not None:
            self._bar.set_postfix_str("", refresh=False)
            self._bar.set_description_str(f"{config.label:5}")

    def step(self, loss: float, accuracy: float | None) -> None:
        if self._bar is None:
            return
        # A single batch's loss jumps too much to be read.
        self._loss = loss if self._loss is None else 0.95 * self._loss + 0.05 * loss
        shown = "-" if accuracy is None else f"{accuracy:.1%}"
        self._bar.set_postfix_str(f"loss {self._loss:.3f}, accuracy {shown}", refresh=False)
        self._bar.update()

    def end(self, result: RunResult) -> None:
        if self._bar is not None:
            self._bar.write(
                f"{result.config.label:5} ({result.config.settings}): "
                f"loss {result.final_loss:.3f}, accuracy {result.accuracy:.1%}"
            )
