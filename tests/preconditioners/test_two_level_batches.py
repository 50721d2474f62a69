"""Which samples make two-level K-FAC's Fisher matrix, and at which scale."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from two_level_cases import DAMPING, F64, Case, build, close, flat, loss_of

import mfac_kernels as mk


@pytest.mark.parametrize("average", ["batch", "positions", "sum"])
def test_every_average_of_the_loss(average):
    case = Case("transformer", average=average, coarse_space="residual")
    _, q = case.coarse("residual")
    close(case.step, case.first + q @ (case.gradient - case.fisher @ case.first))


def test_accumulated_passes_are_one_batch():
    joint, x = build("convolutional")
    parts = copy.deepcopy(joint)
    x = torch.cat([x, x[:1]])
    y = torch.arange(8) % 3
    ps = [
        mk.TwoLevelKFAC(net, DAMPING, coarse_space="krylov_residual", accumulation_steps=k)
        for net, k in ((joint, 1), (parts, 2))
    ]
    F.cross_entropy(joint(x), y).backward()
    for half in (slice(0, 4), slice(4, 8)):
        (F.cross_entropy(parts(x[half]), y[half]) / 2).backward()
    for p in ps:
        p.step()
    for a, b in zip(joint.parameters(), parts.parameters(), strict=True):
        close(a.grad, b.grad)
    assert ps[0].diagnostics()["coarse_gain"] == pytest.approx(ps[1].diagnostics()["coarse_gain"], rel=1e-9)


@pytest.mark.parametrize("options", [{"fisher_batch": 0.4, "kept": 3}, {"fisher_type": "mc"}])
def test_a_part_of_the_batch_and_labels_drawn_from_the_model(options):
    """F is that of the part, of 3 of 7 samples; the pass of the loss gives the gradient alone."""
    case = Case("linear", coarse_space="krylov_residual", **options)
    _, q = case.coarse("krylov_residual")
    close(case.step, case.first + q @ (case.gradient - case.fisher @ case.first))
    assert case.lowered() == pytest.approx(case.p.diagnostics()["coarse_gain"], rel=1e-8)


@pytest.mark.parametrize(
    "options",
    [
        {"spatial": "sua"},
        {"group_size": 2},
        {"spatial": "sua", "group_size": (3, 2)},
        {"approximation": "reduce"},
        {"damping_style": "exact", "eigen_correction": True},
    ],
)
@pytest.mark.parametrize("kind", ["resolutions", "transformer"])
def test_every_kind_of_factors(kind, options):
    """They are K-FAC's; F is exact whatever they are."""
    case = Case(kind, coarse_space="krylov_nicolaides", **options)
    _, q = case.coarse("krylov_nicolaides")
    close(case.step, case.first + q @ (case.gradient - case.fisher @ case.first))


def test_a_loss_scale_does_not_show():
    """In float32: rounding alone, as the scale is a power of two; an overflow leaves the coarse level out."""
    steps, x = [], build("linear")[1].float()
    for scaled in (False, True):
        net = build("linear")[0].float()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        p = mk.TwoLevelKFAC(net, DAMPING, coarse_space="residual", scaler=scaler)
        scaler.scale(loss_of(net, x)).backward()
        scaler.unscale_(optimizer)
        p.step()
        steps.append(flat([q.grad for q in net.parameters()]))
        assert p.diagnostics()["coarse_gain"] > 0
    torch.testing.assert_close(steps[1], steps[0], rtol=1e-5, atol=1e-6)
    net.zero_grad()
    scaler.scale(loss_of(net, x) * float("inf")).backward()
    p.step()
    assert (p.diagnostics()["coarse_gain"], p.diagnostics()["coarse_fallbacks"]) == (0, 1)


def test_autocast():
    """F is that of the 16-bit inputs and output gradients, in float32 arithmetic: within their rounding, 2^-8."""
    gains = []
    for enabled in (False, True):
        net, x = build("convolutional")
        net, x = net.float(), x.float()
        p = mk.TwoLevelKFAC(net, DAMPING, coarse_space="krylov_nicolaides")
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = loss_of(net, x)
        loss.backward()
        p.step()
        assert all(q.grad.dtype == torch.float32 and bool(q.grad.isfinite().all()) for q in net.parameters())
        gains.append(p.diagnostics()["coarse_gain"])
    assert gains[1] == pytest.approx(gains[0], rel=0.1)


def test_the_positions_of_a_sample_among_the_samples():
    """Tokens flattened into the first dimension, with the batch's size given: a row for each sample all the same."""
    torch.manual_seed(0)
    a, b = nn.Linear(3, 4).double(), nn.Linear(4, 2).double()
    x = torch.randn(5, 6, 3, dtype=F64)
    steps = []
    for flatten in (False, True):
        first, last = copy.deepcopy((a, b))
        net = nn.ModuleList([first, last])
        p = mk.TwoLevelKFAC(net, DAMPING, coarse_space="residual", kl_clip=None, batch_size=5)
        hidden = first(x.flatten(0, 1)).view(5, 6, 4) if flatten else first(x)
        last(torch.tanh(hidden).mean(1)).square().sum().div(5).backward()
        p.step()
        steps.append(flat([q.grad for q in net.parameters()]))
    close(steps[1], steps[0])
