"""Kronecker-factored Fisher matrices: F_l = B_l (x) A_l for each layer, and products with their damped inverses."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from mfac_kernels import ops
from mfac_kernels.fisher._checks import index, one_of, positive_float
from mfac_kernels.fisher._inverses import Eigenbases, FactoredInverses, Inverses, smallest_eigenvectors
from mfac_kernels.fisher._joint_bases import JointBases
from mfac_kernels.fisher._layout import KroneckerShape, Lags, gather, spread
from mfac_kernels.fisher._pairs import APPROXIMATE, Approximate, Pairs, Product, add_pairs
from mfac_kernels.fisher._stack import Stack
from mfac_kernels.fisher._state import check_entries, check_like, copy_into

__all__ = ["Approximate", "KroneckerFisher", "KroneckerShape", "Lags", "Pairs"]

Write = Callable[[Tensor, float], object]
"""write(sum, beta): sum <- beta sum + what is added. ``ops.linear_factor_`` and its kin do just that."""


class KroneckerFisher:
    """Two factors a layer, their moving averages, and F^-1 times gradients. Knows nothing of modules.

        fisher = KroneckerFisher([KroneckerShape(outputs=10, inputs=64, bias=True)], damping=1e-3)
        fisher.add_inputs(0, lambda total, beta: ops.linear_factor_(total, a, bias=True, beta=beta, alpha=1 / n))
        fisher.add_outputs(0, lambda total, beta: ops.linear_factor_(total, g, beta=beta, alpha=1 / n))
        fisher.update()                     # the sums of this batch enter the averages
        fisher.refresh()                    # inverses of the averages
        (step,) = fisher.ihvp([gradient])   # (10, 65)

    A batch that is not finite changes nothing: pass :attr:`refused` as ``check_finite`` of the ops, and :meth:`update`
    leaves all averages as they are if it is set, without a synchronisation. The averages are debiased: after t batches
    a factor is its exponential sum over 1 - decay^t, so there is no identity to forget.

    Layers of one shape are stacked: they are inverted and applied together, and so are all blocks of all layers.

    Args:
        shapes: one for each layer.
        damping: lambda > 0.
        factor_decay: of the moving averages, in [0, 1).
        style: ``"factored"``: (A + sqrt(lambda pi) I, B + sqrt(lambda / pi) I), by batched Cholesky inverses.
            ``"exact"``: B (x) A + lambda I in the eigenbasis of the factors.
        pi_correction: pi = (tr A / dim A) / (tr B / dim B) (Martens, Grosse 2015, section 6.3), else 1.
        eigen_correction: with ``"exact"``, eigenvalues are re-estimated by :meth:`add_moments` (EKFAC) from one
            :meth:`refresh` to the next, from those of B (x) A on.
        approximate: ``"kfac"``: A and B are averages of their own. ``"tkfac"``, ``"kpsvd"``: of pairs of rows, by
            :meth:`add_pairs` (see :mod:`mfac_kernels.fisher._pairs`); no ``lags`` and no ``two_uses``. ``"deflation"``:
            a second product is added to that of ``"kpsvd"``, which alone is damped (``"factored"``; see
            :class:`~mfac_kernels.fisher._joint_bases.JointBases`).
        dtype: of the factors, float32 or float64.
        device: of the factors.

    Source: Martens, Grosse, "Optimizing neural networks with Kronecker-factored approximate curvature", ICML 2015.
    """

    def __init__(
        self,
        shapes: Sequence[KroneckerShape],
        damping: float = 1e-3,
        *,
        factor_decay: float = 0.95,
        style: Literal["factored", "exact"] = "factored",
        pi_correction: bool = True,
        eigen_correction: bool = False,
        approximate: Approximate = "kfac",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        if dtype not in (torch.float32, torch.float64):
            raise TypeError(f"dtype: expected float32 or float64, got {dtype}")
        if style not in ("factored", "exact"):
            raise ValueError(f'style: expected "factored" or "exact", got {style!r}')
        if eigen_correction and style != "exact":
            raise ValueError(f'eigen_correction: expected style "exact", got {style!r}')
        if not 0 <= factor_decay < 1:
            raise ValueError(f"factor_decay: expected a number in [0, 1), got {factor_decay}")
        one_of("approximate", approximate, APPROXIMATE)
        if approximate == "deflation" and style != "factored":
            raise ValueError(f'style: expected "factored" with approximate "deflation", got {style!r}')
        self.shapes = tuple(shapes)
        for layer, shape in enumerate(self.shapes):
            if approximate != "kfac" and (shape.lags or shape.two_uses):
                raise ValueError(f'shapes[{layer}]: expected no lags or two_uses with approximate "{approximate}"')
        self.approximate = approximate
        self.damping = positive_float("damping", damping)
        self.factor_decay = factor_decay
        self.dtype = dtype
        members: dict[KroneckerShape, list[int]] = {}
        for layer, shape in enumerate(self.shapes):
            members.setdefault(shape, []).append(layer)
        self._stacks = [Stack(shape, layers, dtype, device, approximate) for shape, layers in members.items()]
        self._place = {layer: (stack, row) for stack in self._stacks for row, layer in enumerate(stack.layers)}
        self.refused = torch.zeros(1, dtype=torch.int32, device=device)
        self._counts = torch.zeros(2, dtype=torch.int64, device=device)  # batches accepted, refused
        self.eigen_correction = eigen_correction
        self._inverses: Inverses
        if approximate == "deflation":
            self._inverses = JointBases(self._stacks, pi_correction)
        elif style == "factored":
            self._inverses = FactoredInverses(self._stacks, pi_correction)
        else:
            self._inverses = Eigenbases(self._stacks, eigen_correction)

    # ---- factors ---------------------------------------------------------------------------------------------------

    def add_inputs(self, layer: int, write: Write) -> None:
        """Add to this batch's A of a layer: ``write`` gets the sum, of ``input_state``, and a beta.

        A dense factor (1, a, a) comes as (a, a). Where the shape is ``exchanged``, inputs are B's.
        """
        stack, row = self._at(layer)
        stack.add(row, write, gradients=False)

    def add_outputs(self, layer: int, write: Write) -> None:
        """Add to this batch's B of a layer."""
        stack, row = self._at(layer)
        stack.add(row, write, gradients=True)

    def accumulate(self, layer: int, inputs: Tensor, gradients: Tensor, positions: int = 1) -> None:
        """Add rows of one layer, (n * positions, inputs) and (n * positions, outputs): A / n, and B / (n positions)."""
        shape, rows = self.shapes[layer], len(inputs) if inputs.dim() else 0
        if shape.groups != 1 or shape.offsets != 1:
            raise ValueError(
                f"layer: expected one of 1 group and 1 offset, got {shape.groups} and {shape.offsets}: add_inputs and "
                "add_outputs are for those"
            )
        for name, value, width in (("inputs", inputs, shape.inputs), ("gradients", gradients, shape.outputs)):
            if value.dim() != 2 or value.shape[1] != width or not 0 < rows == len(value):
                raise ValueError(
                    f"{name}: expected shape (n, {width}) with n >= 1, of inputs and gradients, got "
                    f"{tuple(value.shape)} and {rows} rows of inputs"
                )
        if self.paired(layer):
            inputs = torch.nn.functional.pad(inputs, (0, 1), value=1.0) if shape.bias else inputs
            self.add_pairs(layer, inputs[None], gradients[None], positions / rows)
            return
        self.add_inputs(
            layer,
            lambda total, beta: ops.linear_factor_(
                total, inputs, bias=shape.bias, beta=beta, alpha=positions / rows, check_finite=self.refused
            ),
        )
        self.add_outputs(
            layer,
            lambda total, beta: ops.linear_factor_(
                total, gradients, beta=beta, alpha=1 / rows, check_finite=self.refused
            ),
        )

    def add_moments(
        self, layer: int, inputs: Tensor, gradients: Tensor, alpha: float, weights: Tensor | None = None
    ) -> None:
        """Rows of one layer for the eigenvalue correction: inputs (groups, n, columns), gradients (groups, n, outputs).

        This batch's moments gain alpha times the sum over rows of w (U_B^T g)_i^2 (U_A^T a)_j^2. ``weights``: w, (n, 1)
        or (). Where A is kept as its diagonal, inputs may be the indices (n,) of one-hot rows; so may gradients for B.
        """
        if not isinstance(self._inverses, Eigenbases):
            raise TypeError('add_moments: expected a KroneckerFisher with style "exact"')
        self._inverses.add_moments(*self._at(layer), Pairs(inputs, gradients, alpha, weights))

    def paired(self, layer: int) -> bool:
        """Whether a layer's factors are of pairs of rows. Those of a ``unit`` are not: it has its block."""
        return self._at(layer)[0].paired

    def add_pairs(
        self, layer: int, inputs: Tensor, gradients: Tensor, alpha: float, weights: Tensor | None = None
    ) -> None:
        """Rows of one layer as for :meth:`add_moments`: M gains alpha times the sum of w g g^T (x) a a^T.

        Of M, which is never formed, this batch's sums gain A' and B' of each product of ``approximate``.
        """
        stack, row = self._at(layer)
        if not stack.paired:
            raise TypeError('add_pairs: expected a KroneckerFisher with an approximate other than "kfac", and no unit')
        add_pairs(stack, row, Pairs(inputs, gradients, alpha, weights), self.refused)

    @torch.no_grad()
    def update(self, output_scale: Tensor | None = None) -> None:
        """Let this batch's sums enter the averages and begin the next batch. Layers without sums stay as they are.

        ``output_scale``, () on the device: multiplies the sums of B, as the inverse square of a loss scale does. If
        :attr:`refused` is set (the flag is cleared), or the scale or a moment is not finite, the batch is dropped and
        counted.
        """
        has_sums = self._has_sums()
        accepted = (self.refused[0] == 0) & self._inverses.finite(output_scale)
        for stack in self._stacks:
            accepted = accepted & stack.finite(output_scale)
        if output_scale is not None:
            accepted = accepted & output_scale.isfinite()
        take = (1 - self.factor_decay) * accepted.double()
        self._inverses.update(take, output_scale)
        for stack in self._stacks:
            stack.merge(take, output_scale)
        self._counts += torch.stack([accepted & has_sums, ~accepted])
        self.refused.zero_()

    @torch.no_grad()
    def refresh(self, layers: Sequence[int] | None = None) -> None:
        """Compute the inverses (or eigenbases) of the averages with the present damping: of these layers, or of all."""
        if layers is None:
            self._inverses.refresh(self.damping, [list(range(len(stack.layers))) for stack in self._stacks])
            return
        chosen = set(layers)
        rows = [[row for row, layer in enumerate(stack.layers) if layer in chosen] for stack in self._stacks]
        self._inverses.refresh(self.damping, rows)

    def refresh_cost(self, layer: int) -> float:
        """Multiplications, up to a factor, of :meth:`refresh` for one layer."""
        shape = self.shapes[layer]
        return float(sum(math.prod(size) * size[-1] for size in (shape.input_factor, shape.output_factor)))

    def inverse_state(self, layer: int) -> list[Tensor]:
        """What :meth:`refresh` writes for one layer, as views: ranks that share the work send these to each other."""
        return self._inverses.views(*self._at(layer))

    def scale_batch(self, layer: int, factor: float) -> None:
        """Multiply this batch's sums of a layer, moments among them."""
        stack, row = self._at(layer)
        sums = [stack.input_sums] if stack.shape.unit else [stack.input_sums, stack.output_sums]
        if self.eigen_correction:
            sums.append(self._inverses.sums()[self._stacks.index(stack)])
        for total in sums:
            total[row] *= factor

    def batch_state(self) -> dict[str, Any]:
        """The sums of this batch, which :meth:`state_dict` leaves out; None for these where there are none."""
        begun = any(any(rows) for rows in self._begun())
        sums = [total.clone() for total in self.batch_sums()] if begun else None
        return {"begun": self._begun(), "sums": sums, "refused": self.refused.clone()}

    def check_batch_state(self, name: str, state: Mapping[str, Any]) -> None:
        """Raise unless ``state`` is a :meth:`batch_state` of these shapes."""
        check_entries(name, ("begun", "sums", "refused"), state)
        check_like(f"{name}['refused']", self.refused, state["refused"])
        if state["sums"] is not None:
            check_like(f"{name}['sums']", self._sums(), list(state["sums"]))
        if [len(rows) for rows in state["begun"]] != [len(rows) for rows in self._begun()]:
            raise ValueError(f"{name}['begun']: expected those of {len(self.shapes)} layers of the same shapes")

    def load_batch_state(self, state: Mapping[str, Any]) -> None:
        """Go on from a :meth:`batch_state`, which has been checked."""
        if state["sums"] is not None:
            copy_into(self._sums(), state["sums"])
        begun = [list(rows) for rows in state["begun"]]
        for i, stack in enumerate(self._stacks):
            stack.inputs_begun, stack.outputs_begun = begun[2 * i], list(begun[2 * i + 1])
        self._inverses.begun = begun[2 * len(self._stacks) :]
        self.refused.copy_(state["refused"])

    def batch_sums(self) -> list[Tensor]:
        """The sums of this batch, as views, zero where a layer has none: what ranks add up before :meth:`update`."""
        return self._zero_without_sums(self._sums())

    def batch_counts(self) -> list[Tensor]:
        """For each of :meth:`batch_sums`, (layers,): 1 where a layer has a sum of this batch, else 0."""
        return self._zero_without_sums([total.new_ones(len(total), dtype=self.dtype) for total in self._sums()])

    def share(self, counts: Sequence[Tensor]) -> None:
        """Divide the sums, added up over ranks, by ``counts``, added up too: the layers' batch is that of all ranks."""
        for total, count in zip(self._sums(), counts, strict=True):
            total.div_(count.clamp(min=1).view(-1, *[1] * (total.dim() - 1)))
        for i, stack in enumerate(self._stacks):
            stack.called = counts[2 * i + 1]
        self._inverses.called = list(counts[2 * len(self._stacks) :])

    def _sums(self) -> list[Tensor]:
        return [s for stack in self._stacks for s in (stack.input_sums, stack.output_sums)] + self._inverses.sums()

    def _zero_without_sums(self, totals: list[Tensor]) -> list[Tensor]:
        """Zero, in each of ``totals``, one for each of :meth:`_sums`, the layers that have no sum of this batch."""
        for total, has_sum in zip(totals, self._begun(), strict=True):
            for row in (i for i, has in enumerate(has_sum) if not has):
                total[row] = 0
        return totals

    def _has_sums(self) -> Tensor | bool:
        """Whether there are sums of this batch, on any rank if they share it."""
        if any(stack.called is not None for stack in self._stacks):
            return torch.stack([stack.called.amax() > 0 for stack in self._stacks if stack.called is not None]).any()
        return any(any(stack.begun) for stack in self._stacks)

    def _begun(self) -> list[list[bool]]:
        return [stack.begun for stack in self._stacks for _ in range(2)] + self._inverses.begun

    def has_factors(self, layer: int) -> bool:
        """Whether a batch of this layer is in the averages. Synchronises with the device."""
        stack, row = self._at(layer)
        return bool(stack.weight[row] > 0)

    def factors(self, layer: int) -> tuple[Tensor, Tensor]:
        """The debiased A and B of a layer, (blocks, s, s) each: of its first product."""
        return self.products(layer)[0]

    def products(self, layer: int) -> list[Product]:
        """The debiased A and B of each product of a layer: of two with approximate ``"deflation"``, else of one."""
        stack, row = self._at(layer)
        weight = stack.weight[row].clamp_min(torch.finfo(stack.weight.dtype).tiny)
        products = stack.products(slice(row, row + 1))
        return [(stack.shape.expand(inputs)[0] / weight, outputs[0] / weight) for inputs, outputs in products]

    # ---- products --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def ihvp(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """F^-1 g: one gradient (groups * outputs, columns) for each layer -> the same shapes, in the factors' dtype."""
        return self.ihvp_(list(gradients))

    def ihvp_(self, gradients: list[Tensor]) -> list[Tensor]:
        """As :meth:`ihvp`, in place of the list's entries: each tensor is let go of as soon as it has been read."""
        if len(gradients) != len(self.shapes):
            raise ValueError(f"gradients: expected {len(self.shapes)}, one for each layer, got {len(gradients)}")
        for layer, (g, shape) in enumerate(zip(gradients, self.shapes, strict=True)):
            expected = (shape.groups * shape.outputs, shape.columns)
            if tuple(g.shape) != expected:
                raise ValueError(f"gradients[{layer}]: expected shape {expected}, got {tuple(g.shape)}")
        for stack in self._stacks:
            stacked = stack.gather_rows(gradients)
            product = gather(stack.shape, self._inverses.apply(stack, spread(stack.shape, stacked)))
            for layer, row in zip(stack.layers, product, strict=True):
                gradients[layer] = row
        return gradients

    def inverse(self, layer: int) -> Tensor:
        """The inverse that :meth:`ihvp` applies, dense: (p, p) with p = groups * outputs * columns. For tests."""
        stack, _ = self._at(layer)
        rows, columns = stack.shape.groups * stack.shape.outputs, stack.shape.columns
        basis = torch.eye(rows * columns, dtype=stack.inputs.dtype, device=stack.inputs.device)
        zeros = [
            torch.zeros(s.groups * s.outputs, s.columns, dtype=basis.dtype, device=basis.device) for s in self.shapes
        ]
        products = []
        for unit in basis:
            zeros[layer] = unit.view(rows, columns)
            products.append(self.ihvp(zeros)[layer].flatten())
        return torch.stack(products)

    @torch.no_grad()
    def smallest_eigenvectors(self) -> list[Tensor]:
        """For each layer the product of the eigenvectors that belong to the smallest eigenvalues of its averages B and
        A, (groups * outputs, columns); of block-diagonal factors those of one block. Waits for the device.
        """
        results: list[Tensor] = [torch.empty(0)] * len(self.shapes)
        for stack in self._stacks:
            shape = stack.shape
            inputs, outputs = stack.products()[0]
            of_inputs = smallest_eigenvectors(shape.expand(inputs), shape.groups, shape.input_width)
            of_outputs = smallest_eigenvectors(outputs, shape.groups, shape.outputs)
            products = of_outputs[..., None, None] * of_inputs[:, :, None, None]  # (layers, groups, outputs, 1, width)
            rows = gather(shape, products.expand(-1, -1, -1, shape.uses, -1))
            for layer, row in zip(stack.layers, rows, strict=True):
                results[layer] = row
        return results

    # ---- bookkeeping -----------------------------------------------------------------------------------------------

    @property
    def seen(self) -> int:
        """Batches in the averages. Synchronises with the device."""
        return int(self._counts[0])

    @property
    def skipped(self) -> int:
        """Batches refused. Synchronises with the device."""
        return int(self._counts[1])

    def diagnostics(self) -> dict[str, float]:
        """seen, skipped; what became of the blocks when inverted. Synchronises with the device."""
        return {"seen": self.seen, "skipped": self.skipped, **self._inverses.diagnostics()}

    def state_dict(self) -> dict[str, Any]:
        return {
            "counts": self._counts,
            "stacks": [stack.state_dict() for stack in self._stacks],
            "inverses": self._inverses.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a :meth:`state_dict` from any device. Raises, changing nothing, if it does not fit."""
        mine = self.state_dict()
        check_like("state_dict", mine, state_dict)
        copy_into(mine, state_dict)
        for stack in self._stacks:
            stack.begin()
        self._inverses.begin()
        self.refused.zero_()

    def _at(self, layer: int) -> tuple[Stack, int]:
        return self._place[index("layer", layer, len(self.shapes))]
