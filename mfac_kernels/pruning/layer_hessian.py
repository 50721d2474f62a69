"""The Hessians of a model's layers: second moments of what the layers are given, gathered while data runs through it.

To second order, and exactly for a layer's own mean squared error, what a change dW of its weight (rows, columns) does
to its outputs over T tokens is (1/2) tr(dW H dW^T) with

    H = (2/T) sum_t x_t x_t^T.

Quantisation and pruning of single layers start from it: :func:`gptq`, :func:`sparsegpt`.

Sources: Frantar, Alistarh, "Optimal Brain Compression", NeurIPS 2022; Frantar et al., "GPTQ", ICLR 2023.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from mfac_kernels import ops
from mfac_kernels.fisher import _checks
from mfac_kernels.fisher._convolution import input_factor_
from mfac_kernels.fisher._state import check_entries, check_like, copy_into
from mfac_kernels.pruning import _layers
from mfac_kernels.pruning._experts import Watch

__all__ = ["LayerHessian"]

Scale = Literal["hessian", "mean", "sum"]
Count = int | list[int]


@dataclass
class _Gathered:
    """Of one layer, on the device of its inputs.

    total: sum_t x_t x_t^T; tokens, refused: () int64, or (experts,).
    """

    total: Tensor
    tokens: Tensor
    refused: Tensor

    def count(self, tokens: Tensor | int, refused: Tensor) -> None:
        """So many more tokens, if they were not refused."""
        refused = refused.to(torch.int64)
        self.tokens += tokens * (1 - refused)
        self.refused += refused


class LayerHessian(Mapping[str, Tensor]):
    """Name of a layer -> its Hessian, for the layers that were given tokens.

        with mk.pruning.LayerHessian(model) as hessians:
            for batch in data:
                model(batch)
        for name, hessian in hessians.items():
            mk.pruning.gptq(hessians.layer(name), hessian, bits=4)

    Gathered inside ``with``, which may be entered again to go on. Layers are Linear, Conv1d, Conv2d, Conv3d and the
    Conv1D of transformers. A Hessian is (columns, columns), columns being those of ``weight.flatten(1)``; for a
    convolution with groups (groups, columns, columns). A token is a row of a linear layer's inputs, or a patch of a
    convolution's. Layers that share a weight have one Hessian, under the name of the first. Stacked ``experts`` have
    (experts, columns, columns) under the name of their parameter, 0 for those without tokens.

    It is a new tensor each time that it is asked for, float32, or float64 for float64 inputs, on the device of the
    inputs; 16-bit inputs are summed in float32. A call without tokens changes nothing. One whose input is not finite
    changes nothing but the number of ``refused`` calls, which a warning tells at the end. Nothing in a call waits for
    the device.

    Where the Hessians of all layers need too much memory, ``memory`` is what may be had and :meth:`shards` gathers as
    many at a time as fit.

    Args:
        model: in the mode that it is used in. Under ``torch.compile``, enter before its first call.
        include: patterns (``fnmatch``) of the names of layers; None: all.
        exclude: patterns of those to leave out.
        experts: patterns of the names of parameters (experts, rows, columns) that are layers too, used by
            ``F.linear(x, weight[e])`` or ``F.grouped_mm(x, weight.mT, offs=..)`` in this thread, not compiled.
        scale: ``"hessian"``: (2/T) sum_t x_t x_t^T; ``"mean"``: (1/T) sum_t x_t x_t^T; ``"sum"``: sum_t x_t x_t^T.
        memory: bytes for what is gathered.

    Raises:
        TypeError, ValueError: an argument outside these ranges; a pattern that fits no layer; no layer at all.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        experts: Sequence[str] = (),
        scale: Scale = "hessian",
        memory: int | None = None,
    ) -> None:
        if scale not in ("hessian", "mean", "sum"):
            raise ValueError(f"scale: expected 'hessian', 'mean' or 'sum', got {scale!r}")
        self.scale = scale
        self.memory = None if memory is None else _checks.positive_int("memory", memory)
        self._layers = _layers.find(model, include, exclude, experts)
        self._gathered: dict[str, _Gathered] = {}
        self._hooks: ExitStack | None = None

    # ---- gathering -------------------------------------------------------------------------------------------------

    def __enter__(self) -> LayerHessian:
        if self._hooks is not None:
            raise RuntimeError("LayerHessian: it is gathering already")
        size = sum(map(_bytes, self._layers.values()))
        if self.memory is not None and size > self.memory:
            raise ValueError(
                f"memory: expected at least {size} bytes for {len(self._layers)} Hessians at once, got {self.memory}; "
                "gather them in shards()"
            )
        self._hooks = ExitStack()
        for name, layers in self._layers.items():
            for module in layers:
                if isinstance(module, nn.Module):
                    hook = module.register_forward_hook(partial(self._on_call, name), with_kwargs=True)
                    self._hooks.callback(hook.remove)
        stacked = {name: own[0] for name, own in self._layers.items() if isinstance(own[0], nn.Parameter)}
        if stacked:
            self._hooks.enter_context(Watch(stacked, self._on_experts))
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._hooks is not None:
            self._hooks.close()
        self._hooks = None
        refused = [(name, count) for name, count in self.refused.items() if _some(count)]
        if refused and kind is None:
            listed = ", ".join(f"{name or 'the model itself'}: {count}" for name, count in refused)
            warnings.warn(f"LayerHessian refused calls whose inputs are not finite: {listed}", stacklevel=2)

    def shards(self) -> Iterator[LayerHessian]:
        """The layers in parts that fit into ``memory``, in the order of the model; what a part has gathered is let go
        when the next is asked for.

            for shard in hessians.shards():
                with shard:
                    for batch in data:
                        model(batch)
                for name, hessian in shard.items():
                    mk.pruning.gptq(shard.layer(name), hessian, bits=4)

        So later layers see what has become of earlier ones.

        Raises:
            ValueError: a single Hessian needs more than ``memory``.
        """
        for names in self._packed():
            shard = copy.copy(self)
            shard._layers = {name: self._layers[name] for name in names}
            shard._gathered, shard._hooks = {}, None
            yield shard
            shard._gathered.clear()

    def _packed(self) -> list[list[str]]:
        """Names, in parts that fit."""
        packed: list[list[str]] = [[]]
        used = 0
        for name, modules in self._layers.items():
            size = _bytes(modules)
            if self.memory is not None and size > self.memory:
                raise ValueError(f"memory: expected at least {size} bytes for the Hessian of {name}, got {self.memory}")
            if self.memory is not None and used + size > self.memory:
                packed.append([])
                used = 0
            packed[-1].append(name)
            used += size
        return packed

    @torch.compiler.disable
    @torch.no_grad()
    def _on_call(
        self, name: str, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any
    ) -> None:
        x = arguments[0] if arguments else next(iter(keywords.values()), None)
        if not isinstance(x, Tensor) or x.is_nested or x.layout != torch.strided:
            got = type(x).__name__ if not isinstance(x, Tensor) else "one that is nested or sparse"
            raise TypeError(f"{name}: expected a dense tensor as input, got {got}")
        if x.numel() == 0:
            return
        mine, x = self._prepared(name, x)
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            tokens = output.numel() // module.out_channels
            # A copy without the check of the op, which excludes its fastest ways.
            finite = x.isfinite().all()
            images = x if x.dim() == module.weight.dim() else x[None]
            input_factor_(module, mine.total, torch.where(finite, images, 0))
            mine.count(tokens, ~finite)
        else:
            refused = ops.linear_factor_(mine.total, x, check_finite=True)
            assert refused is not None
            mine.count(x.numel() // x.shape[-1], refused[0])

    @torch.no_grad()
    def _on_experts(self, name: str, x: Tensor, offsets: Tensor) -> None:
        if x.numel() == 0:
            return
        mine, x = self._prepared(name, x)
        offsets = offsets.to(x.device)
        refused = ops.linear_factor_(mine.total, x, offsets=offsets, check_finite=True)
        assert refused is not None
        mine.count(offsets.diff(), refused)

    def _prepared(self, name: str, x: Tensor) -> tuple[_Gathered, Tensor]:
        """The sums, and x on their device and in a dtype that they take."""
        mine = self._gathered.get(name)
        if mine is None:
            mine = self._gathered[name] = _empty(self._layers[name][0], x)
        x = x.detach().to(mine.total.device)
        fits = (x.dtype == torch.float64) == (mine.total.dtype == torch.float64)
        return mine, x if fits else x.to(mine.total.dtype)

    # ---- what was gathered -----------------------------------------------------------------------------------------

    @property
    def tokens(self) -> dict[str, Count]:
        """T of each layer, a list for stacked experts; 0: no finite token yet. Waits for the device."""
        return {name: self._counted(name, "tokens") for name in self._layers}

    @property
    def refused(self) -> dict[str, Count]:
        """How many calls of each layer had an input that was not finite. Waits for the device."""
        return {name: self._counted(name, "refused") for name in self._layers}

    def _counted(self, name: str, what: Literal["tokens", "refused"]) -> Count:
        mine, layer = self._gathered.get(name), self._layers[name][0]
        count = torch.zeros(_layers.experts_shape(layer)) if mine is None else getattr(mine, what)
        return cast(Count, count.to(torch.int64).tolist())

    def layer(self, name: str) -> nn.Module | nn.Parameter:
        """The layer itself, as :func:`gptq` and :func:`sparsegpt` take it."""
        return self._layers[name][0]

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._layers:
            raise KeyError(f"{name}: expected a layer that Hessians are gathered of")
        mine = self._gathered.get(name)
        if mine is None or not bool(mine.tokens.any()):
            raise KeyError(f"{name}: expected a layer that was given tokens")
        if self.scale == "sum":
            return mine.total.clone()
        factor = (2 if self.scale == "hessian" else 1) / mine.tokens.clamp_min(1).to(mine.total.dtype)
        return mine.total * factor[..., None, None]

    def __contains__(self, name: object) -> bool:
        return any(name == other for other in self)

    def __iter__(self) -> Iterator[str]:
        return (name for name, count in self.tokens.items() if _some(count))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Name of a layer -> what it has gathered: ``total``, the sum over tokens; ``tokens``; ``refused``.

        Entries of several processes add.
        """
        return {name: {key: value.clone() for key, value in vars(own).items()} for name, own in self._gathered.items()}

    def load_state_dict(self, state_dict: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Replace what was gathered by a :meth:`state_dict`, on its devices.

        Raises:
            KeyError, TypeError, ValueError: it is not one of these layers; nothing changes.
        """
        loaded = {}
        for name, state in state_dict.items():
            if name not in self._layers:
                raise KeyError(f"state_dict: expected layers that Hessians are gathered of, got {name!r}")
            check_entries(f"state_dict[{name!r}]", ("total", "tokens", "refused"), state)
            own = _empty(self._layers[name][0], state["total"])
            check_like(f"state_dict[{name!r}]", vars(own), dict(state))
            copy_into(vars(own), dict(state))
            loaded[name] = own
        self._gathered = loaded


def _empty(layer: _layers.Layer, x: Tensor) -> _Gathered:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    total = torch.zeros(_layers.hessian_shape(layer), dtype=dtype, device=x.device)
    count = torch.zeros(_layers.experts_shape(layer), dtype=torch.int64, device=x.device)
    return _Gathered(total, count, count.clone())


def _bytes(layers: Sequence[_layers.Layer]) -> int:
    wide = _layers.weight_of(layers[0]).dtype == torch.float64
    return math.prod(_layers.hessian_shape(layers[0])) * (8 if wide else 4)


def _some(count: Count) -> bool:
    return any(count) if isinstance(count, list) else count > 0
