"""KroneckerFisher against dense Kronecker products in float64."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

from mfac_kernels import KroneckerFisher, KroneckerShape

SHAPES = {
    "linear": KroneckerShape(outputs=3, inputs=5, bias=True),
    "convolution": KroneckerShape(outputs=4, inputs=2, offsets=4, bias=True),
    "sua": KroneckerShape(outputs=3, inputs=4, offsets=3, sua=True),
    "sua, bias": KroneckerShape(outputs=2, inputs=3, offsets=4, bias=True, sua=True),
    "blocks": KroneckerShape(outputs=5, inputs=7, bias=True, input_block=3, output_block=2),
    "sua, blocks": KroneckerShape(outputs=5, inputs=5, offsets=2, bias=True, sua=True, input_block=4, output_block=3),
    "groups": KroneckerShape(outputs=2, inputs=2, offsets=3, groups=3, bias=True),
    "embedding": KroneckerShape(outputs=3, inputs=6, input_block=1),
    "diagonal": KroneckerShape(outputs=4, inputs=3, bias=True, output_block=1),
    "sua, diagonals": KroneckerShape(
        outputs=3, inputs=2, offsets=3, bias=True, sua=True, input_block=1, output_block=1
    ),
    "unit": KroneckerShape(outputs=1, inputs=2, groups=4, unit=True),
}


def spd(*shape: int, generator: torch.Generator) -> Tensor:
    x = torch.randn(*shape[:-1], shape[-1] + 2, generator=generator, dtype=torch.float64)
    return x @ x.mT / shape[-1]


def random_factor(size: tuple[int, ...], width: int, generator: torch.Generator) -> Tensor:
    """With zeros past the ragged end."""
    factor = spd(*size, generator=generator)
    padding = -width % size[-1]
    if padding:
        factor[-1, size[-1] - padding :] = 0
        factor[-1, :, size[-1] - padding :] = 0
    return factor


def filled(shapes: list[KroneckerShape], seed: int = 0, **options: object) -> tuple[KroneckerFisher, list]:
    """A Fisher after one batch, and its factors."""
    generator = torch.Generator().manual_seed(seed)
    fisher = KroneckerFisher(shapes, dtype=torch.float64, **options)
    factors = []
    for layer, shape in enumerate(shapes):
        a = random_factor(shape.input_factor, shape.input_width, generator)
        b = random_factor(shape.output_factor, shape.outputs, generator)
        if shape.unit:
            b = torch.ones_like(b)
        fisher.add_inputs(layer, lambda total, beta, a=a: total.mul_(beta).add_(a.view_as(total)))
        fisher.add_outputs(layer, lambda total, beta, b=b: total.mul_(beta).add_(b.view_as(total)))
        factors.append((a, b))
    fisher.update()
    return fisher, factors


def dense(factor: Tensor, width: int, groups: int) -> list[Tensor]:
    """A matrix for each group."""
    if groups > 1:
        return list(factor)
    return [torch.block_diag(*factor)[:width, :width]]


def expected_inverse(
    shape: KroneckerShape, a: Tensor, b: Tensor, damping: float, style: str, pi_correction: bool = True
) -> Tensor:
    """Over the gradient, row-major."""
    blocks = []
    for left, right in zip(
        dense(b, shape.outputs, shape.groups), dense(a, shape.input_width, shape.groups), strict=True
    ):
        if style == "exact" or shape.unit:
            inverse = torch.linalg.inv(
                torch.kron(left, right) + damping * torch.eye(len(left) * len(right), dtype=torch.float64)
            )
        else:
            pi = (right.trace() / len(right)) / (left.trace() / len(left)) if pi_correction else 1.0
            inverse = torch.kron(
                torch.linalg.inv(left + math.sqrt(damping / pi) * torch.eye(len(left), dtype=torch.float64)),
                torch.linalg.inv(right + math.sqrt(damping * pi) * torch.eye(len(right), dtype=torch.float64)),
            )
        if shape.sua:
            inverse = at_each_offset(shape, inverse)
        blocks.append(inverse)
    return torch.block_diag(*blocks)


def at_each_offset(shape: KroneckerShape, inverse: Tensor) -> Tensor:
    """E^T (I (x) inverse) E: E copies a pixel's weights to its offset, and 1 / sqrt(offsets) of the bias to each."""
    width, k = shape.input_width, shape.offsets
    total = torch.zeros(shape.outputs * shape.columns, shape.outputs * shape.columns, dtype=torch.float64)
    for offset in range(k):
        spread = torch.zeros(shape.outputs, width, shape.outputs, shape.columns, dtype=torch.float64)
        for o in range(shape.outputs):
            for c in range(shape.inputs):
                spread[o, c, o, c * k + offset] = 1
            if shape.bias:
                spread[o, -1, o, -1] = 1 / math.sqrt(k)
        e = spread.view(shape.outputs * width, -1)
        total += e.mT @ inverse @ e
    return total


