"""K-FAC for a physics-informed network beside Adam: `python -m examples.pinn`; eight methods: `mfac-kernels pinn`.

-Laplacian of u = f on the unit square, u = 0 on its border; u = sin(pi x) sin(pi y). What K-FAC is given is the two
conditions, as functions of points and of u with its derivatives there, and points.
"""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor, nn

from mfac_kernels import pinn


def solution(x: Tensor) -> Tensor:
    return torch.sin(math.pi * x).prod(1)


EQUATION = pinn.Condition(lambda x, u: u[:, -1, 0] + 2 * math.pi**2 * solution(x))  # rows u, u_x, u_y, Laplacian
BORDER = pinn.Condition(lambda x, u: u[:, 0, 0], derivatives=False)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 1)).double()


def points() -> tuple[Tensor, Tensor]:
    """Inside (200, 2), and on the border (80, 2)."""
    torch.manual_seed(1)
    inside, border = torch.rand(200, 2).double(), torch.rand(80, 2).double()
    border[:40, 0], border[40:, 1] = border[:40, 0].round(), border[40:, 1].round()
    return inside, border


def error(net: nn.Sequential) -> float:
    x = torch.cartesian_prod(*[torch.linspace(0, 1, 41).double()] * 2)
    with torch.no_grad():
        return float((net(x)[:, 0] - solution(x)).norm() / solution(x).norm())


def main(seconds: float = 1.0) -> None:
    inside, border = points()
    terms = [(EQUATION, inside), (BORDER, border)]
    for name in ("Adam", "K-FAC"):
        net = network()
        adam, kfac = torch.optim.Adam(net.parameters(), 1e-2), pinn.KFAC(net, EQUATION, BORDER, damping=1e-2)
        steps, end = 0, time.perf_counter() + seconds
        while time.perf_counter() < end:
            if name == "Adam":
                adam.zero_grad()
                pinn.loss_of(net, terms).backward()
                adam.step()
            else:
                kfac.step(inside, border)
            steps += 1
        print(f"{name}: {steps} steps, relative L2 {error(net):.1e}")


if __name__ == "__main__":
    main()
