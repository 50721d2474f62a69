"""GPTQ of a mixture of experts, a few Hessians at a time: `python -m examples.mixture_of_experts`.

Every expert is a layer of its own, with the tokens that the router sends there. Experts that get none have no Hessian;
their weights are rounded to nearest.

Where experts are slices of one parameter, as in transformers, `LayerHessian(model, experts=["*.experts.*"])` has one
Hessian for each of them, and `gptq(hessians.layer(name), hessians[name])` takes all at once.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

import mfac_kernels as mk


class Experts(nn.Module):
    """Each token to the expert that the router likes best."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, count)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)) for _ in range(count)
        )

    def forward(self, x: Tensor) -> Tensor:
        best, result = self.router(x).argmax(-1), torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            result[best == i] = expert(x[best == i])
        return result


def quantise(model: nn.Module, data: list[Tensor], bits: int, memory: int) -> list[str]:
    """GPTQ of all layers but the router; returns the names of those without tokens, which are rounded to nearest."""
    hessians = mk.pruning.LayerHessian(model, exclude=["router"], memory=memory)
    rounded = []
    for shard in hessians.shards():
        with shard:
            for batch in data:
                model(batch)
        for name, tokens in shard.tokens.items():
            if tokens:
                mk.pruning.gptq(shard.layer(name), shard[name], bits, group_size=32)
            else:
                mk.pruning.round_to_nearest(shard.layer(name), bits, group_size=32)
                rounded.append(name)
    return rounded


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    width, count = 64, 6
    model = Experts(width, count)
    model.router.bias[-1] = -100.0  # which no token likes
    mixing = torch.randn(width, width) / 4
    data = [torch.randn(256, width) @ mixing for _ in range(8)]
    held_out = torch.randn(1024, width) @ mixing
    want = model(held_out)

    nearest = copy.deepcopy(model)
    for expert in nearest.experts:
        for layer in (expert[0], expert[2]):
            mk.pruning.round_to_nearest(layer, 3, group_size=32)
    rounded = quantise(model, data, bits=3, memory=1 << 18)
    print(f"without tokens: {', '.join(rounded)}")
    for name, quantised in {"rounding to nearest": nearest, "GPTQ": model}.items():
        error = (quantised(held_out) - want).square().sum() / want.square().sum()
        print(f"3 bits, {name}: relative squared error {float(error):.4f}")


if __name__ == "__main__":
    main()
