"""Two ways to invert B (x) A + damping: by inverses of damped factors, and in the eigenbases of the factors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from mfac_kernels.fisher._inversion import Inversion
from mfac_kernels.fisher._layout import KroneckerShape, multiply_inputs, multiply_outputs, multiply_rows
from mfac_kernels.fisher._pairs import Pairs
from mfac_kernels.fisher._stack import Stack, lerp_rows

State = dict[str, list[Tensor]]


class Inverses(ABC):
    """What :meth:`refresh` computes from the averages and :meth:`apply` multiplies with. At first the identity."""

    def __init__(self, stacks: Sequence[Stack]) -> None:
        self.stacks = list(stacks)
        # Of each of sums(): which layers have one of this batch; and on how many ranks, if these share it
        self.begun: list[list[bool]] = []
        self.called: list[Tensor] | None = None

    @abstractmethod
    def refresh(self, damping: float, rows: Sequence[list[int]]) -> None:
        """``rows``: which layers, for each stack."""

    @abstractmethod
    def apply(self, stack: Stack, x: Tensor) -> Tensor:
        """F^-1 of this stack's layers times x (layers, groups, outputs, uses, inputs)."""

    @abstractmethod
    def views(self, stack: Stack, row: int) -> list[Tensor]:
        """What :meth:`refresh` writes for one layer."""

    @abstractmethod
    def state_dict(self) -> State: ...

    def sums(self) -> list[Tensor]:
        """Sums over a batch."""
        return []

    def update(self, take: Tensor, output_scale: Tensor | None) -> None:  # noqa: B027  (most keep no averages)
        """Let the sums enter the averages."""

    def finite(self, output_scale: Tensor | None) -> Tensor | bool:
        """Whether the sums of this batch are, times ``output_scale``, without a synchronisation."""
        return True

    def begin(self) -> None:  # noqa: B027
        """No layer has sums of this batch."""

    def diagnostics(self) -> dict[str, float]:
        return {}


class FactoredInverses(Inverses):
    """F^-1 = (B + sqrt(damping / pi) I)^-1 (x) (A + sqrt(damping pi) I)^-1.

    What is stored of a factor average = sum / weight is the inverse of sum + weight * its damping, and the product of
    the weights as a scale: no pass over the factors is needed for the division.
    """

    def __init__(self, stacks: Sequence[Stack], pi_correction: bool) -> None:
        super().__init__(stacks)
        self.pi_correction = pi_correction
        self._inputs = [_identity(stack, stack.shape.input_factor) for stack in stacks]
        self._outputs = [_identity(stack, stack.shape.output_factor) for stack in stacks]
        self._scales = [torch.ones_like(stack.weight) for stack in stacks]
        self._inversion = Inversion(stacks[0].weight.device if stacks else None)

    def refresh(self, damping: float, rows: Sequence[list[int]]) -> None:
        batches: list[Tensor] = []
        dampings: list[Tensor] = []
        targets: list[Tensor] = []
        known: list[Tensor] = []  # which layers have seen a batch
        for i, (stack, chosen) in enumerate(zip(self.stacks, rows, strict=True)):
            for row in runs(chosen):
                seen, weight = stack.weight[row] > 0, nonzero(stack.weight[row])[:, None]
                inputs, outputs = stack.shape.expand(stack.inputs[row]), stack.outputs[row]
                shifts = damping_of(stack.shape, inputs, outputs, damping, self.pi_correction)
                of_inputs, of_outputs = (shift * weight for shift in shifts)
                self._scales[i][row] = torch.where(seen, weight[:, 0] ** 2, 1)
                # A layer that has seen nothing keeps its inverses: the identity, not that of the damping alone.
                for factor, shift, target in (
                    (outputs, of_outputs, self._outputs[i][row]),
                    (inputs, of_inputs, self._inputs[i][row]),
                ):
                    batches.append(factor)
                    dampings.append(shift.expand(factor.shape[:2]))
                    targets.append(target)
                    known.append(seen)
        self._inversion.run(batches, dampings, targets, known)

    def apply(self, stack: Stack, x: Tensor) -> Tensor:
        i = self.stacks.index(stack)
        x = multiply_inputs(x * self._scales[i][:, None, None, None, None], self._inputs[i])
        return multiply_outputs(self._outputs[i], x)

    def views(self, stack: Stack, row: int) -> list[Tensor]:
        i = self.stacks.index(stack)
        return [self._inputs[i][row], self._outputs[i][row], self._scales[i][row]]

    def state_dict(self) -> State:
        counts = self._inversion.counts
        return {"inputs": self._inputs, "outputs": self._outputs, "scales": self._scales, "counts": counts}

    def diagnostics(self) -> dict[str, float]:
        return self._inversion.diagnostics()


