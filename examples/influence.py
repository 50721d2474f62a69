"""Influence of training samples, beside networks retrained without them: `python -m examples.influence`.

Without sample i the minimum of (1/n) sum_j l_j(w) + damping |w|^2 / 2 moves by about H^-1 grad l_i / n, and the loss of
test data by its gradient times that (Koh, Liang, ICML 2017). H is taken to be the Fisher matrix of the model's own
labels, which for a cross entropy is the generalised Gauss-Newton matrix:

    F = damping I + (1/n) sum_j sum_k p_k(x_j) v_jk v_jk^T,    v_jk = grad log p_k(x_j)

that is :class:`mfac_kernels.StaticFisher` of the rows sqrt(p_k) v_jk. No d x d matrix is formed.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

import mfac_kernels as mk
from examples._timing import before_and_after

DAMPING = 0.02


def dataset(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two classes, of which each sample is the other with probability 0.1."""
    x = torch.randn(n, 2, generator=generator, dtype=torch.float64)
    flipped = torch.rand(n, generator=generator) < 0.1
    return x, ((x[:, 0] * x[:, 1] + x[:, 0] > 0) ^ flipped).long()


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 2)).double()


def train(model: nn.Module, x: Tensor, y: Tensor, total: int) -> None:
    """To the minimum of sum_j l_j / total + DAMPING |w|^2 / 2."""
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=300, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        penalty = sum(p.square().sum() for p in model.parameters())
        value = F.cross_entropy(model(x), y, reduction="sum") / total + DAMPING / 2 * penalty
        value.backward()
        return value

    optimizer.step(loss)


def log_probability_rows(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """v (n, classes, d) and log p (n, classes)."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def log_p(parameters: dict[str, Tensor], one: Tensor) -> Tensor:
        return functional_call(model, parameters, (one,)).log_softmax(-1)

    rows = vmap(jacrev(log_p), (None, 0))(parameters, x)
    return torch.cat([rows[name].flatten(2) for name in parameters], 2), vmap(log_p, (None, 0))(parameters, x)


def influence(model: nn.Module, x: Tensor, y: Tensor, test: tuple[Tensor, Tensor]) -> Tensor:
    """(n,): by how much the mean loss of ``test`` would grow without each sample."""
    v, log_p = log_probability_rows(model, x)
    rows = (log_p.exp().sqrt().unsqueeze(2) * v).flatten(0, 1)
    fisher = mk.StaticFisher(rows, DAMPING, ngrads=len(x))
    of_test = log_probability_rows(model, test[0])[0]
    towards = fisher.ihvp(-of_test[torch.arange(len(of_test)), test[1]].mean(0))
    return -v[torch.arange(len(v)), y] @ towards / len(x)


@torch.no_grad()
def mean_loss(model: nn.Module, test: tuple[Tensor, Tensor]) -> float:
    return float(F.cross_entropy(model(test[0]), test[1]))


def retrained(model: nn.Module, x: Tensor, y: Tensor, test: tuple[Tensor, Tensor], left_out: int) -> float:
    """By how much that loss does grow: the truth, for the price of a training."""
    own, keep = copy.deepcopy(model), torch.arange(len(x)) != left_out
    train(own, x[keep], y[keep], len(x))
    return mean_loss(own, test) - mean_loss(model, test)


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    (x, y), test = dataset(80, generator), dataset(400, generator)
    model = network()
    for _ in range(4):
        train(model, x, y, len(x))
    scores = influence(model, x, y, test)
    chosen = scores.abs().argsort(descending=True)[::8]  # from the largest to the smallest
    truth = torch.tensor([retrained(model, x, y, test, int(i)) for i in chosen], dtype=torch.float64)
    for i, score, change in zip(chosen.tolist(), scores[chosen].tolist(), truth.tolist(), strict=True):
        print(f"without sample {i:2d}: predicted {score:+.2e}, retrained {change:+.2e}")
    correlation = float(torch.corrcoef(torch.stack([scores[chosen], truth]))[0, 1])
    print(f"correlation: one less an error {1 - correlation:.3f}")
    one = int(chosen[0])
    times = before_and_after(lambda: retrained(model, x, y, test, one), lambda: influence(model, x, y, test), rounds=3)
    print(f"one network retrained, against scores of all samples: {times}")


if __name__ == "__main__":
    main()
