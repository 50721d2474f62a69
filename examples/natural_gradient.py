"""Energy natural gradient and SPRING for a physics-informed network: `python -m examples.natural_gradient`.

A step of either is :func:`mfac_kernels.pinn.spring` of the residuals and of their Jacobian, here that of torch.func;
:func:`mfac_kernels.pinn.linearise` has it from one forward Laplacian and one backward pass.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from examples._timing import before_and_after
from mfac_kernels.pinn import spring


def spring_by_torch(
    jacobian: Tensor, residuals: Tensor, damping: float, mu: float = 0.0, phi: Tensor | None = None
) -> Tensor:
    """The same in plain torch and float64."""
    o, b = jacobian.double(), residuals.double()
    before = torch.zeros_like(o[0]) if phi is None else phi.double()
    kernel = o @ o.mT + damping * torch.eye(len(o), dtype=o.dtype, device=o.device)
    solution = torch.cholesky_solve((b - mu * o @ before).unsqueeze(1), torch.linalg.cholesky(kernel))
    return (mu * before + o.mT @ solution.squeeze(1)).to(jacobian.dtype)


class Poisson:
    """-u'' = pi^2 sin(pi x) on (0, 1), u = 0 at the ends; u = sin(pi x). Its residuals as a function of parameters."""

    def __init__(self, width: int, points: int) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(1, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1)
        )
        self.x = torch.linspace(0, 1, points + 2)[1:-1]

    def u(self, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        value: Tensor = functional_call(self.net, parameters, (x.view(1, 1),))
        return x * (1 - x) * value.squeeze()  # which is zero at the ends

    def residual(self, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        curvature = jacrev(jacrev(self.u, 1), 1)(parameters, x)
        return (curvature + math.pi**2 * torch.sin(math.pi * x)) / len(self.x) ** 0.5

    def jacobian(self) -> tuple[Tensor, Tensor]:
        """O (m, d) and r (m,) at the network's parameters."""
        parameters = {name: p.detach() for name, p in self.net.named_parameters()}
        rows = vmap(jacrev(self.residual), (None, 0))(parameters, self.x)
        o = torch.cat([rows[name].flatten(1) for name in parameters], 1)
        return o, vmap(self.residual, (None, 0))(parameters, self.x)

    @torch.no_grad()
    def subtract(self, phi: Tensor) -> None:
        """Move all parameters by -phi."""
        vector = nn.utils.parameters_to_vector(self.net.parameters())
        nn.utils.vector_to_parameters(vector - phi, self.net.parameters())


def main() -> None:
    problem = Poisson(width=32, points=60)
    phi: Tensor | None = None
    for step in range(61):
        o, r = problem.jacobian()
        if step % 20 == 0:
            print(f"step {step}: sum of squared residuals {float(r.square().sum()):.2e}")
        phi = spring(o, r, damping=1e-4, mu=0.5, phi=phi)
        problem.subtract(0.5 * phi)
    o, r = torch.randn(256, 20_000), torch.randn(256)
    got, want = spring(o, r, 1e-3), spring_by_torch(o, r, 1e-3)
    print(f"phi: relative error {float((got - want).norm() / want.norm()):.1e}")
    print(
        f"phi of {tuple(o.shape)}: {before_and_after(lambda: spring_by_torch(o, r, 1e-3), lambda: spring(o, r, 1e-3))}"
    )


if __name__ == "__main__":
    main()
