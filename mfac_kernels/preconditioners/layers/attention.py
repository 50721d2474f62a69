"""nn.MultiheadAttention by its projections, which it computes without calling a module."""

from __future__ import annotations

import copyreg
import functools
from collections.abc import Callable, Iterable, Sequence
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mfac_kernels.preconditioners.layers.base import Handle, Hook, Layer, Options
from mfac_kernels.preconditioners.layers.linear import LinearLayer

_WATCH = "_mfac_kernels_watch"


class AttentionProjection(LinearLayer):
    """A projection of an nn.MultiheadAttention: of the query, of the key, of the value, or that of the output.

    Each has a pair of factors of its own, as if it were an nn.Linear, whether its weight is a third of
    ``in_proj_weight`` or a parameter of its own. Positions: those of what it projects. Samples: the dimension that is
    the batch's for the attention.
    """

    def __init__(
        self, name: str, module: nn.Module, options: Options, attention: nn.MultiheadAttention, place: int = 0
    ) -> None:
        self.attention, self._place, self._width = attention, place, attention.embed_dim
        if module is attention:
            self.weight_name, self.bias_name = _weight_names(attention)[place], "in_proj_bias"
        super().__init__(name, module, options)

    @classmethod
    def of(cls, name: str, module: nn.Module, options: Options) -> Sequence[Layer] | str:
        """Those of the inputs; :meth:`of_output` has the other one."""
        assert isinstance(module, nn.MultiheadAttention)
        why = [cls.unusable(module, weight) for weight in _weight_names(module)]
        stem = f"{name}." if name else ""
        layers = [
            cls(f"{stem}{side}_proj", module, options, module, place)
            for place, side in enumerate("qkv")
            if why[place] is None
        ]
        return layers or why[0] or ""

    @classmethod
    def of_output(
        cls, name: str, module: nn.Module, options: Options, attention: nn.MultiheadAttention
    ) -> Sequence[Layer] | str:
        return cls.unusable(module, cls.weight_name) or [cls(name, module, options, attention)]

    def part(self, p: Tensor) -> Tensor:
        return p if len(p) == self._width else p[self._place * self._width : (self._place + 1) * self._width]

    def samples_first(self, x: Tensor, dim: int) -> Tensor:
        return x.movedim(1, 0)  # as attention is computed, whatever ``batch_first``

    def own_outputs(self, output: Tensor, dim: int) -> Tensor:
        """Of the projections that were computed together the last is the value's."""
        together = output.shape[-1] // self._width
        first = max(0, self._place - (3 - together)) * self._width
        return self.samples_first(output[..., first : first + self._width], dim)

    def is_in(self, weight: Tensor) -> bool:
        """Whether its rows are some of ``weight``'s."""
        start = weight.data_ptr()
        return start <= self.part(self.weight).data_ptr() < start + weight.nbytes

    def attach(self, hook: Hook) -> list[Handle]:
        return [_Watch.of(self.attention).add(self, hook)]

    def hooks(self) -> Iterable[object]:
        watch = vars(self.attention).get(_WATCH)
        return [hook for layer, hook in watch.hooks.values() if layer.name == self.name] if watch else []


def _weight_names(attention: nn.MultiheadAttention) -> list[str]:
    """Of the projections of query, key and value."""
    if attention._qkv_same_embed_dim:
        return ["in_proj_weight"] * 3
    return [f"{side}_proj_weight" for side in "qkv"]


class _Watch:
    """Shows the calls of an attention's projections to hooks, while there are any.

    The attention is made an instance of a class derived from its own, whose copies are of its own again.
    """

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        self.attention = attention
        self.hooks: dict[int, tuple[AttentionProjection, Hook]] = {}
        self._count = 0

    @staticmethod
    def of(attention: nn.MultiheadAttention) -> _Watch:
        watch = vars(attention).get(_WATCH)
        if watch is None:
            watch = _Watch(attention)
            vars(attention)[_WATCH] = watch
            attention.__class__ = _watched(type(attention))
        assert isinstance(watch, _Watch)
        return watch

    def add(self, layer: AttentionProjection, hook: Hook) -> Handle:
        self._count += 1
        self.hooks[self._count] = layer, hook
        return _Removal(self, self._count)

    def remove(self, key: int) -> None:
        self.hooks.pop(key, None)
        kind = type(self.attention)
        if not self.hooks and vars(self.attention).get(_WATCH) is self:
            del vars(self.attention)[_WATCH]
            if "plain_class" in vars(kind):  # else it was given another class since, over this one
                self.attention.__class__ = vars(kind)["plain_class"]


class _Removal:
    def __init__(self, watch: _Watch, key: int) -> None:
        self._watch, self._key = watch, key

    def remove(self) -> None:
        self._watch.remove(self._key)


def _watched(plain: type[nn.MultiheadAttention]) -> type[nn.MultiheadAttention]:
    """The class of an attention that is watched."""

    class Watched(plain):  # type: ignore[misc, valid-type]
        plain_class = plain

        @torch.compiler.disable
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            watch = vars(self).get(_WATCH)
            # A mode would keep the attention from its faster way, which has no gradients
            if watch is None or not torch.is_grad_enabled():
                return super().forward(*args, **kwargs)
            with _Mode(watch):
                return super().forward(*args, **kwargs)

        def __reduce_ex__(self, protocol: Any) -> Any:
            made = super().__reduce_ex__(protocol)
            if type(self) is not Watched:
                return made
            state = {key: value for key, value in made[2].items() if key != _WATCH}
            return copyreg._reconstructor, (plain, object, None), state  # type: ignore[attr-defined]

    for name in ("__name__", "__qualname__", "__module__", "__doc__"):
        setattr(Watched, name, getattr(plain, name))
    return Watched


class _Mode(TorchFunctionMode):
    """While an attention is computed: shows what it multiplies with its weights, as (positions, samples, columns)."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self._watch, self._samples = watch, 1

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is F.multi_head_attention_forward and isinstance(function, FunctionType):
            query = args[0]
            self._samples = query.shape[1] if query.dim() == 3 else 1
            function = _with_linear(function, self._linear)
        return function(*args, **(kwargs or {}))

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if x.dtype == torch.float32 and torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))  # as F.linear would: one copy for all records
        output = F.linear(x, weight, bias)
        hooks = [(layer, hook) for layer, hook in self._watch.hooks.values() if layer.is_in(weight)]
        if not hooks:
            return output
        flat = output.shape
        if len(flat) == 2:  # (positions * samples, columns)
            x, output = (t.view(-1, self._samples, t.shape[-1]) for t in (x, output))
        for layer, hook in hooks:
            hook(layer.module, (x,), {}, output)
        return output.view(flat) if len(flat) == 2 else output


def _with_linear(function: FunctionType, linear: Callable[..., Tensor]) -> FunctionType:
    """The same code, and that of the functions beside it, with another ``F.linear``."""
    names = {**function.__globals__, "linear": linear}
    for name in _users_of_linear():
        f = names[name]
        if isinstance(f, FunctionType):
            names[name] = FunctionType(f.__code__, names, name, f.__defaults__, f.__closure__)
    made = names[function.__name__]
    assert isinstance(made, FunctionType)
    return made


@functools.cache
def _users_of_linear() -> list[str]:
    return [n for n, f in vars(F).items() if isinstance(f, FunctionType) and "linear" in f.__code__.co_names]
