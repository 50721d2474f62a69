"""K-FAC for physics-informed networks: its factors, its inverse, its steps."""

from __future__ import annotations

import copy

import pytest
import torch
from pinn_cases import BOUNDARY, EQUATION, F64, dense_jacobian, network, points
from torch import nn

from mfac_kernels import pinn
from mfac_kernels.pinn.steps import quadratic_minimum

TERMS = [(EQUATION, points(6, 2)), (BOUNDARY, points(5, 2, 1))]
POINTS = [x for _, x in TERMS]


def optimizer(net: nn.Sequential, **options: object) -> pinn.KFAC:
    return pinn.KFAC(net, EQUATION, BOUNDARY, **options)


def vector(net: nn.Module) -> torch.Tensor:
    return nn.utils.parameters_to_vector(net.parameters()).detach().clone()


def test_factors_are_means_over_rows():
    net = network(2, 4, 3, 1)
    p = optimizer(net, factor_decay=0.5)
    at = pinn.linearise(net, TERMS)
    p.update_factors(at.calls)
    for of_term, which in zip(at.calls, (0, 1), strict=True):
        for call in of_term:
            n, s, _ = call.inputs.shape
            assert s == (4, 1)[which]
            a, b = p.factors(call.layer)[which]
            torch.testing.assert_close(a, torch.einsum("nsi,nsj->ij", call.inputs, call.inputs) / (n * s))
            torch.testing.assert_close(b, torch.einsum("nsi,nsj->ij", call.gradients, call.gradients) / n)


def blocks_of(dense: torch.Tensor, net: nn.Sequential) -> list[torch.Tensor]:
    """The layers' diagonal blocks of the Gauss-Newton matrix J^T J / n."""
    sizes = [sum(p.numel() for p in m.parameters()) for m in net if isinstance(m, nn.Linear)]
    return [j.mT @ j / len(dense) for j in dense.split(sizes, 1)]


@pytest.mark.parametrize(("n", "sizes"), [(1, (2, 4, 3, 1)), (7, (2, 1))])
def test_exact_for_one_point_or_one_layer_of_the_boundary(n, sizes):
    """With one row a point: one point is an outer product; a linear model's output gradients are all 1."""
    net, x = network(*sizes), points(n, 2, 1)
    p = optimizer(net)
    p.update_factors(pinn.linearise(net, [(EQUATION, POINTS[0]), (BOUNDARY, x)]).calls)
    for layer, want in enumerate(blocks_of(dense_jacobian(net, BOUNDARY, x), net)):
        a, b = p.factors(layer)[1]
        torch.testing.assert_close(torch.kron(b, a), want)


def test_exact_for_an_equation_where_cross_terms_cancel():
    """u = w x has rows z = (x, 1, 0) and c0 u + c1 u' + c2 u'' the gradients c: (sum_s c_s z_s)^2 = (c0 x + c1)^2.

    Over x = 1 and -1 the mean is c0^2 + c1^2; the factors have A = 2 / 3 and B = |c|^2.
    """
    c = torch.tensor([1.0, 2.0, 2.5**0.5], dtype=F64)
    equation, x = pinn.Condition(lambda x, u: u[..., 0] @ c), torch.tensor([[1.0], [-1.0]], dtype=F64)
    net = network(1, 1, bias=False)
    p = pinn.KFAC(net, equation, BOUNDARY)
    p.update_factors(pinn.linearise(net, [(equation, x), (BOUNDARY, x)]).calls)
    a, b = p.factors(0)[0]
    (exact,) = blocks_of(dense_jacobian(net, equation, x), net)
    torch.testing.assert_close(torch.kron(b, a), exact)


def test_the_inverse_is_that_of_the_dense_sum():
    net, damping = network(2, 4, 3, 1), 1e-3
    p = optimizer(net, damping=damping)
    at = pinn.linearise(net, TERMS)
    p.update_factors(at.calls)
    gradient = at.gradient()
    for layer, (got, g) in enumerate(zip(p.ihvp(gradient), gradient, strict=True)):
        total = torch.zeros(g.numel(), g.numel(), dtype=F64)
        for a, b in p.factors(layer):
            root = damping**0.5
            total += torch.kron(b + root * torch.eye(len(b), dtype=F64), a + root * torch.eye(len(a), dtype=F64))
        want = torch.linalg.solve(total, g.flatten()).view_as(g)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def test_the_quadratic_model_is_at_its_minimum():
    """No other alpha and mu are better on the dense, damped Gauss-Newton matrix."""
    net, damping = network(2, 4, 1), 1e-2
    at = pinn.linearise(net, TERMS)
    dense = torch.cat([dense_jacobian(net, c, x) for c, x in TERMS])
    matrix = dense.mT @ (at.weights[:, None] * dense) + damping * torch.eye(dense.shape[1], dtype=F64)
    d = torch.stack([points(1, dense.shape[1], s)[0] for s in (2, 3)], 1)
    gradient = at.gradient()
    g = torch.cat([b.flatten() for b in gradient])
    want = -torch.linalg.solve(d.mT @ matrix @ d, d.mT @ g)
    directions = [at.blocks(v) for v in d.mT.contiguous()]
    torch.testing.assert_close(quadratic_minimum(at, directions, gradient, damping), want)
    for singular in (directions[:1] * 2, [directions[0], [torch.zeros_like(b) for b in gradient]]):
        c = quadratic_minimum(at, singular, gradient, damping)
        alone = quadratic_minimum(at, directions[:1], gradient, damping)
        torch.testing.assert_close(c.sum(), alone[0])