class Eigenbases(Inverses):
    """F^-1 = (U_B (x) U_A) diag(1 / (s + damping)) (U_B (x) U_A)^T, with s = s_B (x) s_A.

    With the eigenvalue correction (EKFAC) s is a moving average of the squared gradient in that basis, which starts
    from s_B (x) s_A whenever the basis changes.

    Source: George et al., "Fast approximate natural gradient descent in a Kronecker-factored eigenbasis", NeurIPS 2018.
    """

    def __init__(self, stacks: Sequence[Stack], eigen_correction: bool) -> None:
        super().__init__(stacks)
        self.eigen_correction = eigen_correction
        self._inputs = [_identity(stack, stack.shape.input_factor) for stack in stacks]
        self._outputs = [_identity(stack, stack.shape.output_factor) for stack in stacks]
        # (layers, groups, outputs, 1, inputs)
        self.moments = [
            stack.inputs.new_ones(len(stack.layers), s.groups, s.outputs, 1, s.input_width)
            for stack in stacks
            for s in [stack.shape]
        ]
        self._sums = [torch.zeros_like(m) for m in self.moments] if eigen_correction else []
        self.begin()
        self._dampings = [torch.zeros_like(stack.weight) for stack in stacks]

    def refresh(self, damping: float, rows: Sequence[list[int]]) -> None:
        for i, (stack, chosen) in enumerate(zip(self.stacks, rows, strict=True)):
            for row in runs(chosen):
                seen, weight = stack.weight[row] > 0, nonzero(stack.weight[row])[:, None, None]
                inputs = stack.shape.expand(stack.inputs[row])
                of_inputs = _eigh(inputs, stack.shape.input_width, self._inputs[i][row]) / weight
                of_outputs = _eigh(stack.outputs[row], stack.shape.outputs, self._outputs[i][row]) / weight
                of_inputs = by_group(of_inputs, stack.shape.groups, stack.shape.input_width)
                of_outputs = by_group(of_outputs, stack.shape.groups, stack.shape.outputs)
                # A layer that has seen nothing keeps eigenvalues of 1: factors of zero have the identity for a basis.
                moments = of_outputs[..., None, None] * of_inputs[:, :, None, None]
                self.moments[i][row] = torch.where(seen[:, None, None, None, None], moments, 1)
                self._dampings[i][row] = damping * seen.to(moments.dtype)

    def add_moments(self, stack: Stack, row: int, pairs: Pairs) -> None:
        inputs, gradients, alpha, weights = pairs
        if not self.eigen_correction or stack.shape.sua:
            raise ValueError("add_moments: expected eigen_correction, and full spatial factors")
        i = self.stacks.index(stack)
        total = self._sums[i][row, :, :, 0]  # (groups, outputs, inputs)
        begun, self.begun[i][row] = self.begun[i][row], True
        by_gradient = gradients.dim() == 1  # indices of one-hot rows
        rows = (
            multiply_rows(inputs, self._inputs[i][row])
            if by_gradient
            else multiply_rows(gradients, self._outputs[i][row])
        )
        squares = alpha * rows.square()
        if weights is not None:
            squares = squares * weights
        if by_gradient or inputs.dim() == 1:  # index_put_, not index_add_: one order, on CUDA too
            into, indices = (total, gradients) if by_gradient else (total.mT, inputs)
            if not begun:
                total.zero_()
            into[0].index_put_((indices,), squares[0].to(total.dtype), accumulate=True)
            return
        product = squares.mT @ multiply_rows(inputs, self._inputs[i][row]).square()
        total.copy_(product + total if begun else product)

    def sums(self) -> list[Tensor]:
        return self._sums

    def finite(self, output_scale: Tensor | None) -> Tensor | bool:
        shared = self.called is not None  # sums of ranks that have none are zero
        rows = [
            total[row]
            for total, begun in zip(self._sums, self.begun, strict=True)
            for row in runs([i for i, has_sum in enumerate(begun) if has_sum or shared])
        ]
        if not rows:
            return True
        finite = torch.stack([_scaled(total, output_scale).isfinite().all() for total in rows])
        return finite.all()

    def update(self, take: Tensor, output_scale: Tensor | None) -> None:
        for i, total in enumerate(self._sums):
            scaled = _scaled(total, output_scale)
            finite = torch.where(take > 0, scaled, 0)  # a refused batch's are not used, but 0 * inf is no number
            called = self.called[i] if self.called else None
            lerp_rows(self.moments[i], finite, take.to(total.dtype), self.begun[i], called)
        self.begin()

    def begin(self) -> None:
        self.begun = [[False] * len(stack.layers) for stack in self.stacks] if self.eigen_correction else []
        self.called = None

    def to_basis(self, stack: Stack, x: Tensor) -> Tensor:
        """U_B^T x U_A."""
        i = self.stacks.index(stack)
        return multiply_outputs(self._outputs[i].mT, multiply_inputs(x, self._inputs[i]))

    def apply(self, stack: Stack, x: Tensor) -> Tensor:
        i = self.stacks.index(stack)
        x = self.to_basis(stack, x) / (self.moments[i] + self._dampings[i][:, None, None, None, None])
        return multiply_outputs(self._outputs[i], multiply_inputs(x, self._inputs[i].mT))

    def views(self, stack: Stack, row: int) -> list[Tensor]:
        i = self.stacks.index(stack)
        return [self._inputs[i][row], self._outputs[i][row], self.moments[i][row], self._dampings[i][row]]

    def state_dict(self) -> State:
        return {
            "inputs": self._inputs,
            "outputs": self._outputs,
            "moments": self.moments,
            "dampings": self._dampings,
        }


