"""What autograd knows about the backward pass that runs: which one it is, and what it computes.

A backward pass is a graph task of autograd's engine. Reentrant checkpointing runs others within it, one for each
checkpointed segment, which are part of it here. Private functions of torch are used in this file alone.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.graph import Node

Mark = dict[Any, Any]
"""The metadata of a node: lives as long as the node, whatever pass visits it."""


class Pass:
    """One backward pass.

    ``layers``: which it has counted a call of; ``positions``: of a sample so far, over all calls of a layer's use.
    """

    __slots__ = ("layers", "positions")

    def __init__(self) -> None:
        self.layers: set[int] = set()
        self.positions: dict[object, float] = {}


class Passes:
    """Tells passes apart. Asked in every forward call and in every backward hook, so it sees all that are nested."""

    def __init__(self) -> None:
        self._running: list[int] = []  # graph tasks, each nested in the one before
        self._current = Pass()
        self._origin: Mark | None = None

    def current(self) -> Pass | None:
        """The pass that runs; None: none does."""
        task = torch._C._current_graph_task_id()
        if task == -1:
            self.reset()
            return None
        if task not in self._running:
            if not self._running:
                self._current, self._origin = Pass(), None
            self._running.append(task)
            torch.autograd.Variable._execution_engine.queue_callback(partial(self._end, task))
        return self._current

    def origin(self) -> Mark | None:
        """In a forward call: None, or, if a backward pass repeats it, the mark of the node that does.

        Of nested ones the outermost: the others are made anew by each pass.
        """
        if self.current() is None:
            return None
        node = torch._C._current_autograd_node()
        if len(self._running) == 1 and node is not None:
            self._origin = cast(Mark, node.metadata)  # a property, whatever its stub says
        return self._origin

    def reset(self) -> None:
        """No pass runs: one that ended in an error has not said so."""
        self._running.clear()

    def _end(self, task: int) -> None:
        if task in self._running:
            del self._running[self._running.index(task) :]


def accumulator(parameter: Tensor) -> Node:
    """The node that accumulates the gradient of a leaf. Asked while gradients are enabled."""
    view = parameter.view_as(parameter)
    assert view.grad_fn is not None
    node = view.grad_fn.next_functions[0][0]
    assert node is not None
    return node


def computes(node: Node) -> bool:
    """Whether the pass that runs computes the gradient of the leaf that ``node`` accumulates."""
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # autograd.grad was asked for it: it is captured in place of being accumulated
        return True


def keeps_graph() -> bool:
    """Whether the pass that runs was told to retain the graph."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


def transformed() -> bool:
    """Whether a transform of ``torch.func`` runs."""
    return bool(torch._C._are_functorch_transforms_active())


class Saved:
    """A tensor as autograd saves it: packed by whatever saved-tensor hooks are set (checkpoints drop and recompute it,
    others move it away), and an error if it was written to in between. Made while gradients are enabled."""

    __slots__ = ("_result",)

    def __init__(self, x: Tensor) -> None:
        anchor = torch.empty(0, requires_grad=True)
        self._result: Any = _Save.apply(anchor, x)  # type: ignore[no-untyped-call]  # keeps its node's tensors

    def get(self) -> Tensor:
        (x,) = self._result.grad_fn.saved_tensors
        assert isinstance(x, Tensor)
        return x


class _Save(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return anchor.new_empty(0)
