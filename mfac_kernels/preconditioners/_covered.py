"""The table of what a preconditioner covers of a model, and what it leaves alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn
from torch.nn.parameter import UninitializedParameter

from mfac_kernels.preconditioners._memory import Memory, factor_text
from mfac_kernels.preconditioners.layers.base import Layer


@dataclass(frozen=True)
class CoveredLayer:
    """``inputs``, ``outputs``: the form of A and B; ``megabytes``: of the factors, their sums and inverses."""

    name: str
    kind: str
    parameters: int
    inputs: str
    outputs: str
    megabytes: float


@dataclass(frozen=True)
class LeftAlone:
    """A module with trained parameters that have no factors. What it shares counts for each that has it."""

    name: str
    kind: str
    parameters: int
    reason: str


@dataclass(frozen=True)
class Covered:
    """Printed as a table.

    Attributes:
        layers: those with factors.
        left_alone: other modules that are trained.
        trained: parameters of the model that are trained.
    """

    layers: tuple[CoveredLayer, ...]
    left_alone: tuple[LeftAlone, ...]
    trained: int

    @property
    def parameters(self) -> int:
        """Those that are preconditioned."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def share(self) -> float:
        """Of the parameters that are trained."""
        return self.parameters / self.trained if self.trained else 0.0

    @property
    def megabytes(self) -> float:
        return sum(layer.megabytes for layer in self.layers)

    def __str__(self) -> str:
        head = ("layer", "kind", "parameters", "A", "B", "MB")
        rows = [
            (row.name, row.kind, f"{row.parameters:,}", row.inputs, row.outputs, f"{row.megabytes:.2f}")
            for row in self.layers
        ]
        text = f"{self.share:.1%} of {self.trained:,} trained parameters, {self.megabytes:,.2f} MB\n"
        text += _table([head, *rows], right=(2, 5))
        if self.left_alone:
            rest = [(row.name, row.kind, f"{row.parameters:,}", row.reason) for row in self.left_alone]
            text += "\n" + _table([("left alone", "kind", "parameters", "because"), *rest], right=(2,))
        return text


def kronecker_row(layer: Layer, itemsize: int, moments: int, products: int) -> CoveredLayer:
    """Of a layer with two factors; the others as for :meth:`Memory.of`."""
    outputs = "1" if layer.shape.unit else factor_text(layer.shape.output_factor)
    size = Memory.of(layer.shape, itemsize, moments, products).total
    return covered_row(layer, factor_text(layer.shape.input_factor), outputs, size)


def covered_row(layer: Layer, inputs: str, outputs: str, size: int) -> CoveredLayer:
    """``size``: bytes."""
    parameters = layer.shape.groups * layer.shape.outputs * layer.shape.columns
    return CoveredLayer(layer.title, type(layer.module).__name__, parameters, inputs, outputs, size / 1e6)


def covered(
    model: nn.Module, layers: Sequence[Layer], skipped: Mapping[str, str], row: Callable[[Layer], CoveredLayer]
) -> Covered:
    """``skipped``: names of modules, and why they are left alone."""
    with_factors = {id(p) for layer in layers for p in layer.parameters()}
    return Covered(
        layers=tuple(row(layer) for layer in layers),
        left_alone=tuple(
            LeftAlone(
                name or "the model itself",
                type(module).__name__,
                _trained(p for p in module.parameters(recurse=False) if id(p) not in with_factors),
                why,
            )
            for name, why in skipped.items()
            for module in [model.get_submodule(name)]
        ),
        trained=_trained(model.parameters()),
    )


def _trained(parameters: Iterable[nn.Parameter]) -> int:
    """Elements, none of those that have no shape yet."""
    return sum(p.numel() for p in parameters if p.requires_grad and not isinstance(p, UninitializedParameter))


def _table(rows: Sequence[Sequence[str]], right: tuple[int, ...]) -> str:
    """Columns two spaces apart; those in ``right`` are set flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
