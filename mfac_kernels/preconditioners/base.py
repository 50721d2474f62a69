"""What every preconditioner of this package is: called between ``backward()`` and ``optimizer.step()``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, SupportsFloat

from torch import Tensor

Hyperparameter = float | Callable[[int], float]
"""A number, or a function of the step number (0 for the first step)."""


class Preconditioner(ABC):
    """Replaces the gradients of its parameters, in place, by preconditioned ones.

        loss.backward(); preconditioner.step(); optimizer.step()

    Attributes:
        steps: calls of :meth:`step` so far; what callable hyper-parameters are given.
    """

    def __init__(self) -> None:
        self.steps = 0

    @abstractmethod
    def step(self) -> None:
        """Precondition the gradients in place."""

    @abstractmethod
    def diagnostics(self) -> dict[str, float]:
        """Counters and figures that tell how the method is doing. Synchronises with the device."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Everything a bit-for-bit resume needs; not the hyper-parameters."""

    @abstractmethod
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a :meth:`state_dict` from any device. Raises, changing nothing, if it does not fit."""

    def _at_step(self, name: str) -> float:
        """The hyper-parameter ``name`` at this step. TypeError if it is not a number."""
        value = getattr(self, name)
        number = value(self.steps) if callable(value) else value
        if isinstance(number, (bool, str)) or not isinstance(number, SupportsFloat):
            raise TypeError(f"{name}: expected a number or a function of the step, got {number!r}")
        return float(number)


def own_gradients(parameters: Iterable[Tensor]) -> None:
    """Copy gradients whose elements share memory, as those of a sum do: they cannot be written to."""
    for p in parameters:
        if p.grad is None or p.grad.is_sparse:
            continue
        if any(stride == 0 and size > 1 for stride, size in zip(p.grad.stride(), p.grad.shape, strict=True)):
            p.grad = p.grad.contiguous()
