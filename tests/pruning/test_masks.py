"""Masks: they hold through training, and survive files and torch.nn.utils.prune."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

import mfac_kernels as mk
from mfac_kernels.pruning import Masks


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def masks() -> Masks:
    generator = torch.Generator().manual_seed(1)
    return Masks({"0.weight": torch.rand(5, 6, generator=generator) < 0.5, "2.weight": torch.ones(3, 5) > 0})


def test_a_mapping_with_sparsities():
    got = masks()
    assert list(got) == ["0.weight", "2.weight"] and len(got) == 2
    dropped = int((~got["0.weight"]).sum())
    assert got.sparsity == dropped / 45 and got.sparsities() == {"0.weight": dropped / 30, "2.weight": 0.0}
    assert Masks({}).sparsity == 0


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, 0.1),
    "lbfgs": lambda p: torch.optim.LBFGS(p),
}


@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_masks_hold(name, preconditioned):
    """Momentum from before, and updates that a preconditioner fills."""
    net = model()
    optimizer = OPTIMIZERS[name](net.parameters())
    kfac = mk.KFAC(net, damping=0.1, kl_clip=None) if preconditioned else None
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(2))

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = net(x).square().sum()
        value.backward()
        if kfac is not None:
            kfac.step()
        return value

    optimizer.step(closure)
    own = masks()
    with own.hold(net, optimizer) as held:
        assert bool((net[0].weight[~own["0.weight"]] == 0).all())
        before = net[0].weight.detach().clone()
        for _ in range(3):
            optimizer.step(closure)
            assert bool((net[0].weight[~own["0.weight"]] == 0).all())
        assert bool((net[0].weight != before)[own["0.weight"]].any())
        if kfac is None:
            assert bool((net[0].weight.grad[~own["0.weight"]] == 0).all())
    held.remove()  # once more does no harm
    optimizer.step(closure)
    assert bool((net[0].weight[~own["0.weight"]] != 0).any())


def test_what_is_dropped_need_not_be_finite():
    net, own = model(), masks()
    with torch.no_grad():
        net[0].weight[~own["0.weight"]] = float("nan")
    own.apply(net)
    assert bool((net[0].weight[~own["0.weight"]] == 0).all())


def test_torch_prune_there_and_back():
    net, own = model(), masks()
    x = torch.randn(4, 6)
    own.apply(net)
    want = net(x)
    own.to_torch(net)
    assert torch_prune.is_pruned(net)
    back = Masks.of(net)
    assert list(back) == list(own) and all(torch.equal(back[n], own[n]) for n in own)
    torch.testing.assert_close(net(x), want)
    for module in (net[0], net[2]):
        torch_prune.remove(module, "weight")
    assert not torch_prune.is_pruned(net) and Masks.of(net) == {}
    torch.testing.assert_close(net(x), want)
    assert all(torch.equal(net.get_parameter(n) == 0, ~own[n]) for n in own)
    torch_prune.l1_unstructured(net[2], "weight", 0.4)
    assert Masks.of(net).sparsity == pytest.approx(0.4)


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_files(suffix, tmp_path):
    if suffix == "safetensors" and not os.environ.get("CI"):  # where it has to be there
        pytest.importorskip("safetensors")
    own, path = masks(), tmp_path / f"masks.{suffix}"
    own.save(path)
    back = Masks.load(path)
    assert set(back) == set(own) and all(torch.equal(back[n], own[n]) for n in own)


def test_files_with_something_else(tmp_path):
    torch.save([1], tmp_path / "list.pt")
    with pytest.raises(ValueError, match=r"expected a dict of masks, got list"):
        Masks.load(tmp_path / "list.pt")
    torch.save({"a": torch.ones(2)}, tmp_path / "floats.pt")
    with pytest.raises(TypeError, match=r"^masks\['a'\]: expected a bool tensor, got torch.float32"):
        Masks.load(tmp_path / "floats.pt")


def test_masks_of_another_model():
    net, before = model(), model().state_dict()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    extra = torch.ones(2) > 0
    wrong = [
        (Masks({**masks(), "1.weight": extra}), "masks: expected parameters of the model, got '1.weight'"),
        (
            Masks({**masks(), "2.weight": extra}),
            r"masks\['2.weight'\]: expected shape \(3, 5\), got \(2,\)",
        ),
    ]
    for own, message in wrong:
        for call in (own.apply, own.to_torch, lambda m, own=own: own.hold(m, optimizer)):
            with pytest.raises(ValueError, match=f"^{message}"):
                call(net)
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), before.values(), strict=True))
