"""K-FAC's gathering: what a backward pass computed is what enters the factors.

A call of a layer leaves a record of its input with its output's gradient hook, and nothing else holds it: a call whose
output is dropped, or that no backward pass reaches, leaves no trace. When a pass reaches the output, and computes the
weight's gradient too, the call's part of A and of B enter together. Until then no memory is held but the input, which
autograd keeps for the weight's gradient in any case.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from mfac_kernels.fisher._state import check_entries
from mfac_kernels.fisher.kronecker import KroneckerFisher
from mfac_kernels.preconditioners._fisher_batch import FisherBatch
from mfac_kernels.preconditioners._passes import (
    Mark,
    Pass,
    Passes,
    Saved,
    accumulator,
    computes,
    keeps_graph,
    transformed,
)
from mfac_kernels.preconditioners._sizes import BatchSizes, Counting
from mfac_kernels.preconditioners._valid import Valid, ValidRows, Ways
from mfac_kernels.preconditioners.layers.base import Handle, Layer


class Record:
    """A call of a layer, called with the gradient of its output. Does not keep the preconditioner alive."""

    __slots__ = ("__weakref__", "counts", "home", "layer", "node", "owner", "positions", "samples", "use", "valid", "x")

    def __init__(
        self, owner: Gatherer, layer: int, use: Layer, node: Node, x: Saved, samples: int, positions: int
    ) -> None:
        self.owner, self.layer, self.use, self.node = weakref.ref(owner), layer, use, node
        self.x: Saved | None = x
        self.samples, self.positions = samples, positions
        self.counts = True
        self.valid: ValidRows | None = None
        self.home: Mark = {}  # has the first pass that counts this call

    def __call__(self, gradient: Tensor) -> None:
        owner = self.owner()
        if owner is not None:
            owner.on_backward(self, gradient)
        if not keeps_graph():  # autograd lets go of what it kept, too
            self.x = None


class Gatherer:
    """Hooks on layers that add to the sums of a :class:`KroneckerFisher`.

    Attributes:
        owner: whose it is, for messages.
        active: whether the next step has use for factors.
        kept: where calls are kept until the step, whether factors are gathered or not; None: nowhere.
        sampling, paused: inside the contexts of these names.
        valid: the mask of the batch.
        reached: which layers a pass has reached that computes their weight's gradient.
        idle: no pass has reached a layer since the last step, and none was paused.
        unfit: why calls of a layer cannot be counted.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        fisher: KroneckerFisher,
        counting: Counting,
        owner: str = "KFAC",
    ) -> None:
        self.owner = owner
        self._model, self._layers, self.fisher, self.counting = model, list(layers), fisher, counting
        self.active, self.sampling, self.paused = True, False, 0
        self.kept: FisherBatch | None = None
        self.valid: Valid | None = None
        self.reached = [False] * len(layers)
        self.unfit: dict[int, str] = {}
        self.sizes = BatchSizes(self._layers, counting)
        self._passes = Passes()
        self.begin()
        self.attach()

    def begin(self) -> None:
        """The sums are those of no pass."""
        self._key = _Key()  # another: what an earlier batch has counted may count again
        self._count = [0] * len(self._layers)  # passes
        self._newest: list[Pass | None] = [None] * len(self._layers)
        self._earlier: dict[int, Tensor] = {}  # B of passes before the newest
        self.valid = None
        self.idle = True
        if self.kept is not None:
            self.kept.clear()
        self._passes.reset()

    # ---- hooks -----------------------------------------------------------------------------------------------------

    def attach(self) -> None:
        self._hooks = [handle for i, layer in enumerate(self._layers) for handle in layer.attach(_Hook(self, i))]
        weakref.finalize(self, _remove, self._hooks)

    def remove(self) -> None:
        _remove(self._hooks)

    def on_forward(self, i: int, x: Any, output: Any) -> None:
        origin = self._passes.origin()
        if not self._wanted or not (self._model.training or self.counting.gather == "always") or transformed():
            return
        layer = self._layers[i].use(x)
        why = layer.unfit(x, output)
        if why is not None:
            self.idle = False
            if i not in self.unfit:
                self.unfit[i] = why
                warnings.warn(f"{self.owner} leaves the gradient of {layer.title} as it is: {why}", stacklevel=2)
            return
        x = layer.samples_first(x, self.counting.batch_dim)
        positions = layer.positions_of(x, layer.own_outputs(output.detach(), self.counting.batch_dim))
        self.sizes.note(i, len(x), positions)
        leaf = next(iter(layer.parameters()), None)
        if leaf is None or not (torch.is_grad_enabled() and output.requires_grad):
            return
        record = Record(self, i, layer, accumulator(leaf), Saved(_as_used(x, output)), len(x), positions)
        # A pass may repeat this call to rebuild what a checkpoint dropped: what is saved there must be what was here.
        record.counts = origin is not None or not self.paused
        if origin is not None:
            record.home = origin
        if self.valid is not None:
            record.valid = self.valid.of_call(layer.title, record.samples, record.positions)
            expected = layer.expected_for_masks()
            if record.valid is not None and expected is not None:
                raise ValueError(f"valid: mask: expected {expected}")
            record.counts &= not self.valid.empty
        output.register_hook(record)

    def on_backward(self, record: Record, gradient: Tensor) -> None:
        current = self._passes.current()
        wanted = self._wanted and not self.paused and self.sampling == self.counting.sampled and record.x is not None
        if current is None or not wanted or not computes(record.node):
            return
        self.reached[record.layer], self.idle = True, False
        if not record.counts or record.samples == 0 or record.positions == 0:
            return
        with torch.no_grad():
            if self.active:
                self._add(record, current, gradient.detach())
            if self.kept is not None:
                self._keep(self.kept, record, current, gradient.detach())

    @property
    def _wanted(self) -> bool:
        return self.active or self.kept is not None

    def _keep(self, kept: FisherBatch, record: Record, current: Pass, gradient: Tensor) -> None:
        assert record.x is not None
        kept.keep(
            record.layer,
            record.x.get(),
            record.use.own_outputs(gradient, self.counting.batch_dim),
            self.sizes.samples(),
            record.positions,
            (record.home.setdefault(self._key, current), current),
            None if record.valid is None else record.valid.fill,
        )

    # ---- sums ------------------------------------------------------------------------------------------------------

    def _add(self, record: Record, current: Pass, gradient: Tensor) -> None:
        """A and B of one call.

        With c what arrives here, g = steps N c for a mean and g = c for a sum. The sum over g g^T / (steps N S) is
        due, with S the positions of all calls of the pass: those so far, as the sum is rescaled when more come.
        """
        i, layer, fisher = record.layer, record.use, self.fisher
        size = self.sizes.of_call(i, record.samples, record.positions)
        home: Pass = record.home.setdefault(self._key, current)
        first = home is current  # else the call is counted, and another gradient of it comes
        before = home.positions.get(layer, 0.0)
        if first:
            if i not in home.layers:
                home.layers.add(i)
                self._begin_pass(i, current)
            home.positions[layer] = before + size.positions
        steps = self.counting.accumulation_steps * size.samples
        scale = steps if self.counting.loss_average != "sum" else 1 / steps
        way = self._way(record)
        gradient = self._in_dtype(layer.own_outputs(gradient, self.counting.batch_dim))
        block = layer.shape.unit
        corrected = fisher.eigen_correction and not block
        assert record.x is not None
        paired = fisher.paired(i)
        x = layer.features(self._in_dtype(record.x.get())) if first or block or corrected or paired else None
        if block:
            assert x is not None
            by_position = self.counting.by_position
            fisher.add_inputs(
                i, lambda total, beta: layer.add_block(total, x, gradient, by_position, way.both(beta, scale))
            )
            fisher.add_outputs(i, lambda total, beta: total.fill_(1.0))
            return
        if paired or corrected:
            assert x is not None
            pairs = layer.pairs(x, gradient, way.both(1.0, scale))
            if corrected:
                fisher.add_moments(i, *pairs)
            if paired:
                fisher.add_pairs(i, *pairs)
                return
        positions = home.positions[layer]  # B first: the gradient is in the caches now, the input in none
        if home is self._newest[i] or i not in self._earlier:
            rescale = before / positions if first else 1.0
            alpha = scale / positions
            fisher.add_outputs(
                i, lambda total, beta: layer.add_outputs(total, gradient, way.outputs(beta * rescale, alpha))
            )
        else:
            layer.add_outputs(self._earlier[i], gradient, way.outputs(1.0, scale / positions))
        if first:
            assert x is not None
            weight = size.weight / self.counting.accumulation_steps
            fisher.add_inputs(i, lambda total, beta: layer.add_inputs(total, x, way.inputs(beta, weight)))

    def _begin_pass(self, i: int, current: Pass) -> None:
        self._count[i] += 1
        self._newest[i] = current
        shape = self._layers[i].shape
        if shape.unit or self.fisher.paired(i):  # all passes share a sum
            return

        def clear(total: Tensor, beta: float) -> None:
            total.zero_()

        def set_aside(total: Tensor, beta: float) -> None:
            if i in self._earlier:
                self._earlier[i] += total
            else:
                self._earlier[i] = total.clone()

        if self._count[i] > 1:
            self.fisher.add_outputs(i, set_aside)
        if shape.two_uses:  # a call writes to a part of the sums
            if self._count[i] == 1:
                self.fisher.add_inputs(i, clear)
            self.fisher.add_outputs(i, clear)

    def _merge(self) -> None:
        """One sum of all passes. None of them is open: what comes is another."""
        for i, outputs in self._earlier.items():
            self.fisher.add_outputs(i, lambda total, beta, outputs=outputs: total.add_(outputs))  # type: ignore[misc]
        self._earlier.clear()
        self._newest = [None] * len(self._layers)

    def finish(self) -> None:
        """Make the sums those of the mean over the passes that there were."""
        self._merge()
        for i, count in enumerate(self._count):
            if count not in (0, self.counting.accumulation_steps):
                self.fisher.scale_batch(i, self.counting.accumulation_steps / count)

    def _way(self, record: Record) -> Ways:
        reduced = self.counting.reduce and record.positions > 1 and not record.use.always_expands
        if record.valid is not None:
            self.fisher.refused.logical_or_(record.valid.none)
        return Ways(self.fisher.refused, record.valid, self.counting.by_position, reduced)

    def _in_dtype(self, rows: Tensor) -> Tensor:
        """In float64 if the factors are; 16-bit rows stay as they are where these are float32."""
        double = self.fisher.dtype == torch.float64
        fits = not rows.is_floating_point() or (rows.dtype == torch.float64) == double
        return rows if fits else rows.to(self.fisher.dtype)

    # ---- state -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The sums of passes that no step has used yet, those of each layer as they would be if no pass followed."""
        self._merge()
        return {"passes": list(self._count), **self.fisher.batch_state()}

    def check_state_dict(self, name: str, state: Mapping[str, Any]) -> None:
        check_entries(name, ("passes",), state)
        if len(state["passes"]) != len(self._layers):
            raise ValueError(f"{name}['passes']: expected {len(self._layers)} numbers, got {len(state['passes'])}")
        self.fisher.check_batch_state(name, state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.begin()
        self._count = [int(count) for count in state["passes"]]
        self.fisher.load_batch_state(state)

    def __getstate__(self) -> dict[str, Any]:
        state = {key: value for key, value in vars(self).items() if key != "_hooks"}
        return state | {"_passes": Passes()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.attach()


class _Key:
    """What records know a gatherer by."""


class _Hook:
    """A forward hook that ``torch.compile`` leaves to the interpreter. A copy of a module has one that does nothing."""

    def __init__(self, owner: Gatherer | None = None, layer: int = 0) -> None:
        self.owner = None if owner is None else weakref.ref(owner)
        self.layer = layer

    @torch.compiler.disable
    def __call__(self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
        owner = None if self.owner is None else self.owner()
        if owner is not None:
            owner.on_forward(self.layer, arguments[0] if arguments else next(iter(keywords.values()), None), output)

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        return _Hook, ()


def is_gathered(layer: Layer) -> bool:
    """Whether a preconditioner that is alive has a hook on the layer."""
    return any(isinstance(hook, _Hook) and hook.owner and hook.owner() for hook in layer.hooks())


def _remove(hooks: list[Handle]) -> None:
    for hook in hooks:
        hook.remove()


def _as_used(x: Tensor, output: Tensor) -> Tensor:
    """The input as a module under autocast computes with it: a copy, since x itself may be written to later."""
    x = x.detach()
    if not x.is_floating_point() or x.dtype == output.dtype:
        return x
    return x.to(min((x.dtype, output.dtype), key=lambda dtype: dtype.itemsize), copy=True)
