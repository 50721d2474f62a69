"""Sees what stacked experts are given: parameters (experts, rows, columns) that no module of their own multiplies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_GROUPED = tuple(f for f in (getattr(F, "grouped_mm", None), getattr(torch, "_grouped_mm", None)) if f is not None)


class Watch(TorchFunctionMode):
    """While it is entered: seen(name, x, offsets) for every product with one of ``experts``, by name.

    These are ``F.linear(x, weight[e])`` and ``F.grouped_mm(x, weight.mT, offs=..)``. Expert e has the rows
    ``offsets[e]:offsets[e + 1]`` of x (tokens, columns). Weights are known by their memory: it stays where it is.
    """

    def __init__(self, experts: Mapping[str, nn.Parameter], seen: Callable[[str, Tensor, Tensor], None]) -> None:
        super().__init__()
        self._slices = {
            own.data_ptr(): (name, e) for name, weight in experts.items() for e, own in enumerate(weight.detach())
        }
        self._experts, self._seen = experts, seen

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if function is F.linear:
            self._on_linear(*args, **kwargs)
        elif function in _GROUPED:
            self._on_grouped(*args, **kwargs)
        return result

    def _on_linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
        name, expert = self._slices.get(weight.data_ptr(), ("", 0))
        if not name or weight.shape != self._experts[name].shape[1:]:
            return
        x = input.reshape(-1, input.shape[-1])
        offsets = torch.zeros(len(self._experts[name]) + 1, dtype=torch.int64)
        offsets[expert + 1 :] = len(x)
        self._seen(name, x, offsets.to(x.device, non_blocking=True))

    def _on_grouped(self, input: Tensor, weight: Tensor, *, offs: Tensor | None = None, **_: object) -> None:
        name, _first = self._slices.get(weight.data_ptr(), ("", 0))
        if name and offs is not None and input.dim() == 2 and weight.mT.shape == self._experts[name].shape:
            self._seen(name, input, F.pad(offs, (1, 0)))
