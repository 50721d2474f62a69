"""MFAC beside an optimizer, in every situation a training loop meets."""

from __future__ import annotations

import copy

import pytest
import torch
from mfac_cases import BOTH, assert_equal, backward, batches, flat, grads, mlp, tensors, train
from torch import nn

import mfac_kernels as mk


def test_accumulated_gradients_are_those_of_the_whole_batch(device):
    whole, halves = mlp(device=device), mlp(device=device)
    pair = [mk.MFAC(m.parameters(), 3, 0.1, dtype=torch.float64, momentum=0.5) for m in (whole, halves)]
    for x, y in batches(5, device=device):
        backward(whole, x, y)
        halves.zero_grad()
        for part in (slice(0, 4), slice(4, 8)):
            (nn.functional.mse_loss(halves(x[part]), y[part]) / 2).backward()
        for p in pair:
            p.step()
        got, want = (flat(grads(m), m.parameters()) for m in (halves, whole))
        # sums of 8 products in another order, times cond(F) < 100
        assert float((got - want).norm()) <= 1e-12 * float(want.norm())


def test_every_run_has_the_same_bits_for_any_number_of_threads(threads):
    results = []
    for count in (1, 2, 3, 1):
        threads(count)
        torch.manual_seed(0)
        model = nn.Linear(300, 200)
        p = mk.MFAC(model.parameters(), 3, 0.1, momentum=0.9)
        for t in range(5):
            for q in model.parameters():
                q.grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(t))
            p.step()
        results.append([grads(model), p.state_dict()])
    for other in results[1:]:
        assert_equal(results[0], other)


def test_a_compiled_model(device):
    model, plain = mlp(torch.float32, device), mlp(torch.float32, device)
    data = batches(5, torch.float32, device)
    a = train(model, data, torch.compile(model, backend="eager", fullgraph=True))
    b = train(plain, data)
    assert_equal(a.state_dict(), b.state_dict())
    assert_equal(model.state_dict(), plain.state_dict())


def test_grad_scaler_skips_a_batch_that_overflows(device):
    """Beside a run that never saw the batch: scales are powers of 2, so the two agree bit for bit."""
    model, plain = mlp(torch.float32, device), mlp(torch.float32, device)
    data = batches(6, torch.float32, device)
    p = mk.MFAC(model.parameters(), 3, 0.1, momentum=0.9, weight_decay=0.01)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**10, growth_interval=1000)
    for t, (x, y) in enumerate([*data[:4], (data[0][0], data[0][1] * 1e38), *data[4:]]):
        weights, state = copy.deepcopy(model.state_dict()), tensors(p.state_dict())
        optimizer.zero_grad()
        scaler.scale(nn.functional.mse_loss(model(x), y)).backward()
        scaler.unscale_(optimizer)
        before = tensors(grads(model))
        p.step()
        if t == 4:
            assert not all(g.isfinite().all() for g in before)
            assert_equal(grads(model), before)
            assert (p.skipped, p.windows[0].seen, p.steps) == (1, 4, 5)
        scaler.step(optimizer)
        scaler.update()
        if t == 4:
            assert_equal(model.state_dict(), weights)
            after = tensors(p.state_dict())
            changed = [i for i, (a, b) in enumerate(zip(after, state, strict=True)) if not torch.equal(a, b)]
            assert len(changed) == 2  # the counts of steps and of refusals
            assert scaler.get_scale() == 2.0**9
    assert p.diagnostics() == {"steps": 7, "seen": 6, "skipped": 1}
    q = train(plain, data)
    assert_equal(model.state_dict(), plain.state_dict())
    assert_equal(p.windows[0].window, q.windows[0].window)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("momentum_mode", "weight_decay_mode"), BOTH)
def test_a_gradient_that_is_not_finite_stays_as_it_is(momentum_mode, weight_decay_mode, bad, device):
    model = mlp(torch.float32, device)
    p = train(
        model, batches(4, torch.float32, device), momentum_mode=momentum_mode, weight_decay_mode=weight_decay_mode
    )
    backward(model, *batches(1, torch.float32, device)[0])
    model[2].bias.grad[1] = bad
    before, buffer = tensors(grads(model)), p.state_dict()["momentum_buffers"][0].clone()
    p.step()
    assert_equal(grads(model), before)
    assert_equal(p.state_dict()["momentum_buffers"], [buffer])
    assert (p.skipped, p.windows[0].seen) == (1, 4)


def test_a_gradient_too_large_for_the_window_skips_the_step(device):
    """It is finite, so no GradScaler would see it: left in place it would be applied without F^-1."""
    model = mlp(torch.float32, device)
    p = mk.MFAC(model.parameters(), 3, 0.1, momentum=0.9, weight_decay=0.1, dtype=torch.float16)
    backward(model, *batches(1, torch.float32, device)[0])
    p.step()
    backward(model, *batches(1, torch.float32, device)[0])
    model[2].bias.grad[1] = 1e6
    buffer = p.state_dict()["momentum_buffers"][0].clone()
    p.step()
    assert not any(g.any() for g in grads(model))
    assert_equal(p.state_dict()["momentum_buffers"], [buffer])
    assert (p.skipped, p.windows[0].seen) == (1, 1)


def test_only_the_group_with_the_bad_gradient_is_skipped(device):
    model = mlp(torch.float32, device)
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters()}]
    p = mk.MFAC(groups, 3, 0.1, per_group=True)
    backward(model, *batches(1, torch.float32, device)[0])
    model[2].bias.grad[1] = torch.nan
    p.step()
    assert [w.seen for w in p.windows] == [1, 0] and p.skipped == 1


def test_a_step_without_any_gradient_does_nothing(device):
    model = mlp(torch.float32, device)
    p = train(model, batches(4, torch.float32, device))
    before = tensors([p.state_dict()["windows"], p.state_dict()["momentum_buffers"]])
    model.zero_grad()
    p.step()
    assert_equal([p.state_dict()["windows"], p.state_dict()["momentum_buffers"]], before)
    assert grads(model) == [None] * 4 and (p.steps, p.skipped) == (5, 0)
