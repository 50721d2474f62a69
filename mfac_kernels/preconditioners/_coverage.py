"""Layers that are trained and have no factors: found where they appear, and named."""

from __future__ import annotations

import warnings

from torch import nn

from mfac_kernels.preconditioners._gathering import Gatherer
from mfac_kernels.preconditioners.layers.base import Layer
from mfac_kernels.preconditioners.layers.find import Names, frozen_parameters
from mfac_kernels.preconditioners.layers.kinds import kind_of


class Coverage:
    """What of a model has factors, as the model is now."""

    def __init__(self, model: nn.Module, layers: list[Layer], names: Names, gatherer: Gatherer) -> None:
        self._model, self._layers, self._names, self._gatherer = model, layers, names, gatherer
        self._known = set(model.modules())
        self._frozen = frozen_parameters(model, names)
        self._warned = False

    def check_frozen(self) -> None:
        """RuntimeError if a parameter that was frozen is trained."""
        owner = self._gatherer.owner
        for name, p in self._frozen.items():
            if p.requires_grad:
                raise RuntimeError(
                    f"{owner}: {name} was frozen at construction and requires a gradient now, but its layer has no "
                    "factors for it; construct a new {owner} over the layers that are trained"
                )

    def without_factors(self, shared: bool) -> list[str]:
        """Names of layers that have a gradient and no factors. ``shared``: ranks share factors, so ask the device."""
        names = [
            layer.title
            for i, layer in enumerate(self._layers)
            if layer.weight.grad is not None
            and not self._gatherer.reached[i]
            and not (shared and self._gatherer.fisher.has_factors(i))
        ]
        for name, module in self._model.named_modules():
            if module in self._known or kind_of(module) is None or self._names.unwanted(name) is not None:
                continue
            if any(p.grad is not None for p in module.parameters(recurse=False)):
                names.append(name)
        return names

    def warn(self, shared: bool) -> None:
        """Once, in a step that has use for factors."""
        if self._warned:
            return
        owner = self._gatherer.owner
        said = {self._layers[i].title for i in self._gatherer.unfit}
        names = [name for name in self.without_factors(shared) if name not in said]
        what = f"{owner} leaves the gradients of these layers as they are, as it has no factors of them"
        if not names and self._gatherer.idle:
            names = [layer.title for layer in self._layers if layer.weight.grad is not None]
            what = f"{owner} saw no call of these layers in this step: their factors are those of earlier batches"
        if names:
            self._warned = True
            warnings.warn(
                f'{what}: {", ".join(names)}. Calls are seen in training mode (or with gather="always"), of modules '
                "that the model had, outside of torch.func, and under torch.compile if the first of them comes later",
                stacklevel=4,
            )

    def warn_of_sizes(self) -> None:
        """Once: layers that count other samples than the rest."""
        unlike = self._gatherer.sizes.unlike()
        if unlike:
            owner = self._gatherer.owner
            listed = "; ".join(f"{name}: {samples}" for name, samples in unlike.items())
            warnings.warn(
                f"{owner} takes the first dimension of a layer's inputs for the samples of the batch; these layers "
                f"have other numbers of them: {listed}. If their inputs are shared by the samples, expand them over "
                "the batch, or give batch_size=",
                stacklevel=4,
            )
