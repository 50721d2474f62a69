"""What may come of a call: a result, or an error of the documented kinds that names an argument and changes nothing."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

R = TypeVar("R")

KINDS = (ValueError, TypeError, RuntimeError)
"""Of errors; torch.linalg.LinAlgError is one of them. What is looked up and is not there has kinds of its own:"""
LOOKUPS = (IndexError, KeyError)

# "gram: g: expected 2 dimensions, got shape (3,)", "damping: expected a positive number, got 0"
EXPECTED = re.compile(
    r"^['\"]?([\w .]+: )?[\w.\[\]'\" ]+: (layer \d+: |its weight: |\w+: |row \d+: )?expected \S+", re.S
)
OTHERS = re.compile(
    r"^(?:"
    r"block \d+: not positive definite at damping |"
    # LinAlgError of a block
    r"\w+: (?:block \(.*\)|the block): "
    r"(?:the (?:leading|trailing) minor of order \d+ is (?:not positive|zero)|not finite)"
    r"|\w+: not differentiable: expected"
    # a preconditioner's: MFAC: .., KFAC: ..
    r"|(?:MFAC|KFAC|TwoLevelKFAC|MiniBlockFisher|KBFGS|LayerHessian|StaticFisher): "
    r"|g: \d+ gradients were not finite"
    r"|eigen_correction: |sparsity: |momentum: |model: "
    # torch's own for an argument of another type, which it names
    r"|mfac_kernels::\w+\(\) (?:Expected a value of type|expected at most)"
    r")"
)
NO_MEMORY = re.compile(
    r"can't allocate memory|not enough memory|Storage size calculation overflowed|aten::(new_)?empty.*API call failed"
)


class Fault(Exception):
    """What must not come of a call."""


def judged(error: Exception) -> str | None:
    """Why an error may not be raised; None: it may."""
    message = str(error)
    if isinstance(error, RuntimeError) and NO_MEMORY.search(message):
        return None  # asked for more than there is
    if not isinstance(error, (*KINDS, *LOOKUPS)) or isinstance(
        error, UnicodeError | NotImplementedError | RecursionError
    ):
        return f"expected ValueError, TypeError or RuntimeError, got {type(error).__name__}: {message}"
    if not EXPECTED.match(message) and not OTHERS.match(message):
        return f"expected a message that names an argument, got {type(error).__name__}: {message}"
    return None


class Refused:
    """In place of a result."""


REFUSED = Refused()


def attempt(call: Callable[[], R], *state: Any, keeps: bool = True) -> R | Refused:
    """What ``call`` returns, or REFUSED if it may be, with ``state`` as it was if it ``keeps`` that."""
    before = snapshot(state)
    try:
        return call()
    except Exception as error:
        why = judged(error)
        if why is not None:
            raise Fault(why) from error
        numeric = isinstance(error, torch.linalg.LinAlgError)
        if keeps and not numeric and not same(before, after := snapshot(state)):
            raise Fault(
                f"expected an error to change nothing, but {difference(before, after)} after: {error}"
            ) from error
        return REFUSED


def tensors(value: Any) -> list[Tensor]:
    """All of a nested value."""
    return [leaf for leaf in leaves(value) if isinstance(leaf, Tensor)]


def leaves(value: Any) -> list[Any]:
    if isinstance(value, nn.Module):
        own = [(p, p.grad) for p in value.parameters()]
        return leaves([own, list(value.buffers())])
    if isinstance(value, Stateful):
        return leaves(value.state())
    flat = tree_flatten(value)[0]
    if any(isinstance(leaf, nn.Module | Stateful) for leaf in flat):
        return [own for leaf in flat for own in (leaves(leaf) if isinstance(leaf, nn.Module | Stateful) else [leaf])]
    return flat


class Stateful:
    """A state to compare that is asked for anew each time."""

    def __init__(self, state: Callable[[], Any]) -> None:
        self.state = state


def snapshot(value: Any) -> list[Any]:
    return [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves(value)]


def same(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) and all(_same(a, b) for a, b in zip(one, other, strict=True))


def _same(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor):
        return type(a) is type(b) and (a is b or a == b or a != a)
    if not isinstance(b, Tensor) or a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def difference(one: list[Any], other: list[Any]) -> str:
    if len(one) != len(other):
        return f"there are {len(other)} entries, not {len(one)}"
    at, a, b = next((i, a, b) for i, (a, b) in enumerate(zip(one, other, strict=True)) if not _same(a, b))
    return f"entry {at} was {_brief(a)} and is {_brief(b)}"


def _brief(value: Any) -> str:
    return f"{str(value.dtype)[6:]}{tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)


def expect(condition: bool, message: str) -> None:
    if not condition:
        raise Fault(message)


def expect_finite(what: str, value: Any) -> None:
    for t in tensors(value):
        if t.is_floating_point():
            expect(bool(t.isfinite().all()), f"{what}: expected finite values of finite arguments, got {_brief(t)}")
