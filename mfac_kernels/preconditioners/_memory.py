"""What the factors of a layer take, known before any is allocated."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mfac_kernels.fisher._checks import positive_int
from mfac_kernels.fisher.kronecker import KroneckerShape
from mfac_kernels.preconditioners.layers.base import Layer


@dataclass(frozen=True)
class Memory:
    """Bytes of a layer: average, sum and inverse of A, those of B, and moments in their eigenbases."""

    inputs: int
    outputs: int
    moments: int

    @classmethod
    def of(cls, shape: KroneckerShape, itemsize: int, moments: int, products: int = 1) -> Memory:
        """``moments``: matrices like the gradient that are kept in the eigenbases; ``products``: of the averages."""
        averages = math.prod(shape.input_state), math.prod(shape.output_factor)
        kept = [products * (average + math.prod(sums)) for average, sums in zip(averages, shape.sums, strict=True)]
        return cls(
            inputs=itemsize * (kept[0] + math.prod(shape.input_factor)),
            outputs=itemsize * (kept[1] + math.prod(shape.output_factor)),
            moments=itemsize * moments * shape.groups * shape.outputs * shape.input_width,
        )

    @property
    def total(self) -> int:
        return self.inputs + self.outputs + self.moments


def check_memory(layers: Sequence[Layer], itemsize: int, moments: int, products: int, limit: int | None) -> None:
    """ValueError if a layer takes more than ``limit`` bytes: with what it needs, and the ways out.

    The others as for :meth:`Memory.of`.
    """
    if limit is None:
        return
    most = positive_int("max_layer_bytes", limit)
    for layer in layers:
        memory = Memory.of(layer.shape, itemsize, moments, products)
        if memory.total <= most:
            continue
        size, argument, factor, name = max(
            (memory.inputs, "input", "A", factor_text(layer.shape.input_factor)),
            (memory.outputs, "output", "B", factor_text(layer.shape.output_factor)),
        )
        raise ValueError(
            f"model: {layer.title} needs {memory.total / 1e9:.3g} GB for its factors, {size / 1e9:.3g} of it for "
            f"{factor} ({name}), expected at most {most / 1e9:.3g} GB (max_layer_bytes); ways out: "
            f'{argument}={{"{layer.name}": "diagonal"}} or a block size in its place, group_size, '
            f'skip_layers=["{layer.name}"], a larger max_layer_bytes'
        )


def factor_text(size: tuple[int, int, int]) -> str:
    """The form of a factor (blocks, rows, rows), as ``"64 x 64"``, ``"8 of 64 x 64"`` or ``"diagonal of 64"``."""
    blocks, rows, _ = size
    if blocks == 1:
        return f"{rows} x {rows}"
    return f"diagonal of {blocks}" if rows == 1 else f"{blocks} of {rows} x {rows}"
