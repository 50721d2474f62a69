"""prune(model): the schedule over obs_prune, exclusions, masks that continue, dry runs, interruptions."""

from __future__ import annotations

import pruning_cases
import pytest
import torch
from pruning_cases import loss
from torch import Tensor, nn

import mfac_kernels as mk
from mfac_kernels.pruning import collect, obs_prune, prune


def network() -> nn.Module:
    return pruning_cases.network(channels=4, classes=5)


PRUNABLE = ["0.weight", "4.weight"]


def batches(count: int = 3, size: int = 8) -> list[tuple[Tensor, Tensor]]:
    return pruning_cases.batches(count, size, classes=5)


def flat(model: nn.Module) -> Tensor:
    return torch.cat([model.get_parameter(name).detach().reshape(-1) for name in PRUNABLE])


def state(model: nn.Module) -> list[Tensor]:
    return [value.clone() for value in model.state_dict().values()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("each", ["batch", "sample"])
@pytest.mark.parametrize("block_size", [None, 20])
def test_every_step_is_obs_prune_with_fresh_gradients(block_size, each, joint):
    """Gradients at the weights of that step, of those that are left."""
    model, twin = network(), network()
    options = {"ngrads": 20, "each": each, "joint": joint, "block_size": block_size, "recomputations": 3}
    result = prune(model, 0.7, loss, batches(), damping=0.01, **options)
    mask = torch.ones(36 + 80, dtype=torch.bool)
    for sparsity in mk.pruning.sparsities(0.7, 3):
        parts = dict(zip(PRUNABLE, mask.split([36, 80]), strict=True))
        masks = {name: part.view(twin.get_parameter(name).shape) for name, part in parts.items()}
        rows = collect(twin, loss, batches(), 20, each=each, names=PRUNABLE, masks=masks).rows
        fisher = mk.StaticFisher(rows, 0.01, block_size=block_size)
        left = round(sparsity * 116) - int((~mask).sum())
        moved, kept = obs_prune(flat(twin)[mask], fisher, left / rows.shape[1], joint=joint)
        new = torch.zeros(116)
        new[mask] = moved
        mask = mask.masked_scatter(mask, kept)
        with torch.no_grad():
            for name, part in zip(PRUNABLE, new.split([36, 80]), strict=True):
                twin.get_parameter(name).copy_(part.view(twin.get_parameter(name).shape))
    assert same(state(model), state(twin))
    assert list(result.masks) == PRUNABLE
    assert torch.equal(torch.cat([m.view(-1) for m in result.masks.values()]), mask)
    assert torch.equal(flat(model) != 0, mask)
    assert [step.gradients for step in result.steps] == [3 if each == "batch" else 20] * 3
    assert result.masks.sparsity == result.steps[-1].sparsity == pytest.approx(0.7, abs=1 / 116)


def test_only_what_may_be_pruned_changes():
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model[4].bias.requires_grad_(False)
    result = prune(model, 0.5, loss, batches(), exclude=["4.*"], recomputations=2)
    assert list(result.masks) == ["0.weight"] and result.masks.sparsity == 0.5
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == (name != "0.weight")


def test_no_gradients_is_magnitude():
    model = network()
    weights = flat(model)
    result = prune(model, 0.5, loss, [], ngrads=0, recomputations=3)
    kept = weights.abs() > weights.abs().sort().values[57]
    assert torch.equal(flat(model), torch.where(kept, weights, 0))
    assert result.steps[-1].gradients == 0


def test_blocks_of_one_are_the_diagonal_fisher():
    model = network()
    weights, rows = flat(model), collect(network(), loss, batches(), 3, names=PRUNABLE).rows
    prune(model, 0.5, loss, batches(), block_size=1, recomputations=1, damping=1e-3)
    costs = weights.square() * (1e-3 + rows.square().mean(0)) / 2
    assert torch.equal(flat(model), torch.where(costs > costs.sort().values[57], weights, 0))


def test_given_gradients_are_those_of_the_first_step():
    want, got = network(), network()
    prune(want, 0.5, loss, batches(), recomputations=2)
    gradients = collect(got, loss, batches(), 256, names=PRUNABLE)
    prune(got, 0.5, loss, batches(), recomputations=2, gradients=gradients)
    assert same(state(got), state(want))
    again = network()
    prune(again, 0.5, loss, [], recomputations=1, gradients=gradients)


def test_layers_and_patterns():
    model = network()
    result = prune(model, 0.5, loss, batches(), scope="layer", recomputations=2)
    assert result.masks.sparsities() == {"0.weight": 0.5, "4.weight": 0.5}
    model = network()
    fours = prune(model, 0.5, loss, batches(), pattern="2:4", recomputations=2).masks
    assert bool((fours["4.weight"].view(-1, 4).sum(1) == 2).all())
    rows = fours["0.weight"].view(4, 9)  # two fours and one weight over, which stays
    assert bool((rows[:, :8].reshape(-1, 4).sum(1) == 2).all()) and bool(rows[:, 8].all())
    together = prune(network(), 0.5, loss, batches(), pattern="1x4", recomputations=2).masks
    assert set(together["4.weight"].view(-1, 4).sum(1).tolist()) <= {0, 4}


def test_masks_go_on():
    model = network()
    first = prune(model, 0.4, loss, batches(), recomputations=2)
    second = prune(model, 0.6, loss, batches(), recomputations=2, masks=first.masks)
    assert all(not bool((second.masks[n] & ~first.masks[n]).any()) for n in PRUNABLE)
    assert second.masks.sparsity == pytest.approx(0.6, abs=1 / 116)
    assert second.steps[0].sparsity == pytest.approx(1 - (0.6 * 0.4) ** 0.5, abs=2 / 116)
    with pytest.raises(ValueError, match=r"^sparsity: expected at least what is dropped already"):
        prune(model, 0.3, loss, batches(), masks=second.masks)


def test_a_dry_run_changes_nothing():
    model = network()
    before = state(model)
    called = []
    dry = prune(model, 0.6, loss, batches(), dry_run=True, after_step=called.append)
    assert same(state(model), before) and not called and len(dry.steps) == 1
    real = prune(model, 0.6, loss, batches(), recomputations=1)
    assert all(torch.equal(dry.masks[n], real.masks[n]) for n in PRUNABLE)
    assert dry.steps[0].cost == real.steps[0].cost > 0


def test_after_every_step():
    model = network()
    loader = [batch[0] for batch in batches()]
    seen = []

    def statistics(pruned: nn.Module) -> None:
        seen.append(float((flat(pruned) == 0).float().mean()))
        torch.optim.swa_utils.update_bn(loader, pruned)

    before = model[1].running_mean.clone()
    result = prune(model, 0.6, loss, batches(), recomputations=3, after_step=statistics)
    assert seen == pytest.approx([step.sparsity for step in result.steps])
    assert not torch.equal(model[1].running_mean, before) and not model.training


class Interrupted(Exception):
    pass


def test_after_an_error_the_model_is_as_it_was():
    model = network()
    before = state(model)

    def fail(pruned: nn.Module) -> None:
        pruned[1].running_mean.add_(1)
        if float((flat(pruned) == 0).float().mean()) > 0.5:
            raise Interrupted

    with pytest.raises(Interrupted):
        prune(model, 0.8, loss, batches(), recomputations=4, after_step=fail)
    assert same(state(model), before)


@pytest.mark.parametrize("place", ["collecting", "between"])
def test_an_interrupted_call_goes_on(place, tmp_path):
    want = network()
    record = prune(want, 0.8, loss, batches(), recomputations=4)
    calls = []

    def fragile(model: nn.Module, batch: list[Tensor]) -> Tensor:
        calls.append(1)
        if len(calls) == (8 if place == "collecting" else 7):  # the third step's second, or first, of three
            raise Interrupted
        return loss(model, batch)

    model = network()
    with pytest.raises(Interrupted):
        prune(model, 0.8, fragile, batches(), recomputations=4, path=tmp_path)
    again = network()
    got = prune(again, 0.8, fragile, batches(), recomputations=4, path=tmp_path)
    assert len(calls) == 13  # twelve batches, and the one that failed
    assert same(state(again), state(want))
    assert all(torch.equal(got.masks[n], record.masks[n]) for n in PRUNABLE)
    assert [s.sparsity for s in got.steps] == [s.sparsity for s in record.steps]
    with pytest.raises(ValueError, match=r"^path: expected a schedule of"):
        prune(network(), 0.7, loss, batches(), path=tmp_path)


ROWS = [
    ({"sparsity": 1.5}, ValueError, r"sparsity: expected a number in \[0, 1\), got 1.5"),
    ({"recomputations": 0}, ValueError, "recomputations: expected at least 1, got 0"),
    ({"scope": "row"}, ValueError, "scope: expected 'global' or 'layer', got 'row'"),
    ({"exclude": "4.weight"}, TypeError, "exclude: expected a sequence of names, got the string '4.weight'"),
    ({"exclude": ["fc*"]}, ValueError, r"exclude: expected patterns that fit prunable parameters, got 'fc\*'"),
    ({"exclude": ["*"]}, ValueError, "model: expected parameters of two or more dimensions"),
    ({"masks": {"4.bias": torch.ones(5) > 0}}, ValueError, "masks: expected prunable parameters, got '4.bias'"),
    ({"masks": {"4.weight": torch.ones(5) > 0}}, ValueError, r"masks\['4.weight'\]: expected shape \(5, 16\)"),
    ({"damping": 0}, ValueError, "damping: expected a positive finite number, got 0"),
    ({"ngrads": -1}, ValueError, "ngrads: expected at least 1, got -1"),
    ({"gradients": collect(network(), loss, batches(), 1)}, ValueError, "gradients: expected those of"),
]


@pytest.mark.parametrize(("change", "kind", "message"), ROWS, ids=[row[2] for row in ROWS])
def test_a_bad_argument(change, kind, message):
    model = network()
    before = state(model)
    arguments = {"model": model, "sparsity": 0.5, "loss": loss, "batches": batches(), **change}
    with pytest.raises(kind, match=f"^{message}"):
        prune(**arguments)
    assert same(state(model), before)
