"""obs_prune against dense inverses in float64: which weights go, and where the others move."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import mfac_kernels as mk
from mfac_kernels.pruning import obs_prune, patterns
from mfac_kernels.reference import pruning as reference
from mfac_kernels.reference.static import constrained_minimum
from mfac_kernels.reference.window import fisher as dense_fisher

DAMPING = 0.1


def problem(m: int, d: int, block_size: int | None, seed: int) -> tuple[Tensor, mk.StaticFisher, Tensor]:
    """Weights, their Fisher, and the same Fisher dense."""
    generator = torch.Generator().manual_seed(seed)
    g = torch.randn(m, d, generator=generator, dtype=torch.float64)
    w = torch.randn(d, generator=generator, dtype=torch.float64)
    fisher = dense_fisher(g, DAMPING, m)
    block = torch.arange(d) // (block_size or d)
    return w, mk.StaticFisher(g, DAMPING, block_size=block_size), fisher * (block[:, None] == block)


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm()) / (float(want.norm()) or 1.0)


shapes = st.tuples(st.integers(1, 9), st.integers(1, 24), st.integers(1, 30), st.integers(0, 2**31))
# m eps cond: |g|^2 / (m DAMPING) is below 10 d
TOLERANCE = 1e-11


@given(shapes, st.floats(0, 0.99), st.booleans())
def test_single_weights(shape, sparsity, joint):
    """rho = w^2 / (2 [F^-1]_ii); the update is the sum over the dropped, or the minimum under all constraints."""
    w, static, fisher = problem(*shape)
    inverse = torch.linalg.inv(fisher)
    new, mask = obs_prune(w, static, sparsity, joint=joint)
    count = round(sparsity * len(w))
    costs = torch.tensor([reference.cost(w, inverse, [i]) for i in range(len(w))])
    dropped = costs.argsort(stable=True)[:count]
    assert mask.dtype == torch.bool and sorted((~mask).nonzero()[:, 0].tolist()) == sorted(dropped.tolist())
    assert bool((new[~mask] == 0).all()) and new.dtype == w.dtype
    assert error(new, reference.pruned(w, inverse, [[i] for i in dropped.tolist()], joint=joint)) <= TOLERANCE
    if joint:
        assert error(new - w, constrained_minimum(fisher, -w, ~mask)) <= TOLERANCE


@given(shapes, st.floats(0, 0.99), st.integers(2, 6), st.booleans())
def test_groups(shape, sparsity, size, joint):
    """Ragged last groups; groups that a border between blocks cuts."""
    w, static, fisher = problem(*shape)
    inverse = torch.linalg.inv(fisher)
    new, mask = obs_prune(w, static, sparsity, joint=joint, pattern="block", group_size=size)
    groups = [list(range(i, min(i + size, len(w)))) for i in range(0, len(w), size)]
    order = sorted(groups, key=lambda g: reference.cost(w, inverse, g) / len(g))
    dropped, target = [], round(sparsity * len(w))
    for group in order:
        if sum(map(len, dropped)) + len(group) > target:
            break
        dropped.append(group)
    want = torch.ones(len(w), dtype=torch.bool)
    want[[i for group in dropped for i in group]] = False
    assert torch.equal(mask, want)
    assert error(new, reference.pruned(w, inverse, dropped, joint=joint)) <= TOLERANCE


@given(shapes, st.sampled_from(["2:4", "1:4", "1:2", "4:6"]), st.booleans())
def test_the_best_subset_of_every_group(shape, pattern, joint):
    """2:4: of every four the best pair of six."""
    w, static, fisher = problem(*shape)
    inverse = torch.linalg.inv(fisher)
    kept, size = map(int, pattern.split(":"))
    new, mask = obs_prune(w, static, 1 - kept / size, joint=joint, pattern=pattern)
    groups = [list(range(i, i + size)) for i in range(0, len(w) - size + 1, size)]
    dropped = [reference.best_subset(w, inverse, group, size - kept) for group in groups]
    dropped = dropped[: round((1 - kept / size) * len(w)) // (size - kept)]
    want = torch.ones(len(w), dtype=torch.bool)
    want[[i for subset in dropped for i in subset]] = False
    assert torch.equal(mask, want)
    assert error(new, reference.pruned(w, inverse, dropped, joint=joint)) <= TOLERANCE


def test_half_of_2_to_4_takes_the_cheapest_fours():
    w, static, fisher = problem(6, 40, None, 0)
    inverse = torch.linalg.inv(fisher)
    _, mask = obs_prune(w, static, 0.25, pattern="2:4")
    pairs = [reference.best_subset(w, inverse, range(i, i + 4), 2) for i in range(0, 40, 4)]
    pairs = sorted(pairs, key=lambda pair: reference.cost(w, inverse, pair))[:5]
    assert sorted((~mask).nonzero()[:, 0].tolist()) == sorted(i for pair in pairs for i in pair)


@given(shapes, st.sampled_from(["unstructured", "1x4", "2:4", "block"]), st.booleans())
def test_dropped_weights_stay_dropped(shape, pattern, joint):
    """In two steps, with the gradients of what is dropped masked: a Fisher of the weights that are left."""
    m, d, block_size, seed = shape
    w, static, _ = problem(*shape)
    new, mask = obs_prune(w, static, 0.3, joint=joint, pattern=pattern)
    g = torch.randn(m, d, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64) * mask
    again = mk.StaticFisher(g, DAMPING, block_size=block_size)
    newer, smaller = obs_prune(new, again, 0.5, joint=joint, pattern=pattern, mask=mask)
    assert not bool((smaller & ~mask).any())
    assert bool((newer[~smaller] == 0).all())
    assert int((~smaller).sum()) <= round(0.5 * d)
    if pattern == "unstructured":
        assert int((~smaller).sum()) == round(0.5 * d)
        left = mask.nonzero()[:, 0]
        fisher = dense_fisher(g, DAMPING, m)
        block = torch.arange(d) // block_size
        inverse = torch.linalg.inv((fisher * (block[:, None] == block))[left][:, left])
        gone = [[i] for i, at in enumerate(left.tolist()) if not smaller[at]]
        assert error(newer[left], reference.pruned(new[left], inverse, gone, joint=joint)) <= TOLERANCE
    if pattern == "2:4":
        assert int((~smaller)[: d - d % 4].view(-1, 4).sum(1).max() if d >= 4 else 0) <= 2


def test_a_half_dropped_four_completes_its_pair():
    """The pair then has the weight that is dropped already, and costs what the other one costs."""
    w, _, _ = problem(5, 4, None, 3)
    mask = torch.tensor([True, False, True, True])
    g = torch.randn(5, 4, generator=torch.Generator().manual_seed(4), dtype=torch.float64) * mask
    inverse = torch.linalg.inv(dense_fisher(g, DAMPING, 5))
    w[1] = 0
    new, smaller = obs_prune(w, mk.StaticFisher(g, DAMPING), 0.5, pattern="2:4", mask=mask)
    best = min((0, 2, 3), key=lambda i: reference.cost(w, inverse, [i]))
    assert (~smaller).nonzero()[:, 0].tolist() == sorted([1, best])
    assert error(new, reference.pruned(w, inverse, [[best]], joint=False)) <= TOLERANCE


def test_no_four_loses_three_where_weights_are_zero():
    """All pairs that can be dropped cost nothing: still the one with what is dropped already."""
    mask = torch.tensor([True, True, False, True])
    static = mk.StaticFisher(torch.ones(1, 4) * mask, DAMPING)
    _, smaller = obs_prune(torch.tensor([0.0, 0.0, 0.0, 1.0]), static, 0.5, pattern="2:4", mask=mask)
    assert smaller.tolist() == [False, True, False, True]


def test_layers_have_a_threshold_each():
    w, static, _ = problem(8, 60, None, 5)
    w[:20] *= 100
    _, everywhere = obs_prune(w, static, 0.5)
    _, mask = obs_prune(w, static, 0.5, layers=[20, 10, 30])
    assert int((~everywhere[:20]).sum()) < 5
    assert [int((~part).sum()) for part in mask.split([20, 10, 30])] == [10, 5, 15]
    _, fours = obs_prune(w, static, 0.5, layers=[21, 39], pattern="2:4")
    assert bool(fours[20]) and bool(fours[57:].all())  # no group crosses a border


def test_the_joint_update_costs_least():
    """By the quadratic itself: joint is below the sum of single updates, which is below no update."""
    w, static, fisher = problem(30, 50, None, 6)
    results = {joint: obs_prune(w, static, 0.6, joint=joint) for joint in (False, True)}
    assert torch.equal(results[False][1], results[True][1])
    cost = {joint: float((new - w) @ fisher @ (new - w)) for joint, (new, _) in results.items()}
    zeroed = torch.where(results[True][1], 0, -w)
    assert cost[True] < cost[False] < float(zeroed @ fisher @ zeroed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "1x4"])
def test_narrow_weights(dtype, pattern, device, gradients):
    g = gradients(12, 64, norm=3.0).float()
    w = gradients(1, 64, seed=1)[0].to(dtype)
    static = mk.StaticFisher(g.to(device), DAMPING)
    new, mask = obs_prune(w.to(device), static, 0.5, joint=True, pattern=pattern)
    want, same = obs_prune(w.double(), mk.StaticFisher(g.double(), DAMPING), 0.5, joint=True, pattern=pattern)
    assert new.dtype == dtype and torch.equal(mask.cpu(), same)
    assert error(new.cpu(), want) <= torch.finfo(dtype).eps
    assert torch.equal(new.cpu() == 0, ~same)


def test_pages_of_groups_change_nothing(monkeypatch):
    w, static, _ = problem(6, 61, 16, 7)
    for pattern in ("2:4", "1x4", "block"):
        whole = obs_prune(w, static, 0.4, pattern=pattern)
        with monkeypatch.context() as patch:
            patch.setattr("mfac_kernels.pruning.obs._PAGE_ELEMENTS", 100)
            for got, want in zip(obs_prune(w, static, 0.4, pattern=pattern), whole, strict=True):
                assert torch.equal(got, want)


def test_groups_of_matrices_do_not_cross_rows():
    assert patterns.parse("1x4").groups([(2, 5), (1, 2)]).tolist() == [
        [0, 1, 2, 3],
        [4, -1, -1, -1],
        [5, 6, 7, 8],
        [9, -1, -1, -1],
        [10, 11, -1, -1],
    ]
    assert patterns.parse("2:4").groups([(2, 5), (1, 2)]).tolist() == [[0, 1, 2, 3], [5, 6, 7, 8]]
    assert patterns.parse("unstructured").groups([(2, 2)]).tolist() == [[0], [1], [2], [3]]
    assert patterns.parse("block", 3).groups([]).shape == (0, 3)


W = torch.ones(6)
ROWS = [
    ({"weights": W[:5]}, ValueError, r"weights: expected shape \(6,\), got \(5,\)"),
    ({"weights": W / 0}, ValueError, "weights: expected finite values"),
    ({"weights": None}, TypeError, r"weights: expected a tensor of shape \(6,\), got NoneType"),
    ({"sparsity": 1.0}, ValueError, r"sparsity: expected a number in \[0, 1\), got 1.0"),
    ({"sparsity": -0.1}, ValueError, r"sparsity: expected a number in \[0, 1\), got -0.1"),
    ({"sparsity": math.nan}, ValueError, r"sparsity: expected a number in \[0, 1\), got nan"),
    ({"sparsity": "0.5"}, TypeError, "sparsity: expected a number, got '0.5'"),
    ({"sparsity": 0.6, "pattern": "2:4"}, ValueError, "sparsity: expected a number at most 0.5 with this pattern, got"),
    ({"pattern": "4:2"}, ValueError, "pattern: expected 'unstructured', .*, got '4:2'"),
    ({"pattern": "10:20"}, ValueError, "pattern: expected .* at most 256 ways to choose n of m, got '10:20'"),
    ({"pattern": None}, ValueError, "pattern: expected .*, got None"),
    ({"pattern": "1x4", "group_size": 4}, ValueError, "group_size: expected None with pattern '1x4', got 4"),
    ({"pattern": "block", "group_size": 0}, ValueError, "group_size: expected at least 1, got 0"),
    ({"layers": [3, 4]}, ValueError, "layers: expected sizes that sum to 6, got 7"),
    ({"layers": [6, 0]}, ValueError, "layers: expected at least 1, got 0"),
    ({"mask": W}, TypeError, "mask: expected a bool tensor, got torch.float32"),
    ({"mask": W[:5] > 0}, ValueError, r"mask: expected shape \(6,\) on cpu, got \(5,\) on cpu"),
    ({"mask": W < 0}, ValueError, "sparsity: expected at least what is dropped already, 1, got 0.5"),
]


@pytest.mark.parametrize(("change", "kind", "message"), ROWS, ids=[row[2] for row in ROWS])
def test_a_bad_argument(change, kind, message, gradients):
    static = mk.StaticFisher(gradients(3, 6).float(), DAMPING)
    arguments = {"weights": W, "fisher": static, "sparsity": 0.5, **change}
    with pytest.raises(kind, match=f"^{message}"):
        obs_prune(**arguments)


def test_the_schedule():
    """The share kept falls by the same factor each time, and the last sparsity is the target, exactly."""
    got = mk.pruning.sparsities(0.8, 16)
    assert len(got) == 16 and got[-1] == 0.8
    kept = [1.0, *(1 - s for s in got)]
    assert all(math.isclose(b / a, 0.2 ** (1 / 16), rel_tol=1e-12) for a, b in itertools.pairwise(kept))
    assert mk.pruning.sparsities(0.8, 1, 0.5) == [0.8]
    assert mk.pruning.sparsities(0.75, 2, 0.0)[0] == 0.5
    for arguments in ((0.5, 0, 0.0), (0.5, 3, 0.6), (1.0, 3, 0.0)):
        with pytest.raises(ValueError, match=r"^(steps|target): expected"):
            mk.pruning.sparsities(*arguments)
