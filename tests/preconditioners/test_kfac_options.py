"""The options of KFAC: kinds of convolutions, groups, averages, clipping, frequencies."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from kfac_cases import F64, kfac, mse, network, run, seeded
from torch import nn

import mfac_kernels as mk

CONVS = {
    "dilation": nn.Conv2d(4, 6, 3, dilation=2, padding=2),
    "same": nn.Conv2d(4, 6, (3, 2), padding="same"),
    "groups": nn.Conv2d(4, 6, 3, groups=2, stride=2),
    "depthwise": nn.Conv2d(4, 4, 3, groups=4, padding=1),
    "circular": nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
}


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize("name", CONVS)
def test_convolutions_of_all_kinds(name, approximation):
    """Against patches found by autograd."""
    module = copy.deepcopy(CONVS[name])
    net = nn.Sequential(module).double()
    x = seeded(3, 4, 6, 5)
    p = kfac(net, approximation=approximation)
    output = net(x)
    target = seeded(*output.shape, seed=8)
    net.zero_grad()
    mse(output, target).backward()
    p.step()
    # Patches by autograd: the weight's gradient of one output pixel is the patch that it sees.
    n, positions = len(x), output[0, 0].numel()
    g = (output - target).detach().flatten(2)
    a, b = p.fisher.factors(0)
    groups, per_group = module.groups, module.out_channels // module.groups
    for group in range(groups):
        rows = torch.empty(n, positions, a.shape[-1], dtype=F64)
        channel = group * per_group
        for i in range(n):
            for s in range(positions):
                pixel = net(x[i : i + 1]).flatten(2)[0, channel, s]
                weight, bias = torch.autograd.grad(pixel, (module.weight, module.bias))
                rows[i, s] = torch.cat([weight[channel].flatten(), bias[channel : channel + 1]])
        outputs = g[:, channel : channel + per_group].transpose(1, 2)
        if approximation == "reduce":
            summed, mean = rows.sum(1), outputs.mean(1)
            want_a, want_b = summed.mT @ summed / n, mean.mT @ mean / n
        else:
            flat, pixels = rows.flatten(0, 1), outputs.flatten(0, 1)
            want_a, want_b = flat.mT @ flat / n, pixels.mT @ pixels / (n * positions)
        torch.testing.assert_close(a[group], want_a, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(b[group], want_b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_convolutions_of_all_dimensions(dims):
    kind = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
    net = network(kind(2, 3, 2, padding=1), nn.Flatten(), nn.Linear(3 * 4**dims, 2))
    x = seeded(4, 2, *[3] * dims)
    p = kfac(net)
    run(net, p, x)
    assert all(bool(q.grad.isfinite().all()) for q in net.parameters())
    assert p.diagnostics()["seen"] == 1


def test_groups_of_one_and_one_group():
    x, target = seeded(8, 6), seeded(8, 4, seed=3)
    results = {}
    for size in (None, 100, (7, 4), 1):
        net = network(nn.Linear(6, 4))
        p = kfac(net, group_size=size)
        run(net, p, x, lambda y: mse(y, target))
        results[size] = (net[0].weight.grad.clone(), p.fisher.factors(0))
    for size in (100, (7, 4)):
        torch.testing.assert_close(results[size][0], results[None][0], rtol=1e-12, atol=0)
    (a, b), (ones_a, ones_b) = results[None][1], results[1][1]
    torch.testing.assert_close(ones_a.flatten(), a[0].diagonal(), rtol=1e-12, atol=0)
    torch.testing.assert_close(ones_b.flatten(), b[0].diagonal(), rtol=1e-12, atol=0)


def test_gradient_accumulation_equals_the_big_batch():
    x, target = seeded(8, 2, 5, 5), seeded(8, 3, 3, 3, seed=1)
    results = []
    for parts in (1, 4):
        net = network(nn.Conv2d(2, 3, 3))
        p = kfac(net, accumulation_steps=parts)
        for chunk, goal in zip(x.chunk(parts), target.chunk(parts), strict=True):
            (mse(net(chunk), goal) / parts).backward()
        p.step()
        results.append([*p.fisher.factors(0), *(q.grad for q in net.parameters())])
    for big, small in zip(*results, strict=True):
        torch.testing.assert_close(big, small, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("loss_average", ["sum", "positions"])
def test_loss_averages(loss_average):
    """The sum over samples has the factors of the mean; tokens that are averaged are samples."""
    x, target = seeded(4, 5, 3), seeded(4, 5, 2, seed=1)
    net = network(nn.Linear(3, 2))
    p = kfac(net, loss_average=loss_average)
    error = 0.5 * (net(x) - target).square()
    (error.sum() if loss_average == "sum" else error.sum(-1).mean()).backward()
    p.step()
    flat = network(nn.Linear(3, 2))
    q = kfac(flat)
    if loss_average == "positions":
        x, target = x.flatten(0, 1), target.flatten(0, 1)
    run(flat, q, x, lambda y: mse(y, target))
    for got, want in zip(p.fisher.factors(0), q.fisher.factors(0), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


def test_kl_clip_scales_the_update():
    x, target = seeded(8, 6), seeded(8, 4, seed=3)
    updates = []
    for clip in (None, 1e-3, 1e6):
        net = network(nn.Linear(6, 4))
        p = mk.KFAC(net, 1e-2, kl_clip=clip, lr=0.5)
        net.zero_grad()
        mse(net(x), target).backward()
        before = net[0].weight.grad.clone(), net[0].bias.grad.clone()
        p.step()
        updates.append((net[0].weight.grad.clone(), net[0].bias.grad.clone()))
    free, clipped, loose = updates
    product = sum(float((u * g).sum()) for u, g in zip(free, before, strict=True))
    nu = math.sqrt(1e-3 / (0.25 * product))
    assert nu < 1
    torch.testing.assert_close(clipped[0], nu * free[0], rtol=1e-10, atol=0)
    torch.testing.assert_close(loose[0], free[0], rtol=1e-12, atol=0)


def test_update_frequencies():
    net = network(nn.Linear(3, 2))
    p = kfac(net, factor_update_steps=2, inv_update_steps=4)
    seen, inverses = [], []
    for step in range(6):
        run(net, p, seeded(4, 3, seed=step))
        seen.append(p.fisher.seen)
        inverses.append(p.fisher.inverse(0))
    assert seen == [1, 1, 2, 2, 3, 3]
    changed = [not torch.equal(a, b) for a, b in itertools.pairwise(inverses)]
    assert changed == [False, False, False, True, False]


def test_hyperparameters_may_be_functions_of_the_step():
    net = network(nn.Linear(3, 2))
    p = mk.KFAC(
        net, lambda step: 1.0 / (1 + step), factor_decay=lambda step: 0.5, kl_clip=lambda step: 1.0, lr=lambda step: 0.1
    )
    for step in range(3):
        run(net, p, seeded(4, 3, seed=step))
    assert p.fisher.damping == pytest.approx(1 / 3)
    p.damping = lambda step: -1.0
    before = copy.deepcopy(p.state_dict())
    with pytest.raises(ValueError, match=r"damping: expected a positive number, got -1\.0"):
        p.step()
    assert p.steps == before["steps"]
