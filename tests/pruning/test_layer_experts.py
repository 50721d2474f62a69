"""Mixtures of experts: each expert has the tokens that go there, be it a module or a slice of a parameter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from layer_cases import assert_hessian, inputs, same_hessians
from torch import Tensor, nn

from mfac_kernels.pruning import LayerHessian


class Experts(nn.Module):
    """Every token to one of the experts: those that no token goes to are called with none, or not at all."""

    def __init__(self, count: int, call_all: bool) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(count))
        self.call_all = call_all

    def forward(self, x: Tensor, expert: Tensor) -> Tensor:
        result = torch.zeros_like(x)
        for i, own in enumerate(self.experts):
            here = expert == i
            if self.call_all or bool(here.any()):
                result[here] = own(x[here])
        return result


@pytest.mark.parametrize("call_all", [True, False])
def test_experts(call_all):
    model = Experts(4, call_all).double()
    x, expert = inputs("linear", count=50)[:, :6], torch.arange(50) % 3
    expert[0] = 3
    expert[expert == 1] = 2  # nothing goes to 1, one token to 3
    with LayerHessian(model) as hessians:
        model(x[:30], expert[:30])
        model(x[30:], expert[30:])
    assert hessians.tokens == {f"experts.{i}": int((expert == i).sum()) for i in range(4)}
    assert list(hessians) == ["experts.0", "experts.2", "experts.3"] and len(hessians) == 3
    assert "experts.1" not in hessians and "experts.3" in hessians
    with pytest.raises(KeyError, match=r"experts\.1: expected a layer that was given tokens"):
        hessians["experts.1"]
    for i in (0, 2, 3):
        own = x[expert == i]
        assert_hessian(hessians[f"experts.{i}"], 2 * own.T @ own / len(own), 50, torch.float64)


class Stacked(nn.Module):
    """Experts as parameters; each token to one of them."""

    def __init__(self, way: str, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.before = nn.Linear(8, 8, dtype=dtype)
        self.up = nn.Parameter(torch.randn(5, 16, 8, generator=generator).to(dtype))
        self.down = nn.Parameter(torch.randn(5, 8, 16, generator=generator).to(dtype))
        self.after = nn.Linear(8, 2, dtype=dtype)
        self.way = way

    def forward(self, x: Tensor, expert: Tensor) -> Tensor:
        x, order = self.before(x), expert.argsort(stable=True)
        counts = expert.bincount(minlength=5)
        if self.way == "grouped":
            offs = counts.cumsum(0).int()
            hidden = F.grouped_mm(x[order], self.up.mT, offs=offs).tanh()
            y = F.grouped_mm(hidden, self.down.mT, offs=offs)
        else:
            parts = x[order].split(counts.tolist())
            y = torch.cat([F.linear(F.linear(p, self.up[i]).tanh(), self.down[i]) for i, p in enumerate(parts)])
        return self.after(torch.zeros_like(x).index_copy(0, order, y))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", ["linear", "grouped"])
def test_stacked_experts(way, dtype):
    model = Stacked(way, dtype)
    x, expert = inputs("linear", dtype, count=60)[:, :8], torch.arange(60) % 4
    expert[expert == 2] = 4
    with torch.no_grad(), LayerHessian(model, experts=["up", "d*"], exclude=["before"]) as hessians:
        model(x[:35], expert[:35])
        model(x[35:], expert[35:])
    assert list(hessians) == ["up", "down", "after"], "in the order of the model"
    counts = [int((expert == i).sum()) for i in range(5)]
    assert hessians.tokens == {"up": counts, "down": counts, "after": 60}
    assert hessians.refused == {"up": [0] * 5, "down": [0] * 5, "after": 0}
    assert hessians.layer("up") is model.up and hessians.layer("after") is model.after
    for i, count in enumerate(counts):
        own = model.before(x[expert == i]).detach().double()
        assert_hessian(hessians["up"][i], 2 * own.T @ own / max(1, count), count, dtype)
        assert bool(hessians["down"][i].any()) == (count > 0)
    again = LayerHessian(model, experts=["*"], exclude=["before"])
    again.load_state_dict(hessians.state_dict())
    assert same_hessians(again, hessians)


def test_stacked_experts_that_are_refused():
    """Each by itself."""
    model = Stacked("linear", torch.float64)
    x, expert = inputs("linear", count=20)[:, :8], torch.arange(20) % 5
    x[2] = float("nan")
    hessians = LayerHessian(model, experts=["up"], include=["after"])
    message = r"finite: up: \[0, 0, 1, 0, 0\], after: 1$"
    with pytest.warns(UserWarning, match=message), hessians:
        model(x, expert)
    assert hessians.tokens == {"up": [4, 4, 0, 4, 4], "after": 0} and list(hessians) == ["up"]
    own = model.before(x[expert == 1]).detach()
    assert_hessian(hessians["up"][1], 2 * own.T @ own / 4, 4, torch.float64)
    assert not bool(hessians["up"][2].any())


def test_products_that_are_not_the_experts():
    """Weights of another shape in the same memory, of another name, and products that are none of the two."""
    model = Stacked("linear", torch.float64)
    x = inputs("linear", count=20)[:, :8]
    with LayerHessian(model, experts=["up"], include=["after"]) as hessians:
        F.linear(x, model.up[0, :3])
        F.linear(x, model.up[0].clone())
        F.linear(x[:0], model.up[0])
        x @ model.up[0].mT
        torch.bmm(x.expand(5, 20, 8), model.up.mT)
    assert hessians.tokens == {"up": [0] * 5, "after": 0} and not hessians
    with hessians:
        F.linear(x.view(4, 5, 8), weight=model.up[3], bias=None)
    assert hessians.tokens["up"] == [0, 0, 0, 20, 0]
    F.linear(x, model.up[3])
    assert hessians.tokens["up"] == [0, 0, 0, 20, 0]
