"""What preconditioners that gather from backward passes share: layers, batches, sampling, masks, ends of a step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mfac_kernels.fisher._checks import positive_int
from mfac_kernels.preconditioners._construction import check_layers
from mfac_kernels.preconditioners._coverage import Coverage
from mfac_kernels.preconditioners._covered import Covered
from mfac_kernels.preconditioners._gathering import Gatherer
from mfac_kernels.preconditioners._valid import Valid
from mfac_kernels.preconditioners.base import Hyperparameter, Preconditioner, own_gradients
from mfac_kernels.preconditioners.layers.base import Layer, Options
from mfac_kernels.preconditioners.layers.find import Names, find_layers


class GatheringPreconditioner(Preconditioner):
    """A preconditioner of a model with a :class:`Gatherer` of its layers.

    Attributes:
        damping, factor_decay, kl_clip, lr, factor_update_steps, inv_update_steps, scaler: as the arguments.
        skipped_layers: names of modules, and why they are left alone.
    """

    _owner = "KFAC"
    """Whose messages they are."""
    _gatherer: Gatherer
    _coverage: Coverage
    _covered: Covered

    def __init__(
        self,
        model: nn.Module,
        damping: Hyperparameter,
        *,
        factor_update_steps: int,
        inv_update_steps: int,
        factor_decay: Hyperparameter,
        kl_clip: Hyperparameter | None,
        lr: Hyperparameter,
        scaler: torch.amp.GradScaler | None,
        options: Options,
        names: Names,
    ) -> None:
        super().__init__()
        self._model = model
        self.damping, self.factor_decay, self.kl_clip, self.lr = damping, factor_decay, kl_clip, lr
        self.factor_update_steps = positive_int("factor_update_steps", factor_update_steps)
        self.inv_update_steps = positive_int("inv_update_steps", inv_update_steps)
        self.scaler = scaler
        self._layers, self.skipped_layers = find_layers(model, options, names)
        modules = {module: name for name, module in model.named_modules()}
        for layer in list(self._layers):
            why = self._unusable(layer)
            if why is not None:
                self._layers.remove(layer)
                self.skipped_layers[modules[layer.module]] = why
        check_layers(self._owner, self._layers, self.skipped_layers)
        double = any(layer.weight.dtype == torch.float64 for layer in self._layers)
        self._dtype = torch.float64 if double else torch.float32

    def _unusable(self, layer: Layer) -> str | None:
        """Why the method has no use for a layer."""
        return None

    # ---- gathering -------------------------------------------------------------------------------------------------

    @property
    def batch_size(self) -> int | None:
        """As the argument; may be set before each batch."""
        return self._gatherer.counting.batch_size

    @batch_size.setter
    def batch_size(self, size: int | None) -> None:
        self._gatherer.counting.batch_size = None if size is None else positive_int("batch_size", size)

    @property
    def accumulation_steps(self) -> int:
        """As the argument; may be set between steps."""
        return self._gatherer.counting.accumulation_steps

    @accumulation_steps.setter
    def accumulation_steps(self, steps: int) -> None:
        self._gatherer.counting.accumulation_steps = positive_int("accumulation_steps", steps)

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Backward passes inside are those of labels drawn from the model: they leave ``.grad`` as it was.

            logits = model(x)
            with preconditioner.sampling():
                labels = torch.distributions.Categorical(logits=logits.detach()).sample()
                cross_entropy(logits, labels).backward(retain_graph=True)
            cross_entropy(logits, y).backward()

        They give both factors. Of several through one forward pass A enters with the first, B with each.
        """
        parameters = list(self._model.parameters())
        gradients = [p.grad for p in parameters]
        for p in parameters:
            p.grad = None
        self._gatherer.sampling = True
        try:
            yield
        finally:
            self._gatherer.sampling = False
            for p, gradient in zip(parameters, gradients, strict=True):
                p.grad = gradient

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Forward and backward passes inside give no factors: probes, penalties, the second pass of SAM."""
        self._gatherer.paused += 1
        self._gatherer.idle = False
        try:
            yield
        finally:
            self._gatherer.paused -= 1

    def valid(self, mask: Tensor) -> None:
        """The positions that count of the batch whose forward pass follows; until the next call or :meth:`step`.

        mask: bool (samples, positions), False for padding and for targets that are ignored. Rows of both factors at
        other positions are left out, and the numbers of positions (of samples, with ``loss_average="positions"``) are
        those of valid ones. Layers with one position for each sample are not masked. A batch without a valid position
        changes nothing; where the mask is not on the CPU it is counted as skipped.

        Raises:
            TypeError, ValueError: not such a mask; in the forward pass, a layer with other positions, or a convolution
                of stride 1 without ``masked=True``.
        """
        self._gatherer.valid = Valid(mask, self._gatherer.fisher.refused.device)

    def remove_hooks(self) -> None:
        """Detach from the model: it holds nothing of this preconditioner any more."""
        self._gatherer.remove()

    def covered(self) -> Covered:
        """What has factors, of which form and size, and what has none, and why: a table, as at construction."""
        return self._covered

    def __str__(self) -> str:
        return f"{type(self).__name__}: {self.covered()}"

    # ---- a step ----------------------------------------------------------------------------------------------------

    @property
    def _factors_due(self) -> bool:
        return self.steps % self.factor_update_steps == 0

    def _begin(self) -> tuple[float, float, float | None, list[Tensor]]:
        """damping, factor_decay, what bounds <u, gradient>, the layers' gradients: what may be an error comes first."""
        damping, decay, clip = self._at_step("damping"), self._decay(), self._clip()
        if not damping > 0:
            raise ValueError(f"damping: expected a positive number, got {damping}")
        self._coverage.check_frozen()
        own_gradients(p for layer in self._layers for p in layer.parameters())
        return damping, decay, clip, [layer.gradient() for layer in self._layers]

    def _bounded(self, gradients: list[Tensor], updates: list[Tensor], clip: float | None) -> list[Tensor]:
        """Scale the updates by ``kl_clip``, in place."""
        if clip is not None:
            product = torch.stack([(u * g).sum() for u, g in zip(updates, gradients, strict=True)]).sum()
            torch._foreach_mul_(updates, (clip / product.clamp(min=0)).sqrt().clamp(max=1.0))
        return updates

    def _finish(self, updates: list[Tensor]) -> None:
        """Put the updates in the place of the gradients."""
        for layer, update in zip(self._layers, updates, strict=True):
            layer.assign(update)
        self.steps += 1

    def _output_scale(self) -> Tensor | None:
        """1 / scale^2 of the loss, on the device."""
        if self.scaler is None or not self.scaler.is_enabled():
            return None
        scale = self.scaler._get_scale_async()
        return None if scale is None else scale.double().reciprocal().square()

    def _clip(self) -> float | None:
        """What bounds <u, gradient>; None: nothing does, as where the learning rate is 0."""
        if self.kl_clip is None:
            return None
        kl_clip, lr = self._at_step("kl_clip"), self._at_step("lr")
        if not kl_clip > 0:
            raise ValueError(f"kl_clip: expected a positive number or None, got {kl_clip}")
        if not lr >= 0:
            raise ValueError(f"lr: expected a number >= 0, got {lr}")
        return kl_clip / lr / lr if lr > 0 else None  # lr**2 may be 0

    def _decay(self) -> float:
        decay = self._at_step("factor_decay")
        if not 0 <= decay < 1:
            raise ValueError(f"factor_decay: expected a number in [0, 1), got {decay}")
        return decay