@pytest.mark.parametrize("pi_correction", [True, False])
@pytest.mark.parametrize("style", ["factored", "exact"])
@pytest.mark.parametrize("name", SHAPES)
def test_inverse_is_the_dense_one(name, style, pi_correction):
    shape = SHAPES[name]
    fisher, [(a, b)] = filled([shape], damping=0.1, style=style, pi_correction=pi_correction)
    fisher.refresh()
    want = expected_inverse(shape, a, b, 0.1, style, pi_correction)
    torch.testing.assert_close(fisher.inverse(0), want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("style", ["factored", "exact"])
def test_layers_do_not_meet(style):
    """All kinds at once, two of each, as one by one."""
    shapes = [shape for shape in SHAPES.values() for _ in range(2)]
    fisher, factors = filled(shapes, damping=0.03, style=style)
    fisher.refresh()
    for layer, (shape, (a, b)) in enumerate(zip(shapes, factors, strict=True)):
        want = expected_inverse(shape, a, b, 0.03, style)
        torch.testing.assert_close(fisher.inverse(layer), want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("style", ["factored", "exact"])
def test_refreshing_some_layers_leaves_others(style):
    shapes = [SHAPES["linear"]] * 4 + [SHAPES["groups"]]
    whole, _ = filled(shapes, style=style)
    parts, _ = filled(shapes, style=style)
    before = parts.inverse(1)
    parts.refresh([0, 2, 3])
    assert torch.equal(parts.inverse(1), before)
    parts.refresh([1, 4])
    whole.refresh()
    for layer in range(5):
        torch.testing.assert_close(parts.inverse(layer), whole.inverse(layer), rtol=1e-12, atol=1e-12)


def test_one_block_is_dense_and_blocks_of_one_are_diagonal():
    a, b = (spd(n, n, generator=torch.Generator().manual_seed(n))[None] for n in (4, 3))
    for block, keep in ((None, 1.0), (4, 1.0), (1, 0.0)):
        shape = KroneckerShape(outputs=3, inputs=4, input_block=block)
        fisher = KroneckerFisher([shape], 0.1, dtype=torch.float64)
        masked = keep * a + (1 - keep) * a * torch.eye(4)
        part = masked if shape.input_factor[0] == 1 else masked[0].diagonal().view(4, 1, 1)
        fisher.add_inputs(0, lambda total, beta, part=part: total.copy_(part.view_as(total)))
        fisher.add_outputs(0, lambda total, beta: total.copy_(b.view_as(total)))
        fisher.update()
        fisher.refresh()
        dense_shape = KroneckerShape(outputs=3, inputs=4)
        want = expected_inverse(dense_shape, masked, b, 0.1, "factored")
        torch.testing.assert_close(fisher.inverse(0), want, rtol=1e-10, atol=1e-10)


def test_averages_are_debiased():
    shape = SHAPES["linear"]
    fisher = KroneckerFisher([shape], factor_decay=0.9, dtype=torch.float64)
    batches = [filled([shape], seed)[1][0] for seed in range(3)]
    for a, b in batches:
        fisher.add_inputs(0, lambda total, beta, a=a: total.copy_(a[0]))
        fisher.add_outputs(0, lambda total, beta, b=b: total.copy_(b[0]))
        fisher.update()
    weights = torch.tensor([0.9**2, 0.9, 1.0], dtype=torch.float64)
    weights /= weights.sum()
    for got, parts in zip(fisher.factors(0), zip(*batches, strict=True), strict=True):
        want = sum(w * p for w, p in zip(weights, parts, strict=True))
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert fisher.seen == 3


def test_a_refused_batch_changes_nothing():
    shapes = [SHAPES["linear"], SHAPES["groups"]]
    fisher, _ = filled(shapes)
    fisher.refresh()
    before, kept = copy.deepcopy(fisher.state_dict()), fisher.factors(0)[0].clone()
    x = torch.ones(4, 5, dtype=torch.float64)
    fisher.accumulate(0, x, torch.full((4, 3), float("nan"), dtype=torch.float64))
    fisher.update()
    after = fisher.state_dict()
    for mine, theirs in zip(before["stacks"], after["stacks"], strict=True):
        for key in mine:
            assert torch.equal(mine[key], theirs[key])
    assert (fisher.seen, fisher.skipped) == (1, 1)
    fisher.accumulate(0, x, torch.ones(4, 3, dtype=torch.float64))
    fisher.update(torch.tensor(float("inf")))
    assert (fisher.seen, fisher.skipped) == (1, 2)
    assert torch.equal(fisher.factors(0)[0], kept)
    fisher.accumulate(0, x, torch.ones(4, 3, dtype=torch.float64))
    fisher.update()
    assert (fisher.seen, fisher.skipped) == (2, 2)


def test_layers_without_rows_stay():
    shapes = [SHAPES["linear"], SHAPES["linear"]]
    fisher, _ = filled(shapes)
    before = [f.clone() for f in fisher.factors(1)]
    fisher.accumulate(0, torch.ones(4, 5, dtype=torch.float64), torch.ones(4, 3, dtype=torch.float64))
    fisher.update()
    for got, want in zip(fisher.factors(1), before, strict=True):
        assert torch.equal(got, want)


def test_rows_give_the_expected_fisher():
    """Two positions a sample: A is divided by the samples, B by their positions too."""
    a, g = torch.randn(6, 5).double(), torch.randn(6, 3).double()
    fisher = KroneckerFisher([SHAPES["linear"]], dtype=torch.float64)
    fisher.accumulate(0, a, g, positions=2)
    fisher.update()
    rows = torch.cat([a, torch.ones(6, 1)], 1)
    got_a, got_b = fisher.factors(0)
    torch.testing.assert_close(got_a[0], rows.mT @ rows / 3)
    torch.testing.assert_close(got_b[0], g.mT @ g / 6)


def test_eigen_correction_is_nearer_to_the_fisher_and_keeps_its_trace():
    """|F - EKFAC| <= |F - KFAC|, tr EKFAC = tr F (George et al. 2018)."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(40, 4, generator=generator, dtype=torch.float64)
    g = torch.randn(40, 3, generator=generator, dtype=torch.float64) * a[:, :1]  # not independent
    shape = KroneckerShape(outputs=3, inputs=4)
    per_sample = torch.einsum("no,ni->noi", g, a).flatten(1)
    exact = per_sample.mT @ per_sample / 40
    fisher = KroneckerFisher(
        [shape], 1e-12, factor_decay=0.0, style="exact", eigen_correction=True, dtype=torch.float64
    )
    fisher.accumulate(0, a, g)
    fisher.update()
    fisher.refresh()
    kfac = torch.linalg.inv(fisher.inverse(0))
    fisher.accumulate(0, a, g)
    fisher.add_moments(0, a[None], g[None], 1 / 40)
    fisher.update()
    ekfac = torch.linalg.inv(fisher.inverse(0))
    assert float((ekfac - exact).norm()) < 0.9 * float((kfac - exact).norm())
    torch.testing.assert_close(ekfac.trace(), exact.trace(), rtol=1e-6, atol=0)
    best = (fisher.inverse(0) @ exact).trace()  # the diagonal in its own basis is right: tr(EKFAC^-1 F) = its dimension
    torch.testing.assert_close(best, torch.tensor(12.0, dtype=torch.float64), rtol=1e-6, atol=0)


@pytest.mark.parametrize("style", ["factored", "exact"])
def test_state_resumes_bit_for_bit(style):
    shapes = list(SHAPES.values())
    one, _ = filled(shapes, 1, style=style)
    one.refresh()
    state = copy.deepcopy(one.state_dict())
    other = KroneckerFisher(shapes, dtype=torch.float64, style=style)
    other.load_state_dict(state)
    for fisher in (one, other):
        fisher.accumulate(0, torch.ones(2, 5, dtype=torch.float64), torch.ones(2, 3, dtype=torch.float64))
        fisher.update()
        fisher.refresh()
    gradients = [torch.randn(s.groups * s.outputs, s.columns).double() for s in shapes]
    for a, b in zip(one.ihvp(gradients), other.ihvp(gradients), strict=True):
        assert torch.equal(a, b)


def test_a_failed_block_keeps_its_last_inverse():
    shape = KroneckerShape(outputs=2, inputs=2)
    fisher = KroneckerFisher([shape], 1e-30, factor_decay=0.0)
    fisher.accumulate(0, torch.eye(2), torch.eye(2))
    fisher.update()
    fisher.refresh()
    fisher.add_inputs(0, lambda total, beta: total.copy_(torch.tensor([[-1e3, 0.0], [0.0, -1e3]])))
    fisher.add_outputs(0, lambda total, beta: total.copy_(torch.eye(2)))
    fisher.update()
    fisher.refresh()
    assert bool(fisher.inverse(0).isfinite().all())
    assert fisher.diagnostics()["blocks_kept"] + fisher.diagnostics()["blocks_damped"] >= 1


BAD = [
    (lambda: KroneckerFisher([], dtype=torch.float16), TypeError, "dtype: expected float32 or float64"),
    (lambda: KroneckerFisher([], style="other"), ValueError, "style: expected"),
    (lambda: KroneckerFisher([], eigen_correction=True), ValueError, "eigen_correction: expected style"),
    (
        lambda: KroneckerFisher([], factor_decay=1.0),
        ValueError,
        r"factor_decay: expected a number in \[0, 1\), got 1.0",
    ),
    (lambda: KroneckerFisher([], damping=0.0), ValueError, "damping: expected a positive finite number"),
    (lambda: KroneckerShape(outputs=0, inputs=1), ValueError, "outputs: expected at least 1, got 0"),
    (lambda: KroneckerShape(1, 1, groups=2, input_block=1), ValueError, "input_block: expected None with groups = 2"),
    (lambda: filled([SHAPES["linear"]])[0].ihvp([]), ValueError, "gradients: expected 1, one for each layer, got 0"),
    (
        lambda: filled([SHAPES["linear"]])[0].ihvp([torch.zeros(3, 5)]),
        ValueError,
        r"gradients\[0\]: expected shape \(3, 6\), got \(3, 5\)",
    ),
    (lambda: filled([SHAPES["linear"]])[0].factors(1), IndexError, r"layer: expected an index in \[-1, 1\), got 1"),
    (lambda: filled([SHAPES["linear"]])[0].load_state_dict({}), KeyError, "state_dict: expected the entries"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
