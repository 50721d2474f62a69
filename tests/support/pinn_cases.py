"""Small physics-informed problems, and by autograd what the package computes in one pass."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev, vmap

from mfac_kernels import pinn

F64 = torch.float64


def points(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=F64)


def network(*sizes: int, activation: type[nn.Module] = nn.Tanh, bias: bool = True) -> nn.Sequential:
    """Linear layers of these sizes, an activation between two."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b, bias=bias), activation()]
    return nn.Sequential(*layers[:-1]).double()


def by_autograd(net: nn.Module, x: Tensor, weights: Tensor) -> Tensor:
    """u, its gradient and the trace of its weighted Hessian, (n, d + 2, outputs)."""
    first, second = vmap(jacrev(net))(x), vmap(hessian(net))(x)  # (n, outputs, d), (n, outputs, d, d)
    laplacian = torch.einsum("noii,i->no", second, weights)
    return torch.cat([net(x)[:, None], first.mT, laplacian[:, None]], 1)


def residual(x: Tensor, u: Tensor) -> Tensor:
    """A nonlinear equation, in which every row has a part: derivatives of residuals are of all rows."""
    return u[:, -1, 0] + u[:, 0, 0].square() + u[:, 1, 0] * x[:, 0] - x.sum(1).sin()


EQUATION = pinn.Condition(residual)
BOUNDARY = pinn.Condition(lambda x, u: u[:, 0, 0] - x.prod(1), derivatives=False)


def dense_jacobian(net: nn.Sequential, condition: pinn.Condition, x: Tensor) -> Tensor:
    """J (n, parameters) in the order of the layers' blocks (outputs, inputs + bias), by autograd's Hessians."""

    def of(parameters: dict[str, Tensor], point: Tensor) -> Tensor:
        def u(y: Tensor) -> Tensor:
            return functional_call(net, parameters, (y,))

        trace = torch.einsum("oii->o", hessian(u)(point))
        rows = torch.cat([u(point)[None], jacrev(u)(point).mT, trace[None]])
        return condition.residual(point[None], (rows if condition.derivatives else rows[:1])[None])[0]

    parameters = {name: p.detach() for name, p in net.named_parameters()}
    found = vmap(jacrev(of), (None, 0))(parameters, x)
    blocks = []
    for name, module in net.named_children():
        if isinstance(module, nn.Linear):
            parts = [found[f"{name}.weight"]]
            if module.bias is not None:
                parts.append(found[f"{name}.bias"][..., None])
            blocks.append(torch.cat(parts, -1).flatten(1))
    return torch.cat(blocks, 1)
