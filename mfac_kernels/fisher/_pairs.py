"""Kronecker products near a matrix M = sum_r w_r g_r g_r^T (x) a_r a_r^T that is never formed: TKFAC, KPSVD, deflation.

K-FAC has the averages of a a^T and of g g^T, and knows nothing of what inputs and gradients have to do with each other.
Here each row of one is weighed by its partner, with U and V for probes of the shapes of A and B:

    A' = sum_r w_r (g_r^T V g_r) a_r a_r^T        B' = sum_r w_r (a_r^T U a_r) g_r g_r^T
    B (x) A = B' (x) A' / s,   s = <U, A'> = <V, B'>

A' and B' are M, rearranged so that B (x) A is vec(A) vec(B)^T, times vec(V) and, transposed, times vec(U): so M's own
products with both probes are preserved.

    tkfac   U = V = I: the trace of M and both of its partial traces are preserved. A' / s and B' / s are the paper's
            Phi and Psi, and s its delta.
    kpsvd   U, V: the averages so far, I at first. That is a power iteration a batch, whose fixed point is the largest
            singular value s with its vectors U and V: the product that is nearest to M in the Frobenius norm.
    deflation   that product and a second one, of what it leaves. With probes U2 and V2 of norm 1, the second product's
            averages so far, a batch adds up A2' and B2' as above and has

                A2'' = A2' - <V2, B> A    B2'' = B2' - <U2, A> B    s2 = <U2, A2''> = <V2, B2''>
                B2 (x) A2 = s2 (B2'' / |B2''|) (x) (A2'' / |A2''|)

            with the first product's A and B of this batch: a power iteration again, for the second singular value. The
            sum that is nearest to M need not be positive semidefinite: s2 and both factors have either sign.

The scale of the probes cancels. All is linear in the rows, so calls, passes and ranks add up. A and B get the same mean
eigenvalue before they enter their averages, A2 and B2 the same norm.

Sources: Gao et al., "A trace-restricted Kronecker-factored approximation to natural gradient", AAAI 2021; Van Loan,
Pitsianis, "Approximation with Kronecker products", 1993; Koroko et al., "Efficient approximations of the Fisher matrix
in neural networks using Kronecker product singular value decomposition", 2022.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from mfac_kernels import ops
from mfac_kernels.fisher._layout import KroneckerShape, multiply_rows

if TYPE_CHECKING:
    from mfac_kernels.fisher._stack import Stack

Approximate = Literal["kfac", "tkfac", "kpsvd", "deflation"]
APPROXIMATE = ("kfac", "tkfac", "kpsvd", "deflation")
Product = tuple[Tensor, Tensor]
"""A (..., a, a) and B (..., b, b) of B (x) A, or probes of their shapes."""


class Pairs(NamedTuple):
    """Rows of A and of B that belong together: their products count alpha times ``weights``, (n, 1) or () or None.

    inputs (groups, n, columns) or, where A is its diagonal, the indices (n,) of one-hot rows; gradients likewise.
    """

    inputs: Tensor
    gradients: Tensor
    alpha: float
    weights: Tensor | None = None


def add_pairs(stack: Stack, row: int, pairs: Pairs, refused: Tensor) -> None:
    """To a layer's A' and B' of each product; the flag is set if rows are not finite."""
    shape, dtype = stack.shape, stack.inputs.dtype
    inputs, gradients, alpha, weights = pairs
    repeats = shape.uses
    if repeats > 1:
        inputs = _pixels(shape, inputs)
    beta = 1.0 if stack.inputs_begun[row] else 0.0
    for probes, (input_sums, output_sums) in zip(stack.probes(row), stack.sums(), strict=True):
        of_a, of_b = (None, None) if probes is None else (probe[0] for probe in probes)
        by_inputs, by_gradients = _forms(inputs, of_a, dtype), _forms(gradients, of_b, dtype)
        if repeats > 1:  # the mean over offsets, of which every pair has all
            by_inputs = by_inputs.view(len(by_inputs), -1, repeats).mean(-1)
        if weights is not None:
            by_inputs, by_gradients = (by * weights.reshape(-1).to(dtype) for by in (by_inputs, by_gradients))
        if repeats > 1:
            by_gradients = by_gradients.repeat_interleave(repeats, -1) / repeats
        _accumulate(input_sums[row], inputs, by_gradients, shape.groups, beta, alpha, refused)
        _accumulate(output_sums[row], gradients, by_inputs, shape.groups, beta, alpha, refused)
    stack.inputs_begun[row] = stack.outputs_begun[row] = True


def probe(average: Tensor, weight: Tensor, width: int) -> Tensor:
    """An average factor (layers, blocks, s, s), scaled to a mean eigenvalue of 1; I for a layer without one."""
    trace = average.diagonal(dim1=-2, dim2=-1).sum((1, 2)).view(-1, 1, 1, 1)
    known = (weight.view_as(trace) > 0) & (trace > 0)
    unit = torch.eye(average.shape[-1], dtype=average.dtype, device=average.device)
    return torch.where(known, average * (width / torch.where(known, trace, 1)), unit)


