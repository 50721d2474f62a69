"""GPTQ, SparseGPT and rounding to nearest, of one layer: against the optimal brain surgeon with explicit inverses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from layer_cases import LAYERS, inputs, layer, rows, weight_rows
from torch import Tensor, nn

from mfac_kernels.pruning import LayerHessian, Quantized, gptq, round_to_nearest, sparsegpt
from mfac_kernels.reference import layer_hessian as reference

KINDS = [kind for kind in LAYERS if kind not in ("row", "image")]


def hessian_of(module: nn.Module, x: Tensor) -> Tensor:
    with LayerHessian(module) as hessians:
        module(x)
    return hessians[""]


def case(kind: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    """A layer and the Hessian of correlated inputs."""
    module = layer(kind, dtype)
    return module, hessian_of(module, inputs(kind, dtype, count=30))


def as_groups(hessian: Tensor) -> Tensor:
    return hessian if hessian.dim() == 3 else hessian[None]


def spread(t: Tensor, group_size: int | None, n: int) -> Tensor:
    return t.repeat_interleave(group_size or n, -1)[..., :n].double()


def values(q: Quantized, group_size: int | None) -> Tensor:
    n = q.codes.shape[1]
    return (q.codes - spread(q.zero, group_size, n)) * spread(q.scale, group_size, n)


def gptq_reference(
    weights: Tensor, hessian: Tensor, bits: int, group_size: int | None, symmetric: bool, actorder: bool
) -> Tensor:
    """One group of a layer: weights (rows, n)."""
    n = weights.shape[1]
    size = group_size or n
    scales, zeros = torch.empty_like(weights), torch.empty_like(weights)
    for start in range(0, n, size):
        part = weights[:, start : start + size]
        low, high = part.amin(1).clamp_max(0), part.amax(1).clamp_min(0)
        if symmetric:
            high = part.abs().amax(1)
            low = -high
        scale = (high - low) / (2**bits - 1)
        scale[scale == 0] = 1
        scales[:, start : start + size] = scale[:, None]
        zeros[:, start : start + size] = 2 ** (bits - 1) if symmetric else (-low / scale).round()[:, None]
    order = hessian.diagonal().argsort(descending=True, stable=True) if actorder else torch.arange(n)
    scales, zeros = scales[:, order], zeros[:, order]

    def nearest(i: int, w: Tensor) -> Tensor:
        code = ((w[:, i] / scales[:, i]).round() + zeros[:, i]).clamp(0, 2**bits - 1)
        return (code - zeros[:, i]) * scales[:, i]

    h = reference.damped(hessian[order][:, order], 0.01)
    return reference.change_columns(weights[:, order], h, nearest)[:, order.argsort()]


@pytest.mark.parametrize("actorder", [False, True])
@pytest.mark.parametrize(("bits", "group_size", "symmetric"), [(4, None, False), (3, 4, True), (2, 5, False)])
@pytest.mark.parametrize("kind", KINDS)
def test_gptq_is_the_optimal_brain_surgeon_column_by_column(kind, bits, group_size, symmetric, actorder):
    module, hessian = case(kind)
    before = weight_rows(module)
    got = gptq(module, hessian, bits, group_size=group_size, symmetric=symmetric, actorder=actorder, block_size=5)
    pairs = zip(before, as_groups(hessian), strict=True)
    want = torch.stack([gptq_reference(w, h, bits, group_size, symmetric, actorder) for w, h in pairs])
    torch.testing.assert_close(weight_rows(module), want, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(values(got, group_size).view_as(want), want, rtol=1e-9, atol=1e-12)
    assert got.codes.dtype == torch.int32 and int(got.codes.min()) >= 0 and int(got.codes.max()) < 2**bits
    assert not torch.equal(weight_rows(module), before) or kind == "one"


def sparsegpt_reference(weights: Tensor, hessian: Tensor, sparsity: float, pattern: str, block: int) -> list[Tensor]:
    """All groups of a layer: weights (groups, rows, n) -> the new weights of each."""
    h = [reference.damped(own, 0.01) for own in hessian]
    cost = torch.stack([reference.costs(own) for own in h])
    groups, rows_, n = weights.shape
    kept = torch.ones_like(weights, dtype=torch.bool)
    kept_of, size = (int(k) for k in pattern.split(":")) if ":" in pattern else (0, 0)
    states = [w.clone() for w in weights]
    # Group by group in step: the choice of a block looks at all of them.
    for start in range(0, n, size or block):
        stop = min(start + (size or block), n)
        each = torch.stack(states)[:, :, start:stop] ** 2 / cost[:, None, start:stop]
        if size and stop - start == size:
            drop = each.argsort(-1)[..., : size - kept_of]
            kept[..., start:stop].scatter_(-1, drop, False)
        elif not size:
            count = round(sparsity * groups * rows_ * stop) - round(sparsity * groups * rows_ * start)
            flat = torch.ones(each.numel(), dtype=torch.bool)
            flat[each.flatten().argsort()[:count]] = False
            kept[..., start:stop] = flat.view(each.shape)
        for g in range(groups):

            def pruned(i: int, w: Tensor, g: int = g, first: int = start, last: int = stop) -> Tensor:
                return w[:, i] * kept[g, :, i] if first <= i < last else w[:, i]

            states[g] = reference.change_columns(states[g], h[g], pruned)
    return states


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "1:3"])
@pytest.mark.parametrize("kind", KINDS)
def test_sparsegpt_is_the_optimal_brain_surgeon_column_by_column(kind, pattern):
    module, hessian = case(kind)
    before = weight_rows(module)
    sparsity = {"unstructured": 0.6, "2:4": 0.5, "1:3": 2 / 3}[pattern]
    mask = sparsegpt(module, hessian, sparsity, pattern=pattern, block_size=5)
    want = torch.stack(sparsegpt_reference(before, as_groups(hessian), sparsity, pattern, 5))
    torch.testing.assert_close(weight_rows(module), want, rtol=1e-9, atol=1e-12)
    assert mask.shape == module.weight.shape and torch.equal(mask, module.weight != 0)
    n = before.shape[2]
    matrix = mask.T if kind == "transposed" else mask.flatten(1)
    if pattern == "unstructured":
        assert int((~mask).sum()) == round(0.6 * mask.numel())
    else:
        kept, size = (int(k) for k in pattern.split(":"))
        whole = n - n % size
        assert bool((matrix[:, :whole].unflatten(1, (-1, size)).sum(-1) == kept).all())
        assert bool(matrix[:, whole:].all())


STEPS: dict[str, Callable[..., object]] = {
    "gptq": lambda module, hessian, **options: gptq(module, hessian, 4, group_size=32, **options),
    "actorder": lambda module, hessian, **options: gptq(module, hessian, 3, actorder=True, **options),
    "sparsegpt": lambda module, hessian, **options: sparsegpt(module, hessian, 0.5, **options),
    "2:4": lambda module, hessian, **options: sparsegpt(module, hessian, 0.5, pattern="2:4", **options),
}
steps = pytest.mark.parametrize("step", STEPS)


def wide(dtype: torch.dtype = torch.float64, columns: int = 200, tokens: int = 400) -> tuple[nn.Module, Tensor]:
    """A linear layer and inputs of which neighbours are correlated."""
    generator = torch.Generator().manual_seed(3)
    module = nn.Linear(columns, 24, dtype=dtype)
    with torch.no_grad():
        module.weight.copy_(torch.randn(24, columns, generator=generator))
    x = torch.randn(tokens, columns, generator=generator, dtype=torch.float64).cumsum(1)
    return module, (x - x.mean(1, keepdim=True)).to(dtype)


def error(module: nn.Module, weight: Tensor, x: Tensor) -> float:
    """Mean squared, of the outputs, relative."""
    y = x.double() @ weight.double().T
    change = x.double() @ (module.weight.detach().double() - weight.double()).T
    return float(change.square().mean() / y.square().mean())


@steps
def test_equals_the_usual_sequence(step):
    """cholesky, cholesky_inverse, cholesky(upper=True), over a border of blocks and with dead inputs."""
    module, x = wide()
    x[:, [3, 77]] = 0
    twin, hessian = wide()[0], hessian_of(module, x)
    got, want = STEPS[step](module, hessian), STEPS[step](twin, hessian, inverse_factor=reference.three_calls)
    torch.testing.assert_close(module.weight, twin.weight, rtol=1e-9, atol=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(_tensors(got), _tensors(want), strict=True))


def _tensors(result: object) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


@steps
def test_dead_inputs_lose_their_weights(step):
    module, x = wide()
    x[:, [3, 77]] = 0
    STEPS[step](module, hessian_of(module, x))
    assert bool((module.weight[:, [3, 77]] == 0).all()) and bool((module.weight != 0).any(0).sum() == 198)


@pytest.mark.parametrize("step", ["gptq", "actorder"])
def test_the_block_size_changes_nothing_but_rounding(step):
    results = []
    for block_size in (1, 7, 128, 500):
        module, x = wide()
        STEPS[step](module, hessian_of(module, x), block_size=block_size)
        results.append(module.weight.detach())
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-9, atol=1e-12)


def test_the_scale_of_the_hessian_does_not_matter():
    for step in STEPS.values():
        module, x = wide()
        twin, hessian = wide()[0], hessian_of(module, x)
        step(module, hessian)
        step(twin, 1024 * hessian)
        torch.testing.assert_close(module.weight, twin.weight, rtol=1e-9, atol=1e-12)


def test_better_than_without_the_hessian():
    """Rounding to nearest; magnitudes; and 2:4 is better than dropping the smaller pair of each four."""
    for bits in (2, 3, 4):
        module, x = wide()
        weight, hessian = module.weight.detach().clone(), hessian_of(module, x)
        gptq(module, hessian, bits)
        ours = error(module, weight, x)
        module, _ = wide()
        round_to_nearest(module, bits)
        assert ours < 0.5 * error(module, weight, x)
    for pattern in ("unstructured", "2:4"):
        module, x = wide()
        sparsegpt(module, hessian, 0.5, pattern=pattern)
        ours = error(module, weight, x)
        by_size = weight.abs().unflatten(1, (-1, 4)) if pattern == "2:4" else weight.abs().view(-1)
        dropped = by_size.argsort(-1)[..., : by_size.shape[-1] // 2]
        kept = torch.ones_like(by_size).scatter_(-1, dropped, 0).view_as(weight)
        with torch.no_grad():
            module.weight.copy_(weight * kept)
        assert ours < 0.5 * error(module, weight, x)


@pytest.mark.parametrize("symmetric", [False, True])
def test_many_bits(symmetric):
    """Nothing but the last rounding is left: half a step of the grid for each weight and what the errors before send
    on, which is less than their U_ij / U_ii times that.
    """
    module, x = wide()
    weight, hessian = module.weight.detach().clone(), torch.eye(200, dtype=torch.float64)
    q = gptq(module, hessian, 16, symmetric=symmetric)
    off = (module.weight - weight).abs()
    assert bool((off <= (1.01 if symmetric else 0.501) * q.scale).all())  # symmetric: 2^bits - 1 is not reached
    module, _ = wide()
    gptq(module, hessian_of(module, x), 16, symmetric=symmetric)
    assert error(module, weight, x) < 1e-8


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [None, 1, 5, 300])
@pytest.mark.parametrize("kind", KINDS)
def test_round_to_nearest(kind, group_size, symmetric):
    module = layer(kind)
    before = weight_rows(module).flatten(0, 1)
    q = round_to_nearest(module, 3, group_size=group_size, symmetric=symmetric)
    n = before.shape[1]
    got, scale = weight_rows(module).flatten(0, 1), spread(q.scale, group_size, n)
    assert torch.equal(got, values(q, group_size))
    assert q.scale.shape == q.zero.shape == (len(before), -(-n // (group_size or n)))
    # Zero is rounded, so either end may be off by half a step more; symmetric: the upper one by a whole step.
    assert bool(((got - before).abs() <= (1 + 1e-9) * scale).all())
    inside = (q.codes > 0) & (q.codes < 7)
    assert bool(((got - before).abs() <= 0.5 * (1 + 1e-9) * scale)[inside].all())


def test_rows_of_zeros_stay():
    module, x = wide()
    with torch.no_grad():
        module.weight[3] = 0
    hessian = hessian_of(module, x)
    for symmetric in (False, True):
        gptq(module, hessian, 4, symmetric=symmetric)
        round_to_nearest(module, 4, symmetric=symmetric)
        assert bool((module.weight[3] == 0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@steps
def test_other_dtypes(step, dtype):
    """Computed in float32: as good as float64, and the weight keeps its dtype."""
    exact, x = wide()
    weight = exact.weight.detach().clone()
    STEPS[step](exact, hessian_of(exact, x))
    module, x = wide(dtype)
    hessian = hessian_of(module, x)
    STEPS[step](module, hessian)
    assert hessian.dtype == torch.float32 and module.weight.dtype == dtype
    assert error(module, weight, x) < 1.1 * error(exact, weight, x) + 4 * torch.finfo(dtype).eps ** 2


@pytest.mark.parametrize("step", ["gptq", "actorder", "2:4"])
def test_stacked_experts(step):
    """Each as if it were alone; one without tokens as if its inputs were uncorrelated."""
    weights, hessians = [], []
    for tokens in (300, 100, 0):
        module, x = wide(tokens=tokens)
        weights.append((1 + tokens) * module.weight.detach())
        hessians.append(2 * x.T @ x)
    stacked = nn.Parameter(torch.stack(weights))
    STEPS[step](stacked, torch.stack(hessians))
    hessians[-1] = torch.eye(200, dtype=torch.float64)
    for new, weight, hessian in zip(stacked, weights, hessians, strict=True):
        alone = nn.Parameter(weight.clone())
        STEPS[step](alone, hessian)
        assert torch.equal(new, alone) and not torch.equal(new, weight)


def test_what_is_zero_is_dropped_first():
    module, _ = wide()
    gone = torch.rand(module.weight.shape, generator=torch.Generator().manual_seed(0)) < 0.2
    with torch.no_grad():
        module.weight[gone] = 0
    eye = torch.eye(200, dtype=torch.float64)  # nothing answers
    mask = sparsegpt(module, eye, 0.5)
    assert not bool(mask[gone].any()) and int((~mask).sum()) == mask.numel() // 2


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"layer": nn.Tanh()}, TypeError, "layer: expected a linear or convolutional layer, or a parameter"),
        ({"layer": nn.Parameter(torch.ones(12))}, TypeError, "layer: expected a linear or convolutional layer, or a p"),
        ({"hessian": torch.eye(11)}, ValueError, r"hessian: expected shape \(12, 12\), got \(11, 11\)"),
        ({"hessian": torch.ones(12, 12, dtype=torch.int64)}, TypeError, "hessian: expected a floating tensor, got "),
        ({"hessian": None}, TypeError, "hessian: expected a floating tensor, got NoneType"),
        ({"hessian": -torch.eye(12)}, torch.linalg.LinAlgError, "cholesky_inverse_factor"),
        ({"hessian": torch.full((12, 12), float("nan"))}, torch.linalg.LinAlgError, "cholesky_inverse_factor"),
        ({"block_size": 0}, ValueError, "block_size: expected at least 1, got 0"),
        ({"bits": 1}, ValueError, "bits: expected 2 to 16, got 1"),
        ({"bits": 17}, ValueError, "bits: expected 2 to 16, got 17"),
        ({"group_size": 0}, ValueError, "group_size: expected at least 1, got 0"),
        ({"sparsity": 1.0}, ValueError, r"sparsity: expected a number in \[0, 1\), got 1.0"),
        ({"pattern": "1x4"}, ValueError, "pattern: expected 'unstructured', or 'n:m' with sparsity 1 - n/m, got '1x4'"),
        ({"pattern": "1:4"}, ValueError, "pattern: expected 'unstructured', or 'n:m' with sparsity 1 - n/m, got '1:4'"),
    ],
)
def test_errors_change_nothing(change, kind, message):
    own = {"gptq": ("bits", "group_size"), "sparsegpt": ("sparsity", "pattern")}
    for step in (gptq, sparsegpt):
        if not set(change) - {"layer", "hessian", "block_size", *own[step.__name__]}:
            module = layer("linear")
            before = module.weight.detach().clone()
            with pytest.raises(kind, match=f"^{message}"):
                step(**{"layer": module, "hessian": torch.eye(12), **change})
            assert torch.equal(module.weight, before)


def test_weights_that_cannot_be_changed():
    module, hessian = case("linear")
    with torch.no_grad():
        module.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"^layer: its weight: expected finite values, got NaN or infinity"):
        gptq(module, hessian)
    computed = nn.utils.parametrizations.weight_norm(layer("linear"))
    with pytest.raises(TypeError, match=r"^layer: expected its weight to be a parameter in floating point, got Tensor"):
        sparsegpt(computed, hessian)


def test_inputs_of_a_grouped_convolution_are_its_groups():
    """The error of each group's outputs is that of its own Hessian: (1/2) tr(dW H dW^T), a mean over tokens."""
    module, hessian = case("grouped")
    before = weight_rows(module)
    x = inputs("grouped", count=30)
    with torch.no_grad():
        y = module(x)
        gptq(module, hessian, 3)
        off = (module(x) - y).square().sum(1).mean()
    change = weight_rows(module) - before
    torch.testing.assert_close((change @ as_groups(hessian) * change).sum() / 2, off)
    assert rows(module, x).shape[0] == 2
