"""Networks whose body is called several times, and their factors by the plain loop of the definition, in float64.

For a pass over N samples, with all calls c of a layer and S positions in all: A = (1/N) sum a a^T and
B = (1/(N S)) sum g g^T, g = N times the gradient of the mean loss; passes are averaged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mfac_kernels as mk

F64 = torch.float64
EKFAC = {"damping_style": "exact", "eigen_correction": True, "inv_update_steps": 9}
KINDS = ("linear", "sequence", "convolution", "strided")


class FixedScaler:
    """A GradScaler with this scale."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def is_enabled(self) -> bool:
        return True

    def _get_scale_async(self) -> Tensor:
        return torch.tensor(self.scale)


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


class Net(nn.Module):
    """A body, called ``calls`` times through ``through`` (a checkpoint, say), and a head."""

    def __init__(self, kind: str, calls: int = 1) -> None:
        super().__init__()
        self.calls = calls
        self.body: nn.Module
        if kind in ("linear", "sequence"):
            self.body, self.head = nn.Linear(3, 3), nn.Linear(3, 2)
        elif kind == "convolution":  # A is kept in compressed form
            self.body, self.head = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 2, 1)
        else:
            self.body, self.head = nn.Conv1d(3, 3, 3, stride=2, padding=1), nn.Conv1d(3, 2, 1, bias=False)
        self.double()
        with torch.no_grad():
            for i, p in enumerate(self.parameters()):
                p.copy_(0.6 * seeded(*p.shape, seed=i))

    def segment(self, x: Tensor) -> Tensor:
        return torch.tanh(self.body(x))

    def forward(self, x: Tensor, through: Callable[..., Any] = lambda f, x: f(x)) -> Tensor:
        for _ in range(self.calls):
            x = through(self.segment, x)
        return self.head(x)


def batch(kind: str, n: int = 5, seed: int = 0, size: int = 0) -> Tensor:
    shape = {"linear": (n, 3), "sequence": (n, 4 + size, 3), "convolution": (n, 3, 4 + size, 3), "strided": (n, 3, 16)}
    return seeded(*shape[kind], seed=seed).requires_grad_()


def loss_of(output: Tensor, seed: int = 9) -> Tensor:
    """A mean over samples of sums over positions."""
    return 0.5 * (output - seeded(*output.shape, seed=seed)).square().sum() / len(output)


def kfac(net: nn.Module, **options: Any) -> mk.KFAC:
    return mk.KFAC(net, 1e-2, **{"kl_clip": None, "factor_decay": 0.0, **options})


def factors(p: mk.KFAC) -> list[Tensor]:
    return [f for i in range(len(p._layers)) for f in p.fisher.factors(i)]


@contextmanager
def gathering(found: list[list[Tensor]], net: nn.Module, **options: Any) -> Iterator[mk.KFAC]:
    """K-FAC for the passes of one step; its factors are appended to ``found``."""
    p = kfac(net, **options)
    yield p
    p.step()
    found.append(factors(p))
    p.remove_hooks()


def state(p: mk.KFAC) -> list[Tensor]:
    """Averages, and moments if there are any, as they are now."""
    return [t.clone() for t in [*factors(p), *getattr(p.fisher._inverses, "moments", [])]]


def rows_of(module: nn.Module, x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """a (N, S, inputs), bias column included, and c (N, S, outputs)."""
    if isinstance(module, nn.Linear):
        a, c = x.reshape(len(x), -1, x.shape[-1]), gradient.reshape(len(x), -1, gradient.shape[-1])
    else:
        if isinstance(module, nn.Conv1d):
            x = x[:, :, None]
            size, stride, padding = ((1, *module.kernel_size), (1, *module.stride), (0, *module.padding))
        else:
            size, stride, padding = module.kernel_size, module.stride, module.padding
        a, c = F.unfold(x, size, stride=stride, padding=padding).mT, gradient.flatten(2).mT
    return (F.pad(a, (0, 1), value=1.0) if module.bias is not None else a), c


def plain(net: Net, losses: Sequence[Callable[[], Tensor]]) -> list[Tensor]:
    """A (1, a, a) and B (1, b, b) of body and head, over passes that are given by their losses."""
    found: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {net.body: [], net.head: []}
    for loss in losses:
        calls: list[tuple[nn.Module, Tensor, Tensor]] = []
        hooks = [
            m.register_forward_hook(lambda m, x, y, calls=calls: calls.append((m, x[0].detach(), y))) for m in found
        ]
        value = loss()
        for hook in hooks:
            hook.remove()
        gradients = torch.autograd.grad(value, [y for _, _, y in calls])
        for module, into in found.items():
            rows = [rows_of(m, x, g) for (m, x, _), g in zip(calls, gradients, strict=True) if m is module]
            a, c = (torch.cat(parts, 1) for parts in zip(*rows, strict=True))
            n, s = c.shape[:2]
            g = n * c
            into.append((torch.einsum("nsi,nsj->ij", a, a) / n, torch.einsum("nsi,nsj->ij", g, g) / (n * s)))
    return [torch.stack(part).mean(0)[None] for pairs in found.values() for part in zip(*pairs, strict=True)]


def assert_same(got: Sequence[Tensor], want: Sequence[Tensor]) -> None:
    """To the rounding of sums of some hundred products: 1e3 eps of the largest entry."""
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12 * float(b.abs().max() + 1e-3))
