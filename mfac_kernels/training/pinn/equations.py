"""Equations on the unit cube whose solutions are known: Poisson's in 2, 5 and 10 dimensions, and the heat equation.

The solutions are those of Dangel, Mueller, Zeinhofer, NeurIPS 2024.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mfac_kernels.pinn import Condition, Term

__all__ = ["EQUATIONS", "Equation"]

Function = Callable[[Tensor], Tensor]
"""Of points (n, d) -> (n,)."""
_TEST_POINTS = 4000


@dataclass(frozen=True)
class Equation:
    """An equation, its solution, and the network and numbers of points that it is given."""

    title: str
    inputs: int
    solution: Function
    condition: Condition
    width: int
    points: int
    boundary_points: int
    time: bool = False  # the first input is a time, whose boundary is its beginning alone

    def network(self, seed: int) -> nn.Sequential:
        """Two hidden layers with tanh, float64."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            sizes = (self.inputs, self.width, self.width)
            hidden = [m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.Tanh())]
            return nn.Sequential(*hidden, nn.Linear(self.width, 1)).double()

    def terms(self, generator: torch.Generator) -> list[Term]:
        """The equation and its boundary condition, u = the solution, at new points."""
        inside = torch.rand(self.points, self.inputs, generator=generator, dtype=torch.float64)
        border = torch.rand(self.boundary_points, self.inputs, generator=generator, dtype=torch.float64)
        which = torch.randint(self.inputs, (len(border),), generator=generator)
        side = torch.randint(2, (len(border),), generator=generator).double()
        if self.time:
            side = torch.where(which == 0, 0, side)
        border[torch.arange(len(border)), which] = side
        return [(self.condition, inside), (self.boundary, border)]

    @property
    def boundary(self) -> Condition:
        return Condition(lambda x, u: u[:, 0, 0] - self.solution(x), derivatives=False)

    @torch.no_grad()
    def error(self, net: nn.Sequential) -> float:
        """The network's error in L2, relative to the solution's norm, at points that are the same for all."""
        generator = torch.Generator().manual_seed(0)
        x = torch.rand(_TEST_POINTS, self.inputs, generator=generator, dtype=torch.float64)
        exact = self.solution(x)
        return float((net(x)[:, 0] - exact).norm() / exact.norm())


def _poisson(source: Function) -> Condition:
    """- Laplacian of u = source."""
    return Condition(lambda x, u: u[:, -1, 0] + source(x))


def _sines(x: Tensor) -> Tensor:
    return torch.sin(math.pi * x).prod(1)


def _cosines(x: Tensor) -> Tensor:
    return torch.cos(math.pi * x).sum(1)


def _pairs(x: Tensor) -> Tensor:
    return (x[:, ::2] * x[:, 1::2]).sum(1)


def _cooling(x: Tensor) -> Tensor:
    return torch.exp(-x[:, 0]) * torch.sin(2 * x[:, 1:]).sum(1)


EQUATIONS: dict[str, Equation] = {
    "poisson-2d": Equation(
        "Poisson, 2 dimensions, u = sin(pi x1) sin(pi x2)",
        2,
        _sines,
        _poisson(lambda x: 2 * math.pi**2 * _sines(x)),
        width=32,
        points=400,
        boundary_points=100,
    ),
    "poisson-5d": Equation(
        "Poisson, 5 dimensions, u = sum of cos(pi xi)",
        5,
        _cosines,
        _poisson(lambda x: math.pi**2 * _cosines(x)),
        width=48,
        points=400,
        boundary_points=200,
    ),
    "poisson-10d": Equation(
        "Poisson, 10 dimensions, u = x1 x2 + x3 x4 + ... + x9 x10",
        10,
        _pairs,
        _poisson(lambda x: torch.zeros_like(x[:, 0])),
        width=48,
        points=500,
        boundary_points=500,
    ),
    "heat": Equation(
        "Heat, time and 4 dimensions, u_t = Laplacian of u / 4, u = exp(-t) (sum of sin(2 xi))",
        5,
        _cooling,
        Condition(
            lambda x, u: u[:, 1, 0] - u[:, -1, 0] / 4,
            weights=torch.tensor([0.0, 1.0, 1.0, 1.0, 1.0], dtype=torch.float64),
        ),
        width=48,
        points=400,
        boundary_points=200,
        time=True,
    ),
}
