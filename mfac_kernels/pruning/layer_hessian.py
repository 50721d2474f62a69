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
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.utils.hooks import RemovableHandle

from mfac_kernels import ops
from mfac_kernels.fisher import _checks
from mfac_kernels.fisher._convolution import input_factor_
from mfac_kernels.fisher._state import check_entries, check_like, copy_into
from mfac_kernels.pruning import _layers

__all__ = ["LayerHessian"]

Scale = Literal["hessian", "mean", "sum"]


@dataclass
class _Gathered:
    """Of one layer, on the device of its inputs. total: sum_t x_t x_t^T; tokens, refused: () int64."""

    total: Tensor
    tokens: Tensor
    refused: Tensor


class LayerHessian(Mapping[str, Tensor]):
    """Name of a layer -> its Hessian, for the layers that were given tokens.

        with mk.pruning.LayerHessian(model) as hessians:
            for batch in data:
                model(batch)
        for name, hessian in hessians.items():
            mk.pruning.gptq(model.get_submodule(name), hessian, bits=4)

    Gathered inside ``with``, which may be entered again to go on. Layers are Linear, Conv1d, Conv2d, Conv3d and the
    Conv1D of transformers. A Hessian is (columns, columns), columns being those of ``weight.flatten(1)``; for a
    convolution with groups (groups, columns, columns). A token is a row of a linear layer's inputs, or a patch of a
    convolution's. Layers that share a weight have one Hessian, under the name of the first.

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
        scale: Scale = "hessian",
        memory: int | None = None,
    ) -> None:
        if scale not in ("hessian", "mean", "sum"):
            raise ValueError(f"scale: expected 'hessian', 'mean' or 'sum', got {scale!r}")
        self.scale = scale
        self.memory = None if memory is None else _checks.positive_int("memory", memory)
        self._layers = _find(model, include, exclude)
        self._gathered: dict[str, _Gathered] = {}
        self._hooks: list[RemovableHandle] = []

    # ---- gathering -------------------------------------------------------------------------------------------------

    def __enter__(self) -> LayerHessian:
        if self._hooks:
            raise RuntimeError("LayerHessian: it is gathering already")
        size = sum(map(_bytes, self._layers.values()))
        if self.memory is not None and size > self.memory:
            raise ValueError(
                f"memory: expected at least {size} bytes for {len(self._layers)} Hessians at once, got {self.memory}; "
                "gather them in shards()"
            )
        self._hooks = [
            module.register_forward_hook(partial(self._on_call, name), with_kwargs=True)
            for name, modules in self._layers.items()
            for module in modules
        ]
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        refused = {name: count for name, count in self.refused.items() if count} if kind is None else {}
        if refused:
            listed = ", ".join(f"{name or 'the model itself'}: {count}" for name, count in refused.items())
            warnings.warn(f"LayerHessian refused calls whose inputs are not finite: {listed}", stacklevel=2)

    def shards(self) -> Iterator[LayerHessian]:
        """The layers in parts that fit into ``memory``, in the order of the model; what a part has gathered is let go
        when the next is asked for.

        for shard in hessians.shards():
            with shard:
                for batch in data:
                    model(batch)
            for name, hessian in shard.items():
                mk.pruning.gptq(model.get_submodule(name), hessian, bits=4)

        So later layers see what has become of earlier ones.

        Raises:
            ValueError: a single Hessian needs more than ``memory``.
        """
        for names in self._packed():
            shard = copy.copy(self)
            shard._layers = {name: self._layers[name] for name in names}
            shard._gathered, shard._hooks = {}, []
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
        mine = self._gathered.get(name)
        if mine is None:
            mine = self._gathered[name] = _empty(module, x)
        x = x.detach().to(mine.total.device)
        if (x.dtype == torch.float64) != (mine.total.dtype == torch.float64):
            x = x.to(mine.total.dtype)
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            tokens = output.numel() // module.out_channels
            # A copy without the check of the op, which excludes its fastest ways.
            finite = x.isfinite().all()
            images = x if x.dim() == module.weight.dim() else x[None]
            input_factor_(module, mine.total, torch.where(finite, images, 0))
            accepted = finite.to(torch.int64)
        else:
            tokens = x.numel() // x.shape[-1]
            refused = ops.linear_factor_(mine.total, x, check_finite=True)
            assert refused is not None
            accepted = 1 - refused[0].to(torch.int64)
        mine.tokens += tokens * accepted
        mine.refused += 1 - accepted

    # ---- what was gathered -----------------------------------------------------------------------------------------

    @property
    def tokens(self) -> dict[str, int]:
        """T of each layer; 0: no finite token yet. Waits for the device."""
        return {name: int(self._gathered[name].tokens) if name in self._gathered else 0 for name in self._layers}

    @property
    def refused(self) -> dict[str, int]:
        """How many calls of each layer had an input that was not finite. Waits for the device."""
        return {name: int(self._gathered[name].refused) if name in self._gathered else 0 for name in self._layers}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._layers:
            raise KeyError(f"{name}: expected a layer that Hessians are gathered of")
        tokens = int(self._gathered[name].tokens) if name in self._gathered else 0
        if not tokens:
            raise KeyError(f"{name}: expected a layer that was given tokens")
        return self._gathered[name].total * {"hessian": 2 / tokens, "mean": 1 / tokens, "sum": 1.0}[self.scale]

    def __contains__(self, name: object) -> bool:
        return name in list(self)

    def __iter__(self) -> Iterator[str]:
        return (name for name, count in self.tokens.items() if count)

    def __len__(self) -> int:
        return sum(map(bool, self.tokens.values()))

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


def _find(model: nn.Module, include: Sequence[str] | None, exclude: Sequence[str]) -> dict[str, list[nn.Module]]:
    """By name, with the modules that share the layer's weight."""
    found: dict[str, nn.Module] = {name: m for name, m in model.named_modules() if _layers.is_layer(m)}
    chosen = found
    for argument, patterns in (("include", include), ("exclude", exclude)):
        if isinstance(patterns, str):
            raise TypeError(f"{argument}: expected a sequence of names, got the string {patterns!r}")
        for pattern in patterns or ():
            if not any(fnmatchcase(name, pattern) for name in found):
                raise ValueError(f"{argument}: expected patterns that fit layers, got {pattern!r}")
    if include is not None:
        chosen = {n: m for n, m in chosen.items() if any(fnmatchcase(n, pattern) for pattern in include)}
    chosen = {n: m for n, m in chosen.items() if not any(fnmatchcase(n, pattern) for pattern in exclude)}
    if not chosen:
        raise ValueError("model: expected linear or convolutional layers, got none")
    first: dict[int, str] = {}
    layers: dict[str, list[nn.Module]] = {}
    for name, module in chosen.items():
        if isinstance(module.weight, UninitializedParameter):
            raise ValueError(f"model: expected layers with a shape, got {name}: call the model once before")
        layers.setdefault(first.setdefault(id(module.weight), name), []).append(module)
    return layers


def _empty(layer: nn.Module, x: Tensor) -> _Gathered:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    count = torch.zeros((), dtype=torch.int64, device=x.device)
    return _Gathered(torch.zeros(_layers.hessian_shape(layer), dtype=dtype, device=x.device), count, count.clone())


def _bytes(modules: Sequence[nn.Module]) -> int:
    return math.prod(_layers.hessian_shape(modules[0])) * (8 if modules[0].weight.dtype == torch.float64 else 4)