def _scaled(total: Tensor, scale: Tensor | None) -> Tensor:
    return total if scale is None else (total * scale).to(total)


def _identity(stack: Stack, size: tuple[int, ...]) -> Tensor:
    """For each layer."""
    unit = torch.eye(size[-1], dtype=stack.inputs.dtype, device=stack.inputs.device)
    return unit.expand(len(stack.layers), *size).contiguous()


def runs(rows: list[int]) -> list[slice]:
    """Slices that cover ascending ``rows``, as few as possible: views, not copies."""
    found: list[slice] = []
    for row in rows:
        if found and found[-1].stop == row:
            found[-1] = slice(found[-1].start, row + 1)
        else:
            found.append(slice(row, row + 1))
    return found


def damping_of(
    shape: KroneckerShape, inputs: Tensor, outputs: Tensor, damping: float, pi_correction: bool
) -> tuple[Tensor, Tensor]:
    """sqrt(damping pi) for A and sqrt(damping / pi) for B, of factors with one scale: (layers, groups), or (layers, 1)
    where blocks are parts of one factor. All of it for the A of a ``unit``.
    """
    means = []
    for factor, width in ((inputs, shape.input_width), (outputs, shape.outputs)):
        trace = factor.diagonal(dim1=-2, dim2=-1).sum(-1)
        if shape.groups == 1:
            trace = trace.sum(-1, keepdim=True)
        means.append(trace / width)
    pi = means[0] / means[1]
    if shape.unit:
        none = torch.zeros_like(pi)
        return none + damping, none  # infinite where the type holds nothing as large
    usable = pi.isfinite() & (pi > 0) if pi_correction else torch.zeros_like(pi, dtype=torch.bool)
    pi = torch.where(usable, pi, 1)
    return (damping * pi).sqrt(), (damping / pi).sqrt()


def nonzero(weight: Tensor) -> Tensor:
    """A layer that has seen nothing has factors of zero, whatever they are divided by."""
    return torch.where(weight > 0, weight, 1)


def by_group(values: Tensor, groups: int, width: int) -> Tensor:
    """(layers, blocks, s) -> (layers, groups, width): blocks of one factor follow one another, less the ragged end."""
    return values.flatten(1)[:, None, :width] if groups == 1 else values


def _eigh(factor: Tensor, width: int, vectors: Tensor) -> Tensor:
    """Eigenvalues (layers, blocks, s) of the blocks of a factor of `width` rows; writes the eigenvectors."""
    values, basis = eigen(factor, width)
    vectors.copy_(basis)
    return values.clamp_min(0)


def eigen(factor: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending, and eigenvectors of the blocks of a factor of `width` rows. Waits for the device."""
    if factor.shape[-1] == 1:
        return factor[..., 0], torch.ones_like(factor)
    try:
        values, basis = torch.linalg.eigh(_padding_last(factor, width))
    except LinAlgError as error:
        raise LinAlgError(f"factors: expected finite matrices that have eigenvalues: {error}") from error
    return values, basis


def _padding_last(factor: Tensor, width: int) -> Tensor:
    """The padding of a ragged block is given the largest eigenvalues: its eigenvectors come last, as its rows do."""
    padding = -width % factor.shape[-1]
    if padding:
        factor = factor.clone()
        diagonal = factor[:, -1].diagonal(dim1=-2, dim2=-1)
        diagonal[:, -padding:] = 2 * torch.linalg.matrix_norm(factor[:, -1])[:, None] + 1
    return factor


def smallest_eigenvectors(factor: Tensor, groups: int, width: int) -> Tensor:
    """Of each group's part of a factor, of the block that has the smallest eigenvalue -> (layers, groups, width).

    factor (layers, blocks, s, s). The largest entry is positive.
    """
    values, basis = eigen(factor, width)
    vectors: Tensor = basis[..., 0]  # (layers, blocks, s)
    if groups == 1:
        least = torch.nn.functional.one_hot(values[..., 0].argmin(1), values.shape[1])
        vectors = (vectors * least[..., None]).flatten(1)[:, None, :width]
    largest = vectors.gather(-1, vectors.abs().argmax(-1, keepdim=True))
    return vectors * largest.sign()
