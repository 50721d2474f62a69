"""Small networks and their dense Fisher matrices, from per-sample gradients in plain torch: for two-level K-FAC."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from per_sample import per_sample_gradients
from torch import Tensor, nn

import mfac_kernels as mk
from mfac_kernels.preconditioners.coarse import COARSE_SPACES

F64 = torch.float64
DAMPING = 0.05
SPACES = list(COARSE_SPACES)
COMBINATIONS = ["corrected", "additive", "deflated", "balanced"]


class Attention(nn.Module):
    """A transformer block: embedding, one head of attention, layer norms, a feed-forward part."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(5, 4, padding_idx=0), nn.LayerNorm(4)
        self.q, self.k, self.v = (nn.Linear(4, 4, bias=bias) for bias in (False, True, True))
        self.up, self.down, self.head = nn.Linear(4, 5), nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        y = self.norm(x)
        x = x + F.scaled_dot_product_attention(self.q(y), self.k(y), self.v(y))
        x = x + self.down(torch.tanh(self.up(self.norm(x))))  # the norm is called twice
        return self.head(x)


class Resolutions(nn.Module):
    """Convolutions at two resolutions, with groups, strides, kinds of padding, and a pooled head."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect")
        self.b = nn.Conv2d(4, 4, (3, 2), stride=2, padding=(1, 0), groups=2, bias=False)
        self.c = nn.Conv2d(4, 2, 2, padding="same", dilation=(1, 2))
        self.norm, self.head = nn.GroupNorm(2, 4), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(torch.tanh(self.b(torch.tanh(self.a(x)))))
        return self.head(self.c(x).mean((2, 3)))


def build(kind: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(1)
    n = 7
    x = torch.randn(n, 4, dtype=F64)
    if kind == "linear":
        net: nn.Module = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4, bias=False), nn.Linear(4, 3))
    elif kind == "convolutional":
        net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Conv2d(3, 2, 2, stride=2), nn.Flatten(), nn.Linear(2, 3))
        x = torch.randn(n, 2, 5, 5, dtype=F64)
    elif kind == "normalised":
        net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(27, 4))
        net.extend([nn.BatchNorm1d(4), nn.Linear(4, 3)])
        x = torch.randn(n, 2, 5, 5, dtype=F64)
    elif kind == "resolutions":
        net, x = Resolutions(), torch.randn(n, 2, 6, 6, dtype=F64)
    else:
        net, x = Attention(), torch.randint(0, 5, (n, 4))
    net = net.double()
    with torch.no_grad():
        for q in net.parameters():
            q += 0.1 * torch.randn_like(q)
    return net, x


KINDS = ["linear", "convolutional", "normalised", "resolutions", "transformer"]


def loss_of(net: nn.Module, x: Tensor, average: str = "batch", shift: int = 0) -> Tensor:
    """Cross-entropy against fixed labels, others for another ``shift``; a sum over the positions of a sample."""
    output = net(x)
    labels = (torch.arange(output[..., 0].numel()) * 7 + shift) % 3
    total = F.cross_entropy(output.flatten(0, -2), labels, reduction="sum")
    return total / {"batch": len(output), "positions": len(labels), "sum": 1}[average]


class Case:
    """A step of two-level K-FAC, with all that it is made of, dense.

    ``kept``: of how many samples the Fisher matrix is; with ``fisher_type="mc"`` it is that of other labels.
    """

    def __init__(
        self, kind: str = "linear", average: str = "batch", kept: int | None = None, **options: object
    ) -> None:
        self.net, self.x = build(kind)
        options = {"kl_clip": None, "loss_average": average, **options}
        self.p = mk.TwoLevelKFAC(self.net, DAMPING, **options)
        shift = int(options.get("fisher_type") == "mc")
        if shift:
            with self.p.sampling():
                loss_of(self.net, self.x, average, shift).backward()
        loss_of(self.net, self.x, average).backward()
        layers = self.p._layers
        self.shapes = [layer.gradient().shape for layer in layers]
        self.gradient = flat([layer.gradient() for layer in layers]).clone()
        self.p.step()
        self.step = flat([layer.gradient() for layer in layers])
        self.inverse = torch.block_diag(*(self.p.fisher.inverse(i) for i in range(len(layers))))
        n = len(self.x)
        rows = per_sample_gradients(self.net, layers, lambda: loss_of(self.net, self.x, average, shift), n)[:kept]
        # g = N times the gradient of the mean loss; a sum is N times it; a mean over S positions 1 / S of it
        scale = {"batch": n, "sum": 1 / n, "positions": n * 4 if kind == "transformer" else n}[average]
        self.fisher = scale * n / len(rows) * rows.mT @ rows + DAMPING * torch.eye(rows.shape[1], dtype=F64)
        self.first = self.inverse @ self.gradient
        self.best = torch.linalg.solve(self.fisher, self.gradient)

    def rows(self, space: str) -> Tensor:
        """R0, dense."""
        vectors = self._vectors(space)
        rows = []
        for vector in vectors:
            start = 0
            for shape in self.shapes:
                row = torch.zeros_like(vector)
                row[start : start + shape.numel()] = vector[start : start + shape.numel()]
                rows.append(row / row.abs().max())
                start += shape.numel()
        return torch.stack(rows)

    def _vectors(self, space: str) -> list[Tensor]:
        ones = torch.ones_like(self.gradient)
        residual = self.inverse @ (self.gradient - self.fisher @ self.first)
        if space == "spectral":
            return [flat([self._smallest(i) for i in range(len(self.shapes))])]
        return {
            "nicolaides": [ones],
            "residual": [residual],
            "krylov_nicolaides": [ones, self.inverse @ ones],
            "krylov_residual": [residual, self.inverse @ residual],
        }[space]

    def _smallest(self, i: int) -> Tensor:
        a, b = self.p.fisher.factors(i)
        if self.p.fisher.shapes[i].input_block == 1:
            a = torch.block_diag(*a)[None]
        groups = []
        for g in range(len(a)):
            u, v = torch.linalg.eigh(b[g])[1][:, 0], torch.linalg.eigh(a[g])[1][:, 0]
            groups.append(torch.outer(*(w * w[w.abs().argmax()].sign() for w in (u, v))))
        return torch.cat(groups)

    def coarse(self, space: str) -> tuple[Tensor, Tensor]:
        """F_c and Q."""
        rows = self.rows(space)
        matrix = rows @ self.fisher @ rows.mT
        return matrix, rows.mT @ torch.linalg.solve(matrix, rows)

    def norm(self, x: Tensor) -> float:
        """The squared F-norm of the error of x."""
        return float((x - self.best) @ self.fisher @ (x - self.best))

    def lowered(self) -> float:
        """By how much the step's error is less than that of K-FAC's."""
        return self.norm(self.first) - self.norm(self.step)


def cut(row: Tensor, shapes: list[torch.Size]) -> list[Tensor]:
    return [b.view(s) for b, s in zip(row.split([s.numel() for s in shapes]), shapes, strict=True)]


def flat(blocks: list[Tensor]) -> Tensor:
    return torch.cat([b.flatten() for b in blocks])


def close(a: Tensor, b: Tensor) -> None:
    """To rounding: eps times a condition number of at most 1e6 here."""
    torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9 * float(b.abs().max()))