def direction(average: Tensor, groups: int) -> Tensor:
    """An average factor (layers, blocks, s, s) of either sign, scaled to a norm of 1; one that is zero is replaced."""
    blocks, size = average.shape[1:3]
    # Not I: what is left of M may have no part in it
    start = torch.linspace(1, 2, blocks * size, dtype=average.dtype, device=average.device).view(1, blocks, size)
    norm, of_start = (_inner(x, x, groups).sqrt() for x in (average, start.diag_embed()))
    known = norm > 0
    scaled = _scaled(average, torch.where(known, 1 / norm, 0))
    return torch.where(known[..., None, None], scaled, _scaled(start.diag_embed(), 1 / of_start))


def product_of(shape: KroneckerShape, sums: Product, probes: Product | None) -> Product:
    """A and B, of one mean eigenvalue, from A' and B' (layers, blocks, s, s) and U: with groups one pair for each."""
    inputs, outputs = sums
    a = _inner(inputs, None, shape.groups) / shape.input_width
    b = _inner(outputs, None, shape.groups) / shape.outputs
    s = _inner(inputs, None if probes is None else probes[0], shape.groups)
    some = (a > 0) & (b > 0) & (s > 0)
    a, b, s = (torch.where(some, x, 1) for x in (a, b, s))
    mean = torch.where(some, (a / s * b).sqrt(), 0)
    return _scaled(inputs, mean / a), _scaled(outputs, mean / b)


def second_product(shape: KroneckerShape, sums: Product, probes: Product, first: Product) -> Product:
    """A2 and B2, of one norm, from A2' and B2', U2 and V2, and the first product."""
    groups = shape.groups
    (inputs, outputs), (u, v), (a, b) = sums, probes, first
    inputs = inputs - _scaled(a, _inner(b, v, groups))
    outputs = outputs - _scaled(b, _inner(a, u, groups))
    s = _inner(inputs, u, groups)
    root = s.abs().sqrt()
    norms = [_inner(x, x, groups).sqrt() for x in (inputs, outputs)]
    of_inputs, of_outputs = (torch.where(norm > 0, root / norm, 0) for norm in norms)
    return _scaled(inputs, of_inputs * s.sign()), _scaled(outputs, of_outputs)


def _inner(factor: Tensor, probes: Tensor | None, groups: int) -> Tensor:
    """<U, factor> in float64: (layers, groups), or (layers, 1) where blocks are parts of one factor. U: I if None."""
    if probes is None:
        traces = factor.diagonal(dim1=-2, dim2=-1).sum(-1, dtype=torch.float64)
    else:
        traces = (factor.double() * probes).sum((-2, -1))
    return traces.sum(-1, keepdim=True) if groups == 1 else traces


def _scaled(factor: Tensor, scale: Tensor) -> Tensor:
    """Times a number for each layer and group, as :func:`_inner` has them."""
    return factor * scale.to(factor.dtype)[..., None, None]


def _forms(rows: Tensor, matrix: Tensor | None, dtype: torch.dtype) -> Tensor:
    """r^T U r of rows (groups, n, columns) or of one-hot ones (n,) -> (groups, n)."""
    if rows.dim() == 1:
        return torch.ones_like(rows, dtype=dtype)[None] if matrix is None else matrix.view(-1)[rows][None]
    rows = rows.to(dtype)
    forms: Tensor = torch.linalg.vecdot(rows, rows if matrix is None else multiply_rows(rows, matrix))
    return forms


def _accumulate(
    total: Tensor, rows: Tensor, weights: Tensor, groups: int, beta: float, alpha: float, refused: Tensor
) -> None:
    """total (blocks, s, s) <- beta total + alpha sum_r w_r r r^T, weights (groups or 1, n)."""
    if rows.dim() == 1:  # index_put_, not index_add_: one order, on CUDA too
        if beta == 0:
            total.zero_()
        total.view(-1).index_put_((rows,), alpha * weights[0], accumulate=True)
        return
    if groups == 1 and total.shape[-1] == 1:
        squares = (alpha * weights @ rows[0].to(weights.dtype).square()).view_as(total)
        total.copy_(squares + total if beta else squares)
        return
    factors = total if groups > 1 else [total[0] if len(total) == 1 else total]
    for factor, own, each in zip(factors, rows, weights.expand(len(rows), -1), strict=True):
        ops.linear_factor_(factor, own, weights=each.contiguous(), beta=beta, alpha=alpha, check_finite=refused)


def _pixels(shape: KroneckerShape, patches: Tensor) -> Tensor:
    """Patches (groups, n, inputs * offsets + bias) -> their pixels (groups, n * offsets, inputs + bias)."""
    count = shape.inputs * shape.offsets
    pixels = patches[..., :count].reshape(*patches.shape[:-1], shape.inputs, shape.offsets).mT
    if shape.bias:
        pixels = torch.cat([pixels, patches[..., None, count:].expand(*pixels.shape[:-1], 1)], -1)
    return pixels.flatten(1, 2)
