"""What preconditioners that gather from backward passes share: batches, sampling, pauses, masks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from mfac_kernels.fisher._checks import positive_int
from mfac_kernels.preconditioners._gathering import Gatherer
from mfac_kernels.preconditioners._valid import Valid
from mfac_kernels.preconditioners.base import Preconditioner


class GatheringPreconditioner(Preconditioner):
    """A preconditioner of a model with a :class:`Gatherer` of its layers."""

    _model: nn.Module
    _gatherer: Gatherer

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
