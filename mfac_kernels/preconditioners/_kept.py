"""What preconditioners share that learn from the calls of a step, kept until then, and need no sums of factors."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mfac_kernels.fisher._checks import one_of, positive_int
from mfac_kernels.fisher._state import check_like, copy_into
from mfac_kernels.fisher.jacobian import Call, JacobianProduct
from mfac_kernels.fisher.kronecker import KroneckerFisher
from mfac_kernels.preconditioners._coverage import Coverage
from mfac_kernels.preconditioners._covered import CoveredLayer, covered
from mfac_kernels.preconditioners._fisher_batch import FisherBatch
from mfac_kernels.preconditioners._gathered import GatheringPreconditioner
from mfac_kernels.preconditioners._gathering import Gatherer
from mfac_kernels.preconditioners._sizes import Counting, Gather, LossAverage
from mfac_kernels.preconditioners.base import Hyperparameter
from mfac_kernels.preconditioners.layers.base import Layer, Normalization, Options
from mfac_kernels.preconditioners.layers.find import Names


class KeptPreconditioner(GatheringPreconditioner):
    """Arguments are as :class:`KFAC`'s. Of one process: none averages over ranks."""

    def __init__(
        self,
        model: nn.Module,
        damping: Hyperparameter = 1e-3,
        *,
        factor_update_steps: int = 1,
        inv_update_steps: int = 1,
        factor_decay: Hyperparameter = 0.95,
        kl_clip: Hyperparameter | None = 1e-3,
        lr: Hyperparameter = 0.1,
        accumulation_steps: int = 1,
        fisher_type: Literal["empirical", "mc"] = "empirical",
        loss_average: LossAverage = "batch",
        normalization: Normalization = "unit",
        include: Sequence[str] | None = None,
        skip_layers: Sequence[str] = (),
        scaler: torch.amp.GradScaler | None = None,
        gather: Gather = "train",
        batch_size: int | None = None,
        batch_dim: int = 0,
        max_layer_bytes: int | None = 8 << 30,
    ) -> None:
        one_of("fisher_type", fisher_type, ("empirical", "mc"))
        one_of("normalization", normalization, ("unit", "diagonal", "skip"))
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise RuntimeError(f"{self._owner}: expected one process, got a group of {dist.get_world_size()}")
        counting = Counting(
            loss_average=loss_average,
            sampled=fisher_type == "mc",
            reduce=False,
            accumulation_steps=accumulation_steps,
            batch_size=batch_size,
            batch_dim=batch_dim,
            gather=gather,
        )
        names = Names(None if include is None else tuple(include), tuple(skip_layers))
        super().__init__(
            model,
            damping,
            factor_update_steps=factor_update_steps,
            inv_update_steps=inv_update_steps,
            factor_decay=factor_decay,
            kl_clip=kl_clip,
            lr=lr,
            scaler=scaler,
            options=Options("full", "expand", None, None, True, normalization),
            names=names,
        )
        if max_layer_bytes is not None:
            self._check_memory(positive_int("max_layer_bytes", max_layer_bytes))
        self._covered = covered(model, self._layers, self.skipped_layers, self._row)
        self._device = self._layers[0].weight.device
        nothing = KroneckerFisher([], device=self._device, dtype=self._dtype)
        self._gatherer = Gatherer(model, self._layers, nothing, counting, self._owner)
        self._gatherer.active = False
        self._batch = FisherBatch(self._layers, counting, 1.0, self._owner)
        self._gatherer.kept = self._batch
        self._coverage = Coverage(model, self._layers, names, self._gatherer)
        self._counts = torch.zeros(2, dtype=torch.int64, device=self._device)  # batches accepted, refused

    # ---- what a method says ----------------------------------------------------------------------------------------

    @abstractmethod
    def _row(self, layer: Layer) -> CoveredLayer:
        """What it keeps of a layer."""

    @abstractmethod
    def _state(self) -> Any:
        """Tensors in dicts and lists: all that it keeps between steps."""

    # ---- the step --------------------------------------------------------------------------------------------------

    @property
    def gathering(self) -> bool:
        """Whether backward passes before the next step are made use of."""
        return self._factors_due

    def _kept(self) -> Kept | None:
        """The batch of this step; None: there is no use for it, or no pass has reached a layer."""
        if not self._factors_due:
            return None
        self._coverage.warn(False)
        self._coverage.warn_of_sizes()
        if self._batch.empty:
            return None
        jacobian = self._batch.jacobian(self._output_scale(), self._dtype, self._device)
        return Kept(self._layers, jacobian)

    def _count(self, accepted: Tensor) -> None:
        self._counts += torch.stack([accepted, ~accepted])

    def _rest(self) -> None:
        """Let go of the batch, and keep the next if there is use for it: once ``steps`` is that of the next step."""
        self._gatherer.begin()
        self._gatherer.kept = self._batch if self._factors_due else None

    # ---- bookkeeping -----------------------------------------------------------------------------------------------

    def _check_memory(self, most: int) -> None:
        for row in map(self._row, self._layers):
            if row.megabytes * 1e6 > most:
                raise ValueError(
                    f"model: {row.name} needs {row.megabytes / 1e3:.3g} GB for {row.inputs}, expected at most "
                    f'{most / 1e9:.3g} GB (max_layer_bytes); ways out: skip_layers=["{row.name}"], a larger '
                    f"max_layer_bytes{self._ways_out}"
                )

    _ways_out = ""

    def diagnostics(self) -> dict[str, float]:
        """steps; seen and skipped batches; layers_without_factors: how many have a gradient and were not seen."""
        without = len(self._coverage.without_factors(False))
        seen, skipped = self._counts.tolist()
        return {"steps": self.steps, "seen": seen, "skipped": skipped, "layers_without_factors": without}

    def _all(self) -> dict[str, Any]:
        return {"steps": torch.tensor(self.steps), "counts": self._counts, "state": self._state()}

    def state_dict(self) -> dict[str, Any]:
        """After a step and before the next backward pass: what that keeps is of no use to another process.

        Raises:
            RuntimeError: between a backward pass and its step.
        """
        if not self._batch.empty:
            raise RuntimeError(f"{self._owner}: state_dict() was called between a backward pass and its step()")
        return self._all()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        mine = self._all()
        check_like("state_dict", mine, state_dict)
        copy_into(mine, state_dict)
        self.steps = int(state_dict["steps"])
        self._rest()


