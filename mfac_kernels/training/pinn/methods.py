"""The optimizers that are compared, each with the one setting that is searched for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from mfac_kernels import pinn
from mfac_kernels.pinn import Term
from mfac_kernels.training.pinn.equations import Equation

__all__ = ["METHODS", "Method"]

Step = Callable[[list[Term]], Tensor]
"""Moves the network's parameters; returns the loss before."""

_MOMENTUM = 0.9
_FACTOR_DECAY = 0.5  # points stay the same: averages over many steps are of old parameters
_HISTORY = 50


@dataclass(frozen=True)
class Method:
    label: str
    setting: str  # its name; "" for none
    values: tuple[float, ...]  # of the grid
    build: Callable[[nn.Sequential, Equation, float], Step]


def _first_order(make: Callable[..., torch.optim.Optimizer], net: nn.Sequential, equation: Equation, lr: float) -> Step:
    optimizer = make(net.parameters(), lr=lr)

    def step(terms: list[Term]) -> Tensor:
        optimizer.zero_grad()
        loss = pinn.loss_of(net, terms)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss.detach()

    return step


def _lbfgs(net: nn.Sequential, iterations: int) -> torch.optim.LBFGS:
    return torch.optim.LBFGS(
        net.parameters(),
        max_iter=iterations,
        history_size=_HISTORY,
        tolerance_grad=0,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )


def _minimise(optimizer: torch.optim.LBFGS, objective: Callable[[], Tensor]) -> Tensor:
    """Some iterations; the objective before them."""

    def closure() -> float:
        optimizer.zero_grad()
        loss = objective()
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    return torch.as_tensor(optimizer.step(closure))  # type: ignore[no-untyped-call]


def _quasi_newton(net: nn.Sequential, equation: Equation, _: float) -> Step:
    optimizer = _lbfgs(net, iterations=10)
    return lambda terms: _minimise(optimizer, lambda: pinn.loss_of(net, terms))


def _implicit(net: nn.Sequential, equation: Equation, lr: float) -> Step:
    """The parameters that minimise loss + |parameters - those before|^2 / (2 lr), nearly: by L-BFGS, begun anew."""

    def step(terms: list[Term]) -> Tensor:
        before = [p.detach().clone() for p in net.parameters()]

        def objective() -> Tensor:
            moved = [(p - old).square().sum() for p, old in zip(net.parameters(), before, strict=True)]
            return pinn.loss_of(net, terms) + torch.stack(moved).sum() / (2 * lr)

        return _minimise(_lbfgs(net, iterations=20), objective)

    return step


def _natural_gradient(mu: float, net: nn.Sequential, equation: Equation, damping: float) -> Step:
    phi: Tensor | None = None

    def step(terms: list[Term]) -> Tensor:
        nonlocal phi
        at = pinn.linearise(net, terms)
        phi = pinn.spring(*at.scaled(), damping, mu, phi if mu else None)
        pinn.line_search(net, terms, at.blocks(-phi), at.loss)
        return at.loss

    return step


def _kfac(
    rule: Literal["quadratic_model", "line_search"], net: nn.Sequential, equation: Equation, damping: float
) -> Step:
    momentum = 0.0 if rule == "quadratic_model" else _MOMENTUM
    optimizer = pinn.KFAC(
        net,
        equation.condition,
        equation.boundary,
        damping,
        factor_decay=_FACTOR_DECAY,
        step_rule=rule,
        momentum=momentum,
    )
    return lambda terms: optimizer.step(terms[0][1], terms[1][1])


_sgd = partial(torch.optim.SGD, momentum=_MOMENTUM)
_RATES = (1e-3, 3e-3, 1e-2, 3e-2)
_DAMPINGS = (1e-4, 1e-3, 1e-2, 1e-1)  # of factors
_GRAM_DAMPINGS = (1e-10, 1e-8, 1e-6, 1e-4)
METHODS: dict[str, Method] = {
    "sgd": Method("SGD", "learning rate", _RATES, partial(_first_order, _sgd)),
    "adam": Method("Adam", "learning rate", _RATES, partial(_first_order, torch.optim.Adam)),
    "lbfgs": Method("L-BFGS", "", (1.0,), _quasi_newton),
    "implicit": Method("implicit SGD", "learning rate", (1.0, 10.0, 100.0, 1000.0), _implicit),
    "kfac": Method("K-FAC", "damping", _DAMPINGS, partial(_kfac, "line_search")),
    "kfac*": Method("K-FAC*", "damping", _DAMPINGS, partial(_kfac, "quadratic_model")),
    "spring": Method("SPRING", "damping", _GRAM_DAMPINGS, partial(_natural_gradient, _MOMENTUM)),
    "engd": Method("ENGD", "damping", _GRAM_DAMPINGS, partial(_natural_gradient, 0.0)),
}
