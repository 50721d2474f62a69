"""mfac_kernels.pinn: of small networks, with points, steps and states that are right or not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fuzzing.draw import Arguments, Draw
from fuzzing.fisher import reload, several, vector
from fuzzing.outcome import REFUSED, Stateful, attempt, expect_finite
from fuzzing.surface import surface
from mfac_kernels import pinn

F64 = torch.float64
EQUATION = pinn.Condition(lambda x, rows: rows[:, -1, 0] + x.sum(1))
BOUNDARY = pinn.Condition(lambda x, rows: rows[:, 0, 0], derivatives=False)


def network(draw: Draw) -> nn.Sequential:
    """Of two inputs, mostly one that is supported."""
    between = draw.pick((nn.Tanh(), nn.Tanh(), nn.Sigmoid(), pinn.Sine(), nn.ReLU()))
    return nn.Sequential(nn.Linear(2, 4, bias=draw.bool()), between, nn.Linear(4, 1)).to(
        draw.pick((F64, F64, torch.float32))
    )


def points(draw: Draw, net: nn.Sequential) -> Tensor:
    return vector(draw, draw.int(0, 5), 2, dtype=net[0].weight.dtype)


@surface("pinn.forward_laplacian", "pinn.Sine")
def _(draw: Draw) -> None:
    net = network(draw)
    options: Arguments = {
        "x": points(draw, net),
        "weights": draw.pick((None, torch.ones(2, dtype=F64))),
        "derivatives": draw.bool(),
    }
    options = draw.flawed(options)
    rows = attempt(lambda: pinn.forward_laplacian(net, **options), net)
    if rows is not REFUSED and draw.tame:
        expect_finite("forward_laplacian", rows)


@surface("pinn.linearise", "pinn.Condition", "pinn.loss_of", "pinn.move", "pinn.line_search")
def _(draw: Draw) -> None:
    net = network(draw)
    terms = [(EQUATION, points(draw, net)), (BOUNDARY, points(draw, net))][: draw.int(0, 2)]
    at = attempt(lambda: pinn.linearise(net, terms), net)
    loss = attempt(lambda: pinn.loss_of(net, terms), net)
    if isinstance(at, pinn.Linearisation):
        step = [-g for g in at.gradient()]
        step = draw.changed(step) if draw.chance(3) else step
        attempt(lambda: pinn.move(net, step, draw.pick((1.0, 0.0))), net)
        if isinstance(loss, Tensor):
            attempt(lambda: pinn.line_search(net, terms, step, loss), net)


@surface("pinn.spring")
def _(draw: Draw) -> None:
    n, p = draw.int(0, 6), draw.int(1, 9)
    options: Arguments = {"jacobian": draw.tensor(n, p, dtype=F64), "residuals": draw.tensor(n, dtype=F64)}
    options |= {
        "damping": draw.positive(),
        "mu": draw.pick((0.0, 0.9)),
        "phi": draw.pick((None, draw.normal(p, dtype=F64))),
    }
    options = draw.flawed(options)
    attempt(lambda: pinn.spring(**options), options["jacobian"])


@surface("pinn.KFAC")
def _(draw: Draw) -> None:
    net = network(draw)
    options: Arguments = {
        "damping": draw.positive(),
        "factor_decay": draw.pick((0.0, 0.95)),
        "momentum": draw.pick((0.0, 0.9)),
    }
    options["step_rule"] = draw.pick(("quadratic_model", "line_search"))
    options = draw.flawed(options)
    made: Any = attempt(lambda: pinn.KFAC(net, EQUATION, BOUNDARY, **options), net)
    if isinstance(made, pinn.KFAC):
        several(
            draw,
            Stateful(lambda: (made.state_dict(), list(net.parameters()))),
            {
                "step": lambda: made.step(points(draw, net), points(draw, net)),
                "reload": lambda: reload(draw, made.state_dict(), made.load_state_dict),
                "factors": lambda: made.factors(draw.int(-1, 3)),
            },
            5,
        )