@dataclass
class Kept:
    """A batch: the calls of each layer, and how their gradients are scaled."""

    layers: Sequence[Layer]
    jacobian: JacobianProduct

    def __post_init__(self) -> None:
        self.roots = torch.as_tensor(self.jacobian.weights).sqrt().to(self.jacobian.dtype)

    @property
    def samples(self) -> int:
        """Of all passes."""
        return self.jacobian.samples

    def of(self, layer: int) -> list[Call]:
        """Those of a layer, in the dtype of the factors."""
        return [
            Call(c.layer, self.jacobian.cast(c.inputs), self.jacobian.cast(c.gradients), c.first, c.repeats)
            for c in self.jacobian.calls
            if c.layer == layer
        ]

    def scaled(self, call: Call, scale: float = 1.0) -> Tensor:
        """Its output gradients, so that the sum of the outer products of samples' gradients is their block of F."""
        each = self.roots[call.first : call.first + call.samples].repeat_interleave(call.repeats)
        return call.gradients * (scale * each).view(-1, *[1] * (call.gradients.dim() - 1))

    def passes(self, layer: int) -> Iterator[list[Call]]:
        """The calls that share samples."""
        calls = self.of(layer)
        for first in dict.fromkeys(call.first for call in calls):
            yield [call for call in calls if call.first == first]


Closure = Callable[[], object]
