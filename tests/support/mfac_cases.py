"""A network, batches and steps for the tests of MFAC."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product

import torch
from torch import Tensor, nn

import mfac_kernels as mk

MODES = ["coupled", "decoupled"]
BOTH = list(product(MODES, MODES))


def mlp(dtype: torch.dtype = torch.float64, device: str = "cpu", seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    return model.to(device=device, dtype=dtype)


def batches(count: int, dtype: torch.dtype = torch.float64, device: str = "cpu") -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    draws = [(torch.randn(8, 4, generator=generator), torch.randn(8, 3, generator=generator)) for _ in range(count)]
    return [(x.to(device, dtype), y.to(device, dtype)) for x, y in draws]


def backward(model: nn.Module, x: Tensor, y: Tensor) -> None:
    model.zero_grad()
    nn.functional.mse_loss(model(x), y).backward()


def flat(tensors: Iterable[Tensor | None], like: Iterable[Tensor]) -> Tensor:
    return torch.cat(
        [torch.zeros_like(p).flatten() if t is None else t.flatten() for t, p in zip(tensors, like, strict=True)]
    )


def grads(model: nn.Module) -> list[Tensor | None]:
    return [p.grad for p in model.parameters()]


def tensors(state: object) -> list[Tensor]:
    """Every tensor and number of a state dict, copied."""
    if isinstance(state, Tensor):
        return [state.clone()]
    if isinstance(state, dict):
        return [t for value in state.values() for t in tensors(value)]
    if isinstance(state, list):
        return [t for value in state for t in tensors(value)]
    return [torch.tensor(state)] if isinstance(state, (int, float)) else []


def assert_equal(a: object, b: object) -> None:
    for x, y in zip(tensors(a), tensors(b), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


def train(
    model: nn.Module, data: list[tuple[Tensor, Tensor]], run: nn.Module | None = None, **options: object
) -> mk.MFAC:
    p = mk.MFAC(model.parameters(), 3, 0.1, momentum=0.9, weight_decay=0.01, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for x, y in data:
        optimizer.zero_grad()
        nn.functional.mse_loss((run or model)(x), y).backward()
        p.step()
        optimizer.step()
    return p
