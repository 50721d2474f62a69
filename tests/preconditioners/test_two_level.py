"""TwoLevelKFAC against its formulas with the dense Fisher matrix: every network, coarse space and combination."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from two_level_cases import COMBINATIONS, DAMPING, F64, KINDS, SPACES, Case, build, close, cut, flat, loss_of

import mfac_kernels as mk
from mfac_kernels.preconditioners.coarse import FixedSpace


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("combination", COMBINATIONS)
def test_the_step_is_the_formula_with_the_dense_fisher(kind, space, combination):
    omega = 0.7 if combination in ("corrected", "additive") else 1.0
    case = Case(kind, coarse_space=space, combination=combination, omega=omega)
    f, m, g = case.fisher, case.inverse, case.gradient
    _, q = case.coarse(space)
    one = torch.eye(len(g), dtype=F64)
    operator = {
        "corrected": m + omega * q @ (one - f @ m),
        "additive": m + omega * q,
        "deflated": (one - q @ f) @ m + q,
        "balanced": (one - q @ f) @ m @ (one - f @ q) + q,
    }[combination]
    close(case.step, operator @ g)
    assert case.p.diagnostics()["coarse_fallbacks"] == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("space", SPACES)
def test_the_correction_leaves_no_coarse_residual_and_lowers_the_error_by_its_gain(kind, space):
    case = Case(kind, coarse_space=space)
    left = case.rows(space) @ (case.gradient - case.fisher @ case.step)
    size = case.rows(space).abs() @ (case.gradient.abs() + (case.fisher @ case.step).abs())
    assert bool((left.abs() <= 1e-10 * size).all())
    gain = case.p.diagnostics()["coarse_gain"]
    assert gain > 0
    assert case.lowered() == pytest.approx(gain, rel=1e-7)


@pytest.mark.parametrize("combination", ["corrected", "additive"])
@pytest.mark.parametrize("omega", [0.3, 1.0, 1.6])
def test_the_gain_is_the_change_of_the_error_with_any_omega(combination, omega):
    case = Case("convolutional", coarse_space="krylov_nicolaides", combination=combination, omega=omega)
    gain = case.p.diagnostics()["coarse_gain"]
    assert case.lowered() == pytest.approx(gain, rel=1e-8)


@pytest.mark.parametrize(
    ("kind", "combination"), [*((kind, "corrected") for kind in KINDS), ("linear", "deflated"), ("linear", "balanced")]
)
def test_the_whole_space_gives_the_natural_gradient(kind, combination):
    """Row k of each layer is the unit vector k, or zero where there is none."""
    shapes = Case(kind).shapes
    units = torch.eye(max(s.numel() for s in shapes), dtype=F64)
    rows = [[unit[: s.numel()].view(s) for s in shapes] for unit in units]
    case = Case(kind, coarse_space=FixedSpace(rows, by_layer=True), combination=combination)
    close(case.step, case.best)


def test_rows_across_layers():
    shapes = Case("linear").shapes
    eye = torch.eye(sum(s.numel() for s in shapes), dtype=F64)
    close(Case("linear", coarse_space=[cut(row, shapes) for row in eye]).step, Case("linear").best)
    some = torch.randn(3, len(eye), dtype=F64)
    case = Case("linear", coarse_space=[cut(row, shapes) for row in some])
    left = some @ (case.gradient - case.fisher @ case.step)
    assert float(left.abs().max()) < 1e-10


@pytest.mark.parametrize(
    ("kind", "space"), [*(("linear", space) for space in SPACES), ("convolutional", "krylov_residual")]
)
def test_balanced_is_symmetric_positive_definite_and_exact_on_the_coarse_space(kind, space):
    """With the rows of one step fixed; the multiplicative form is not symmetric."""
    case = Case(kind, coarse_space=space)
    rows = case.rows(space)
    blocks = [cut(row, case.shapes) for row in rows]
    balanced, multiplicative = (operator(kind, blocks, name) for name in ("balanced", "corrected"))
    close(balanced, balanced.mT)
    assert float(torch.linalg.eigvalsh((balanced + balanced.mT) / 2)[0]) > 0
    close(balanced @ case.fisher @ rows.mT, rows.mT)
    assert float((multiplicative - multiplicative.mT).norm()) > 1e-3 * float(multiplicative.norm())


def operator(kind: str, rows: list[list[Tensor]], combination: str) -> Tensor:
    """x as a function of the gradient, a column for each unit vector."""
    net, x = build(kind)
    p = mk.TwoLevelKFAC(net, DAMPING, coarse_space=rows, combination=combination, kl_clip=None, factor_update_steps=9)
    for _ in range(2):  # the second step rests but for its coarse level
        net.zero_grad()
        loss_of(net, x).backward()
        if p.steps == 0:
            p.step()
    shapes = [block.shape for block in rows[0]]
    units = torch.eye(sum(shape.numel() for shape in shapes), dtype=F64)
    return torch.stack([flat(p._updates(cut(unit, shapes), False)) for unit in units], 1)


@pytest.mark.parametrize("kind", ["linear", "convolutional"])
def test_tselepidis_factorizes_the_expectation(kind):
    """Its matrix is the product of expectations, which is far from F_c, the expectation of the product."""
    case = Case(kind, coarse_space="tselepidis", omega=0.5)
    a, b, ab = sums(case)
    n = len(a)
    factorized = (a.mT @ a / n) * (b.mT @ b / n)
    rows = case.rows("nicolaides")
    eye = torch.eye(len(rows), dtype=F64)
    beta = torch.linalg.solve(factorized + DAMPING * eye, rows @ case.gradient)
    close(case.step, case.first + 0.5 * rows.mT @ beta)
    exact = rows @ (case.fisher - DAMPING * torch.eye(len(case.gradient), dtype=F64)) @ rows.mT
    close(ab.mT @ ab / n, exact)
    assert float((factorized - exact).norm()) > 0.2 * float(exact.norm())
    assert case.lowered() == pytest.approx(case.p.diagnostics()["coarse_gain"], rel=1e-8)


def sums(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """(N, layers) each: inputs (the bias's 1 among them) of a sample, added up over columns and positions; N times the
    gradients of its outputs, averaged over positions; the product of both, position by position, added up.
    """
    columns: list[tuple[Tensor, Tensor, Tensor]] = []
    outputs: list[tuple[nn.Module, Tensor, Tensor]] = []

    def hook(module: nn.Module, x: tuple[Tensor], y: Tensor) -> None:
        outputs.append((module, x[0].detach(), y))
        y.retain_grad()

    net = copy.deepcopy(case.net)
    layers = [m for m in net.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    for layer in layers:
        layer.register_forward_hook(hook)
    loss_of(net, case.x).backward()
    for module, x, y in outputs:
        g = len(x) * y.grad.flatten(2).sum(1) if y.dim() > 2 else len(x) * y.grad.sum(1, keepdim=True)
        a = F.unfold(x, module.kernel_size, stride=module.stride).sum(1) if y.dim() > 2 else x.sum(1, keepdim=True)
        a = a + (module.bias is not None)
        columns.append((a.sum(1), g.mean(1), (a * g).sum(1)))
    a, b, ab = (torch.stack(each, 1) for each in zip(*columns, strict=True))
    return a, b, ab
