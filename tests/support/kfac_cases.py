"""Networks, losses and steps for the tests of KFAC."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import mfac_kernels as mk

F64 = torch.float64


def seeded(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def network(*modules: nn.Module, seed: int = 0) -> nn.Sequential:
    """In float64, weights of unit scale."""
    net = nn.Sequential(*modules).double()
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            p.copy_(seeded(*p.shape, seed=seed + i) / max(1, p[0].numel()) ** 0.5)
    return net


def mse(output: Tensor, target: Tensor) -> Tensor:
    """Half the squared error of a sample, averaged over samples: its Hessian in the output is I / N."""
    return 0.5 * (output - target).square().sum() / len(output)


def run(net: nn.Module, p: mk.KFAC, x: Tensor, loss=lambda y: mse(y, torch.zeros_like(y))) -> None:
    net.zero_grad()
    loss(net(x)).backward()
    p.step()


def kfac(net: nn.Module, damping: float = 1e-2, **options: object) -> mk.KFAC:
    return mk.KFAC(net, damping, **{"kl_clip": None, **options})


def layer_fisher(p: mk.KFAC, layer: int = 0) -> Tensor:
    """B (x) A, undamped, over the gradient row-major."""
    a, b = p.fisher.factors(layer)
    return torch.block_diag(*(torch.kron(y, x) for x, y in zip(a, b, strict=True)))