def test_the_line_search_takes_the_first_minimum_of_the_grid():
    net = network(2, 4, 1)
    at = pinn.linearise(net, TERMS)
    step = [-100 * g for g in at.gradient()]
    start = copy.deepcopy(net)
    rate = pinn.line_search(net, TERMS, step, at.loss)

    def moved(by: float) -> nn.Sequential:
        trial = copy.deepcopy(start)
        pinn.move(trial, step, by)
        return trial

    assert 0 < rate < 1 and torch.equal(vector(net), vector(moved(rate)))

    def loss(by: float) -> torch.Tensor:
        return pinn.loss_of(moved(by), TERMS).detach()

    assert loss(rate) < at.loss and loss(rate) <= min(loss(2 * rate), loss(rate / 2))
    larger = [2.0**-k for k in range(31) if 2.0**-k > rate]
    assert all(loss(by) >= at.loss or loss(by) > loss(by / 2) for by in larger)

    before = vector(start)
    for uphill in (at.gradient(), [torch.full_like(g, torch.nan) for g in step]):
        assert pinn.line_search(start, TERMS, uphill, at.loss) == 0
        assert torch.equal(vector(start), before)


OPTIONS = [{}, {"step_rule": "line_search", "momentum": 0.5}]


@pytest.mark.parametrize("options", OPTIONS)
def test_a_step_is_of_the_direction_and_the_last_step(options):
    net = network(2, 4, 1)
    p = optimizer(net, damping=1e-3, **options)
    start = vector(net)
    p.step(*POINTS)
    last = [block.clone() for block in p.state_dict()["last"]]
    moved = network(2, 4, 1)
    pinn.move(moved, last)
    torch.testing.assert_close(vector(moved), vector(net))
    assert not torch.equal(vector(net), start)

    twin = optimizer(copy.deepcopy(net), damping=1e-3, **options)
    twin.load_state_dict(p.state_dict())
    at = pinn.linearise(twin.net, TERMS)
    twin.update_factors(at.calls)
    gradient = at.gradient()
    direction = [-block for block in twin.ihvp(gradient)]
    if "momentum" in options:
        step = [d + 0.5 * before for d, before in zip(direction, last, strict=True)]
        assert pinn.line_search(twin.net, TERMS, step, at.loss) > 0
    else:
        alpha, mu = quadratic_minimum(at, [direction, last], gradient, 1e-3)
        assert alpha > 0 and mu != 0
        pinn.move(twin.net, [alpha * d + mu * before for d, before in zip(direction, last, strict=True)])
    p.step(*POINTS)
    torch.testing.assert_close(vector(net), vector(twin.net))


@pytest.mark.parametrize("options", OPTIONS)
def test_it_solves_and_resumes(options):
    net = network(2, 8, 1)
    p = optimizer(net, damping=1e-4, **options)
    losses = [float(p.step(*POINTS)) for _ in range(60)]
    assert losses[-1] < 0.05 * losses[0]
    other = copy.deepcopy(net)
    q = optimizer(other, damping=1e-4, **options)
    q.load_state_dict(copy.deepcopy(p.state_dict()))
    for _ in range(2):
        assert p.step(*POINTS) == q.step(*POINTS)
    assert torch.equal(vector(net), vector(other))


@pytest.mark.parametrize("rule", ["quadratic_model", "line_search"])
def test_points_that_are_not_finite_change_nothing(rule):
    net = network(2, 4, 1)
    p = optimizer(net, damping=1e-3, step_rule=rule)
    p.step(*POINTS)
    before, state = vector(net), copy.deepcopy(p.state_dict())
    bad = POINTS[0].clone()
    bad[0, 0] = torch.inf
    assert not p.step(bad, POINTS[1]).isfinite()
    assert torch.equal(vector(net), before)
    for a, b in zip(state["last"], p.state_dict()["last"], strict=True):
        assert torch.equal(a, b)


def test_errors():
    net = network(2, 3, 1)
    with pytest.raises(TypeError, match=r"net: 0\.weight: expected float64, got torch\.float32"):
        optimizer(copy.deepcopy(net).float())
    with pytest.raises(ValueError, match="momentum: expected a number in"):
        optimizer(net, step_rule="line_search", momentum=1.0)
    with pytest.raises(ValueError, match='momentum: expected 0 with step_rule "quadratic_model"'):
        optimizer(net, momentum=0.5)
    with pytest.raises(ValueError, match="step_rule: expected one of quadratic_model, line_search, got 'newton'"):
        optimizer(net, step_rule="newton")
    p, other = optimizer(net), optimizer(network(2, 4, 1))
    with pytest.raises(ValueError, match=r"state_dict\["):
        p.load_state_dict(other.state_dict())
