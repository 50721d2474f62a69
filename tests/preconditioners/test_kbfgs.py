"""KBFGS against its formulas in plain torch, float64, over several steps; and H y == s."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from relatives_cases import build, closure_of, loss_of, step, train
from torch import Tensor, nn
from two_level_cases import F64, close

import mfac_kernels as mk
from mfac_kernels.fisher._bfgs import bfgs, double_damped

DAMPING, RATE, DECAY, PAIRS, MU = 0.05, 0.1, 0.8, 0.6, 0.2


def test_bfgs_maps_y_to_s_and_keeps_h_symmetric_positive_definite():
    torch.manual_seed(0)
    x = torch.randn(6, 5, 5, dtype=F64)
    h = x @ x.mT + torch.eye(5, dtype=F64)
    y = torch.randn(6, 5, dtype=F64)
    s = y + 0.5 * torch.randn(6, 5, dtype=F64)
    updated, fits = bfgs(h, s, y)
    positive = (s * y).sum(-1) > 0
    assert torch.equal(fits, positive) and bool(positive.any())
    updated, s, y = updated[positive], s[positive], y[positive]
    close((updated @ y[..., None])[..., 0], s)
    assert torch.equal(updated, updated.mT)
    assert float(torch.linalg.eigvalsh(updated).min()) > 0
    one = torch.eye(5, dtype=F64)
    for got, h0, a, b in zip(updated, h[positive], s, y, strict=True):
        r = 1 / (a @ b)
        left = one - r * torch.outer(a, b)
        close(got, left @ h0 @ left.mT + r * torch.outer(a, a))


def test_double_damping_bounds_the_curvature():
    torch.manual_seed(1)
    h = torch.eye(4, dtype=F64).expand(8, 4, 4)
    s, y = (torch.randn(8, 4, dtype=F64) for _ in range(2))
    damped, shifted = double_damped(h, s, y, MU, 0.3)
    yhy = (y * y).sum(-1)
    assert bool(((damped * y).sum(-1) >= MU * yhy * (1 - 1e-12)).all())
    untouched = (s * y).sum(-1) >= MU * yhy
    assert 0 < int(untouched.sum()) < 8
    assert torch.equal(damped[untouched], s[untouched]) and not torch.equal(damped[~untouched], s[~untouched])
    close(shifted, y + 0.3 * damped)


class Reference:
    """K-BFGS in plain torch: patches by unfold, everything dense, layer by layer."""

    def __init__(self, net: nn.Module) -> None:
        self.layers = [m for m in net.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        self.a: list[Tensor | None] = [None] * len(self.layers)
        self.weight = 0.0
        self.h_a: list[Tensor] = [torch.empty(0)] * len(self.layers)
        self.h_b = [torch.eye(len(m.weight), dtype=F64) for m in self.layers]
        self.s = [torch.zeros(len(m.weight), dtype=F64) for m in self.layers]
        self.y = [torch.zeros(len(m.weight), dtype=F64) for m in self.layers]

    def rows(self, net: nn.Module, x: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Of each layer a (n, S, columns), h and g (n, S, outputs), and the gradients in .grad."""
        calls: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        hooks = []
        for m in self.layers:
            hooks.append(m.register_forward_hook(lambda m, a, h: (h.retain_grad(), calls.update({m: (a[0], h)}))[0]))
        net.zero_grad()
        loss_of(net, x).backward()
        for hook in hooks:
            hook.remove()
        found = []
        for m in self.layers:
            a, h = calls[m]
            g = len(x) * h.grad
            if isinstance(m, nn.Conv2d):
                a = F.unfold(a, m.kernel_size, stride=m.stride).mT
                h, g = h.flatten(2).mT, g.flatten(2).mT
            else:
                a, h, g = a[:, None], h[:, None], g[:, None]
            if m.bias is not None:
                a = F.pad(a, (0, 1), value=1.0)
            found.append((a.detach(), h.detach(), g))
        return found

    def step(self, net: nn.Module, x: Tensor) -> list[Tensor]:
        before = self.rows(net, x)
        gradients = [
            m.weight.grad.flatten(1)
            if m.bias is None
            else torch.cat([m.weight.grad.flatten(1), m.bias.grad[:, None]], 1)
            for m in self.layers
        ]
        moved = copy.deepcopy(net)
        updates = [g if self.a[i] is None else self.h_b[i] @ g @ self.h_a[i] for i, g in enumerate(gradients)]
        with torch.no_grad():
            for m, u in zip([m for m in moved.modules() if isinstance(m, nn.Linear | nn.Conv2d)], updates, strict=True):
                m.weight -= RATE * u[:, : m.weight[0].numel()].reshape(m.weight.shape)
                if m.bias is not None:
                    m.bias -= RATE * u[:, -1]
        trial = Reference(moved)
        after = trial.rows(moved, x)
        self.weight = DECAY * self.weight + 1 - DECAY
        for i, ((a, h, g), (_, h1, g1)) in enumerate(zip(before, after, strict=True)):
            n, positions, columns = a.shape
            flat = a.reshape(-1, columns)
            old = torch.zeros(columns, columns, dtype=F64) if self.a[i] is None else self.a[i]
            first = self.a[i] is None
            self.a[i] = DECAY * old + (1 - DECAY) * flat.mT @ flat / n
            damped = self.a[i] / self.weight + math.sqrt(DAMPING * positions) * torch.eye(columns, dtype=F64)
            if first:
                self.h_a[i] = torch.linalg.inv(damped)
            else:
                s = self.h_a[i] @ flat.mean(0)
                self.h_a[i] = self.updated(self.h_a[i], s, damped @ s)
            self.s[i] = PAIRS * self.s[i] + (1 - PAIRS) * (h1.mean((0, 1)) - h.mean((0, 1)))
            self.y[i] = PAIRS * self.y[i] + (1 - PAIRS) * (g1.mean((0, 1)) - g.mean((0, 1)))
            s, y, hessian = self.s[i], self.y[i], self.h_b[i]
            yhy, sy = y @ hessian @ y, s @ y
            theta = (1 - MU) * yhy / (yhy - sy) if sy < MU * yhy else 1.0
            s = theta * s + (1 - theta) * hessian @ y
            self.h_b[i] = self.updated(hessian, s, y + math.sqrt(DAMPING / positions) * s)
        return updates

    @staticmethod
    def updated(h: Tensor, s: Tensor, y: Tensor) -> Tensor:
        r = 1 / (s @ y)
        left = torch.eye(len(h), dtype=F64) - r * torch.outer(s, y)
        new = left @ h @ left.mT + r * torch.outer(s, s)
        close(new @ y, s)
        return new


