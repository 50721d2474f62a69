"""KFAC under autocast and loss scaling, and batches that are not finite."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from kfac_cases import F64, kfac, mse, network, run, seeded
from torch import Tensor, nn

import mfac_kernels as mk


def test_autocast_gives_float32_factors():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 4))
    p = kfac(net)
    x = torch.randn(6, 3, 4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = net(x).square().mean()
    loss.backward()
    p.step()
    for layer in range(2):
        assert all(f.dtype == torch.float32 for f in p.fisher.factors(layer))
    patches = F.pad(F.unfold(x.bfloat16().float(), 3, padding=1).transpose(1, 2), (0, 1), value=1.0).flatten(0, 1)
    torch.testing.assert_close(p.fisher.factors(0)[0][0], patches.mT @ patches / 6, rtol=2e-2, atol=2e-2)


def test_grad_scaler():
    """The scale does not show in the factors; a batch that overflows changes nothing."""
    results = []
    for scaled in (False, True):
        net = network(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).float()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        p = mk.KFAC(net, 1e-2, scaler=scaler)
        for step in range(3):
            optimizer.zero_grad()
            loss = mse(net(seeded(5, 3, seed=step, dtype=torch.float32)), torch.ones(5, 2))
            scaler.scale(loss).backward()
            if scaled and step == 1:  # once more, with an overflow
                kept = copy.deepcopy(p.state_dict()["fisher"])
                optimizer.zero_grad()
                bad = mse(net(seeded(5, 3, seed=step, dtype=torch.float32)), torch.ones(5, 2)) * float("inf")
                scaler.scale(bad).backward()
                scaler.unscale_(optimizer)
                weights = [q.clone() for q in net.parameters()]
                p.step()
                scaler.step(optimizer)
                scaler.update()
                for mine, theirs in zip(p.state_dict()["fisher"]["stacks"], kept["stacks"], strict=True):
                    assert all(torch.equal(mine[k], theirs[k]) for k in mine)
                assert all(torch.equal(a, b) for a, b in zip(weights, net.parameters(), strict=True))
                assert p.fisher.skipped == 1
                optimizer.zero_grad()
                loss = mse(net(seeded(5, 3, seed=step, dtype=torch.float32)), torch.ones(5, 2))
                scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            p.step()
            scaler.step(optimizer)
            scaler.update()
        results.append([*p.fisher.factors(0), *net.parameters()])
    for plain, scaled in zip(*results, strict=True):
        torch.testing.assert_close(scaled, plain, rtol=1e-5, atol=1e-6)


def test_a_loss_scale_that_changes_does_not_show_in_any_block():
    x = seeded(5, 3, dtype=torch.float32)

    def blocks(scales: list[float]) -> list[Tensor]:
        net = network(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)).float()
        scaler = torch.amp.GradScaler("cpu", enabled=True)
        p = kfac(net, scaler=scaler)
        for scale in scales:
            scaler._scale = torch.tensor(scale)
            net.zero_grad()
            scaler.scale(mse(net(x), torch.ones(5, 2))).backward()
            p.step()
        return [torch.kron(b, a) for i in range(3) for a, b in zip(*p.fisher.factors(i), strict=False)]

    for changing, constant in zip(blocks([65536.0, 1024.0, 1.0]), blocks([1.0] * 3), strict=True):
        torch.testing.assert_close(changing, constant, rtol=1e-5, atol=1e-7)


def test_what_has_seen_no_batch_keeps_its_gradient():
    """The first batch overflows, and the inverses are not renewed at once."""
    for options in ({}, {"damping_style": "exact"}):
        net = network(nn.Linear(3, 2))
        p = kfac(net, inv_update_steps=5, **options)
        run(net, p, torch.full((4, 3), float("nan"), dtype=F64))
        net.zero_grad()
        mse(net(seeded(4, 3)), torch.zeros(4, 2)).backward()
        gradient = net[0].weight.grad.clone()
        p.step()
        torch.testing.assert_close(net[0].weight.grad, gradient)


@pytest.mark.parametrize("options", [{}, {"damping_style": "exact", "eigen_correction": True, "inv_update_steps": 5}])
def test_a_bad_batch_without_a_scaler_is_skipped(options):
    net = network(nn.Linear(3, 2))
    p = kfac(net, **options)
    run(net, p, seeded(4, 3))
    kept = copy.deepcopy(p.state_dict()["fisher"])
    x = seeded(4, 3)
    x[0, 0] = float("nan")
    run(net, p, x)
    for mine, theirs in zip(p.state_dict()["fisher"]["stacks"], kept["stacks"], strict=True):
        assert all(torch.equal(mine[k], theirs[k]) for k in mine)
    for mine, theirs in zip(p.fisher.state_dict()["inverses"].values(), kept["inverses"].values(), strict=True):
        assert all(map(torch.equal, mine, theirs))
    assert p.diagnostics()["skipped"] == 1
    assert bool(net[0].weight.grad.isnan().any()), "nothing is hidden"
