"""Arguments: right ones, and then perhaps one that is wrong in one way."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from hypothesis import strategies as st
from torch import Tensor

T = TypeVar("T")
Arguments = dict[str, Any]

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
NUMBERS = (0.0, -1.0, math.nan, math.inf, -math.inf, 1e-300, 1e300, 5e-324, 1e-30, 1e30)
INTEGERS = (0, -1, 1, 3, 1000, 2**31, 2**40, 2**62, -(2**62))


class Work(int):
    """A number that the time of a call grows with: it does not become large."""


class Draw:
    """Draws from hypothesis.

    Attributes:
        tame: all values drawn so far are finite, of ordinary size, and right: results must be finite.
    """

    def __init__(self, data: Any) -> None:
        self._data = data
        self.tame = True

    def pick(self, options: Iterable[T]) -> T:
        chosen: T = self._data.draw(st.sampled_from(tuple(options)))
        return chosen

    def int(self, low: int, high: int) -> int:
        return int(self._data.draw(st.integers(low, high)))

    def bool(self) -> bool:
        return bool(self._data.draw(st.booleans()))

    def chance(self, one_in: int) -> bool:
        return self.int(0, one_in - 1) == one_in - 1

    def dtype(self, among: Iterable[torch.dtype] = FLOATS) -> torch.dtype:
        return self.pick(among)

    def size(self) -> int:
        """Of a dimension: mostly small, sometimes none, sometimes beyond a vector and a tile."""
        return self.int(1, 9) if not self.chance(4) else self.pick((0, 1, 15, 16, 17, 31, 33, 64, 65, 130))

    def positive(self) -> float:
        """A damping and its like."""
        if self.chance(4):
            self.tame = False
            return self.pick((1e-300, 1e-30, 1e-12, 1e12, 1e30, 1e300))
        return self.pick((1e-3, 0.1, 1.0, 10.0))

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        generator = torch.Generator().manual_seed(self.int(0, 99))
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    def tensor(self, *shape: int, dtype: torch.dtype = torch.float32, strided: bool = True) -> Tensor:
        """Of random values and strides."""
        t = self.valued(self.normal(*shape, dtype=dtype))
        return self.laid(t) if strided else t

    def valued(self, t: Tensor) -> Tensor:
        """The same shape with other values, now and then."""
        if not self.chance(4):
            return t
        kind = self.pick(("zero", "one value", "tiny", "huge", "largest", "not finite"))
        if kind == "zero":
            return torch.zeros_like(t)
        if kind == "one value":
            return torch.full_like(t, 0.5)
        self.tame = False
        if kind == "tiny":
            return t * torch.finfo(t.dtype).tiny
        if kind == "huge":
            return t * torch.finfo(t.dtype).max ** 0.5
        if kind == "largest":
            return torch.full_like(t, torch.finfo(t.dtype).max)
        if t.numel():
            t.view(-1)[self.int(0, t.numel() - 1)] = self.pick((math.nan, math.inf, -math.inf))
        return t

    def spd(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """(..., n, n) symmetric, mostly positive definite."""
        root = self.normal(*shape, shape[-1], dtype=torch.float64)
        eye = torch.eye(shape[-1], dtype=torch.float64)
        return self.laid(
            self.valued((root @ root.mT / max(1, shape[-1]) + self.pick((1.0, 1e-3, 0.0)) * eye).to(dtype))
        )

    def laid(self, t: Tensor) -> Tensor:
        """The same values in another layout, now and then."""
        how = self.pick(("as it is", "as it is", "transposed", "every other", "inside"))
        if t.dim() == 0 or how == "as it is":
            return t
        if how == "transposed" and t.dim() >= 2:
            return t.mT.contiguous().mT
        if how == "every other":
            return torch.stack([t, t + 1], -1).flatten(-2)[..., ::2]
        padded = torch.nn.functional.pad(t, (1, 2))
        return padded[..., 1 : t.shape[-1] + 1]

    def flawed(self, arguments: Arguments, sound: Iterable[str] = ()) -> Arguments:
        """The arguments, half of the time with one of them (none of those that are ``sound``) changed."""
        names = [name for name in arguments if name not in sound]
        if names and self.bool():
            name = self.pick(names)
            arguments[name] = self.changed(arguments[name])
            self.tame = False
        return arguments

    def changed(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._changed_tensor(value)
        if isinstance(value, list) and value:
            i = self.int(0, len(value))
            return value[:-1] if i == len(value) else [*value[:i], self.changed(value[i]), *value[i + 1 :]]
        if isinstance(value, bool):
            return not value
        if isinstance(value, int):
            return self.pick((0, -1, INTEGERS[-1]) if isinstance(value, Work) else INTEGERS)
        if isinstance(value, float):
            return self.pick(NUMBERS)
        if isinstance(value, str):
            return "nonsense"
        if isinstance(value, torch.dtype):
            return self.pick((*FLOATS, torch.int64, torch.bool, torch.complex64))
        return value

    def _changed_tensor(self, t: Tensor) -> Tensor:
        changes: dict[str, Callable[[], Tensor]] = {
            "another dtype": lambda: t.to(self.pick((*FLOATS, torch.int64, torch.int32, torch.bool, torch.complex64))),
            "one dimension more": lambda: t.unsqueeze(self.pick((0, -1))),
            "one dimension less": lambda: t.flatten() if t.dim() == 2 else t.sum(-1).to(t.dtype) if t.dim() else t,
            "no dimensions": lambda: t.new_zeros(()),
            "shorter": lambda: t[..., :-1] if t.dim() else t,
            "longer": lambda: torch.cat([t, t], -1) if t.dim() else t,
            "fewer": lambda: t[1:] if t.dim() else t,
            "more": lambda: torch.cat([t, t[:1]]) if t.dim() else t,
            "empty": lambda: t[..., :0] if t.dim() else t,
            "none": lambda: t[:0] if t.dim() else t,
            "expanded": lambda: t[..., :1].expand(t.shape) if t.dim() and t.shape[-1] else t,
            "not finite": lambda: (
                t.clone().fill_(self.pick((math.nan, math.inf))) if t.is_floating_point() else t.logical_not()
            ),
            "huge": lambda: t * 1e30 if t.is_floating_point() else t + 2**20,
            "requires a gradient": lambda: t.detach().clone().requires_grad_() if t.is_floating_point() else t,
        }
        return changes[self.pick(changes)]()