@pytest.mark.parametrize("kind", ["linear", "convolutional"])
def test_the_formulas_over_several_steps(kind):
    net, x = build(kind)
    reference = Reference(net)
    p = mk.KBFGS(net, DAMPING, lr=RATE, factor_decay=DECAY, pair_decay=PAIRS, mu=MU, kl_clip=None)
    for _ in range(5):
        expected = reference.step(net, x)
        weights = [q.detach().clone() for q in net.parameters()]
        step(net, p, closure_of(net, x))
        assert all(torch.equal(a, b) for a, b in zip(weights, net.parameters(), strict=True))
        for i, (layer, u) in enumerate(zip(p._layers, expected, strict=True)):
            close(layer.gradient(), u)
            for got, want in zip(p.factors.inverses(i), (reference.h_a[i], reference.h_b[i]), strict=True):
                close(got[0], want)
        with torch.no_grad():
            for q in net.parameters():
                q -= RATE * q.grad
    assert p.diagnostics()["updates_left_out"] == 0


def test_groups_are_layers_of_their_own():
    torch.manual_seed(2)
    x = torch.randn(6, 4, 5, 5, dtype=F64)
    grouped = nn.Conv2d(4, 4, 3, groups=2).double()
    apart = nn.ModuleList(nn.Conv2d(2, 2, 3).double() for _ in range(2))
    with torch.no_grad():
        for i, one in enumerate(apart):
            one.weight.copy_(grouped.weight[2 * i : 2 * i + 2])
            one.bias.copy_(grouped.bias[2 * i : 2 * i + 2])

    def loss(y: Tensor) -> Tensor:
        return torch.tanh(y).square().sum() / len(y)

    outputs = {
        grouped: lambda: grouped(x),
        apart: lambda: torch.cat([m(c) for m, c in zip(apart, x.chunk(2, 1), strict=True)], 1),
    }
    for net, forward in outputs.items():
        p = mk.KBFGS(net, DAMPING, kl_clip=None)

        def closure(net: nn.Module = net, forward: object = forward) -> None:
            net.zero_grad()
            loss(forward()).backward()

        for _ in range(3):
            step(net, p, closure)
    close(grouped.weight.grad, torch.cat([m.weight.grad for m in apart]))
    close(grouped.bias.grad, torch.cat([m.bias.grad for m in apart]))


def test_it_lowers_a_loss_faster_than_gradients_do():
    losses = []
    for preconditioned in (True, False):
        net, x = build("linear")
        if preconditioned:
            train(net, mk.KBFGS(net, 0.1, lr=0.3, kl_clip=None), x, 30, 0.3)
        else:
            for _ in range(30):
                closure_of(net, x)()
                with torch.no_grad():
                    for q in net.parameters():
                        q -= 0.3 * q.grad
        losses.append(float(loss_of(net, x).detach()))
    assert losses[0] < 0.9 * losses[1]


def test_closures():
    net, x = build("linear")
    p = mk.KBFGS(net, factor_update_steps=2, kl_clip=None)
    closure = closure_of(net, x)
    closure()
    with pytest.raises(TypeError, match="closure: expected a function that repeats the batch's passes, got None"):
        p.step()
    gradients = [q.grad.clone() for q in net.parameters()]
    weights = [q.detach().clone() for q in net.parameters()]
    for broken, message in (
        (lambda: None, "closure: expected passes through the same layers"),
        (lambda: 1 / 0, "zero"),
    ):
        with pytest.raises((RuntimeError, ZeroDivisionError), match=message):
            p.step(broken)
        assert all(torch.equal(a, q.grad) for a, q in zip(gradients, net.parameters(), strict=True))
        assert all(torch.equal(a, q) for a, q in zip(weights, net.parameters(), strict=True))
        closure()
    p.step(closure)
    closure()
    p.step()  # a step that rests needs none
    assert p.steps == 2 and p.diagnostics()["seen"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mu": 1.0}, r"mu: expected a number in \(0, 1\), got 1.0"),
        ({"pair_decay": 1.0}, r"pair_decay: expected a number in \[0, 1\), got 1.0"),
        ({"loss_average": "positions"}, 'loss_average: expected "batch" or "sum"'),
        ({"fisher_type": "mc"}, "KBFGS: unexpected argument fisher_type"),
    ],
)
def test_arguments_out_of_range(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        mk.KBFGS(build("linear")[0], **options)
