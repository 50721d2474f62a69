"""What can go wrong in two-level K-FAC: singular coarse matrices, what is not finite, layers at rest, resumes."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from two_level_cases import COMBINATIONS, DAMPING, F64, SPACES, Case, build, loss_of

import mfac_kernels as mk
from mfac_kernels.preconditioners.coarse import FixedSpace


def twins(**options: object) -> list[tuple[nn.Module, mk.KFAC]]:
    nets = [build("linear")[0] for _ in range(2)]
    return [(nets[0], mk.KFAC(nets[0], DAMPING)), (nets[1], mk.TwoLevelKFAC(nets[1], DAMPING, **options))]


def check_fallback(**options):
    """The step is K-FAC's, and is counted."""
    (plain, k), (net, p) = twins(**options)
    _, x = build("linear")
    for module, preconditioner in ((plain, k), (net, p)):
        loss_of(module, x).backward()
        preconditioner.step()
    for a, b in zip(plain.parameters(), net.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    assert (p.diagnostics()["coarse_fallbacks"], p.diagnostics()["coarse_gain"]) == (1, 0)


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_a_singular_coarse_matrix_leaves_the_step_of_kfac_and_is_counted(combination):
    shapes = Case("linear").shapes
    row = [torch.ones(s, dtype=F64) for s in shapes]
    check_fallback(coarse_space=FixedSpace([row, row], by_layer=True), combination=combination)


@pytest.mark.parametrize("space", [*SPACES, "tselepidis"])
def test_a_sampling_pass_that_is_not_finite_leaves_the_step_of_kfac(space):
    (plain, k), (net, p) = twins(coarse_space=space, fisher_type="mc")
    k = mk.KFAC(plain, DAMPING, fisher_type="mc") if k.remove_hooks() is None else k
    _, x = build("linear")
    for step in range(2):
        for module, preconditioner in ((plain, k), (net, p)):
            module.zero_grad()
            output = module(x)
            with preconditioner.sampling():
                (output.sum() * (math.inf if step else 1)).backward(retain_graph=True)
            loss_of(module, x).backward()
            preconditioner.step()
            if step == 0:
                with torch.no_grad():
                    for q, w in zip(module.parameters(), build("linear")[0].parameters(), strict=True):
                        q.copy_(w)
    for a, b in zip(plain.parameters(), net.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad) and a.grad.isfinite().all()
    assert (p.diagnostics()["coarse_fallbacks"], p.diagnostics()["skipped"]) == (1, 1)


def test_rows_that_are_not_finite_leave_the_step_of_kfac():
    class Broken(mk.CoarseSpace):
        def rows(self, step):
            return [[torch.full_like(g, math.nan) if i == 1 else g for i, g in enumerate(step.gradients)]]

    check_fallback(coarse_space=Broken())


def test_layers_that_rest_and_rows_of_zeros_count_for_nothing():
    a, b, c = (nn.Linear(3, 3).double() for _ in range(3))
    net = nn.ModuleList([a, b, c])
    p = mk.TwoLevelKFAC(net, DAMPING, coarse_space="krylov_residual", kl_clip=None)
    x = torch.randn(6, 3, dtype=F64)
    b(torch.tanh(a(x))).square().sum().backward()
    p.step()
    assert c.weight.grad is None
    d = p.diagnostics()
    assert d["coarse_fallbacks"] == 0 and d["coarse_gain"] > 0


def test_rows_of_the_inverses_are_made_when_these_are():
    class Counted(mk.CoarseSpace):
        of_inverses, calls = True, 0

        def rows(self, step):
            self.calls += 1
            return [step.inverse([torch.ones_like(g) for g in step.gradients])]

    space = Counted()
    net, x = build("linear")
    p = mk.TwoLevelKFAC(net, DAMPING, coarse_space=space, inv_update_steps=3)
    for step in range(7):
        net.zero_grad()
        loss_of(net, x).backward()
        p.step()
        assert space.calls == step // 3 + 1
        assert p.diagnostics()["coarse_gain"] > 0


def test_factors_rest_and_the_correction_goes_on():
    net, x = build("linear")
    p = mk.TwoLevelKFAC(net, DAMPING, factor_update_steps=3, inv_update_steps=3)
    for _ in range(4):
        net.zero_grad()
        loss_of(net, x).backward()
        p.step()
        assert p.diagnostics()["coarse_gain"] > 0
    assert p.fisher.seen == 2


@pytest.mark.parametrize("space", SPACES)
def test_resumes_bit_for_bit(space):
    def steps(net: nn.Module, p: mk.TwoLevelKFAC, count: int) -> None:
        _, x = build("linear")
        for _ in range(count):
            net.zero_grad()
            loss_of(net, x).backward()
            p.step()
            with torch.no_grad():
                for q in net.parameters():
                    q -= 0.1 * q.grad

    net, _ = build("linear")
    p = mk.TwoLevelKFAC(net, DAMPING, coarse_space=space, inv_update_steps=3)
    steps(net, p, 2)
    other = copy.deepcopy(net)
    q = mk.TwoLevelKFAC(other, DAMPING, coarse_space=space, inv_update_steps=3)
    q.load_state_dict(copy.deepcopy(p.state_dict()))
    steps(net, p, 3)
    steps(other, q, 3)
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    assert p.diagnostics() == q.diagnostics()


def test_no_state_between_a_backward_pass_and_its_step():
    net, x = build("linear")
    p = mk.TwoLevelKFAC(net, DAMPING)
    loss_of(net, x).backward()
    with pytest.raises(RuntimeError, match="between a backward pass and its step"):
        p.state_dict()


def test_inputs_that_are_overwritten_before_the_step():
    net, x = build("linear")
    p = mk.TwoLevelKFAC(net, DAMPING)
    loss_of(net, x).backward()
    x.zero_()
    with pytest.raises(RuntimeError, match="the input of 0, or its output's gradient, was written to"):
        p.step()


def test_a_space_of_ten_lines():
    class Signs(mk.CoarseSpace):
        def rows(self, step):
            return [[g.sign() for g in step.gradients]]

    case = Case("linear", coarse_space=Signs())
    assert case.lowered() == pytest.approx(case.p.diagnostics()["coarse_gain"], rel=1e-8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"coarse_space": "coarse"},
            "coarse_space: expected one of nicolaides, .*, tselepidis, a CoarseSpace or rows, got 'coarse'",
        ),
        ({"combination": "added"}, "combination: expected one of corrected, .*, got 'added'"),
        ({"combination": "balanced", "omega": 0.5}, 'omega: expected 1 with combination "balanced", got 0.5'),
        (
            {"combination": "additive", "coarse_space": "tselepidis"},
            'combination: expected "corrected" with "tselepidis"',
        ),
        ({"omega": 0.0}, "omega: expected a positive number, got 0.0"),
        ({"omega": math.nan}, "omega: expected a positive number, got nan"),
        ({"fisher_batch": 0.0}, r"fisher_batch: expected a number in \(0, 1\], got 0.0"),
        ({"fisher_batch": 2}, r"fisher_batch: expected a number in \(0, 1\], got 2"),
    ],
)
def test_arguments_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        mk.TwoLevelKFAC(build("linear")[0], **options)


@pytest.mark.parametrize("space", [*SPACES, "tselepidis"])
def test_a_damping_beyond_float32_leaves_blocks_as_they_were_and_is_counted(space):
    net = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 3))
    p = mk.TwoLevelKFAC(net, 1e300, coarse_space=space)
    net(torch.arange(20.0).reshape(5, 4).sin()).square().mean().backward()
    p.step()
    assert p.diagnostics()["blocks_kept"] > 0
    assert all(q.grad.isfinite().all() for q in net.parameters())
