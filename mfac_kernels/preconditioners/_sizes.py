"""How many samples and positions a call of a layer stands for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mfac_kernels.fisher._checks import one_of, positive_int
from mfac_kernels.preconditioners.layers.base import Layer
from mfac_kernels.preconditioners.layers.embedding import EmbeddingLayer

LossAverage = Literal["batch", "positions", "sum"]
Gather = Literal["train", "always"]


@dataclass
class Counting:
    """What calls and passes count for; as the arguments of :class:`KFAC`."""

    loss_average: LossAverage
    sampled: bool
    reduce: bool
    accumulation_steps: int
    batch_size: int | None
    batch_dim: int
    gather: Gather

    def __post_init__(self) -> None:
        one_of("loss_average", self.loss_average, ("batch", "positions", "sum"))
        one_of("gather", self.gather, ("train", "always"))
        one_of("batch_dim", self.batch_dim, (0, 1))
        self.accumulation_steps = positive_int("accumulation_steps", self.accumulation_steps)
        self.batch_size = None if self.batch_size is None else positive_int("batch_size", self.batch_size)

    @property
    def by_position(self) -> bool:
        return self.loss_average == "positions"


@dataclass
class Size:
    """``samples``: N; ``positions``: S, or its share where a call has other than N rows for each of them;
    ``weight``: of a row of A."""

    samples: int
    positions: float
    weight: float


class BatchSizes:
    """N, from ``batch_size`` or from what a layer is given; for inputs that all samples share, from other layers.

    Such an input has a first dimension of 1, or it is the one dimension of an embedding's indices: it counts as a copy
    for each sample.
    """

    def __init__(self, layers: Sequence[Layer], counting: Counting) -> None:
        self._layers, self._counting = layers, counting
        self._calls: dict[int, tuple[int, int]] = {}  # samples, positions of a layer's last one
        self._most: int | None = None  # samples of most of them; None: not known yet
        self._named = False

    def note(self, layer: int, samples: int, positions: int) -> None:
        size = samples, positions
        if samples * positions > 0 and self._calls.get(layer) != size:
            self._calls[layer], self._most = size, None

    def of_call(self, layer: int, samples: int, positions: int) -> Size:
        whole = self.samples()
        shared = self._is_shared(layer, samples, positions, whole)
        if shared:
            positions, samples = samples * positions, 1
        elif self._counting.batch_size is None:
            whole = samples
        share = 1.0 if shared else samples / whole
        if self._counting.by_position:  # those of this call count as samples
            return Size(whole * positions, share, 1 / ((1 if shared else whole) * positions))
        return Size(whole, share * positions, 1.0 if shared else 1 / whole)

    def unlike(self) -> dict[str, str]:
        """Layers whose inputs do not have N samples, and are not taken for shared by all. Each once."""
        if self._named or not self._calls:
            return {}
        whole, found = self.samples(), {}
        for i, (samples, positions) in self._calls.items():
            layer = self._layers[i]
            if samples == whole or self._is_shared(i, samples, positions, whole):
                lonely = len(self._calls) == 1 and isinstance(layer, EmbeddingLayer) and 1 in (samples, positions)
                if lonely and self._counting.batch_size is None:
                    found[layer.title] = f"{samples}, with no other layer to tell whether all share it"
            elif self._counting.batch_size is None or samples % whole:
                found[layer.title] = f"{samples}, not {whole}"
        self._named = bool(found)
        return found

    def samples(self) -> int:
        """N: of most layers, the larger where they are even."""
        if self._counting.batch_size is not None:
            return self._counting.batch_size
        if self._most is None:
            counts = Counter(samples for samples, _ in self._calls.values())
            self._most = max(counts, key=lambda samples: (counts[samples], samples), default=1)
        return self._most

    def _is_shared(self, layer: int, samples: int, positions: int, whole: int) -> bool:
        if samples == whole:
            return False
        if samples == 1:
            return True
        indices = isinstance(self._layers[layer], EmbeddingLayer) and positions == 1
        return indices and not any(samples == n * s for i, (n, s) in self._calls.items() if i != layer)
