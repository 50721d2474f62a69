"""Layer Hessians: the sum over tokens, whatever the layer, the dtype and the way in which they arrive."""

from __future__ import annotations

import pytest
import torch
from layer_cases import DTYPES, EPS, LAYERS, assert_hessian, inputs, layer, rows, same_hessians
from torch import Tensor, nn

from mfac_kernels import ops
from mfac_kernels.pruning import LayerHessian


def moments(module: nn.Module, batches: list[Tensor]) -> Tensor:
    """sum_t x_t x_t^T as a Hessian is shaped."""
    x = torch.cat([rows(module, batch.cpu()) for batch in batches], 1)
    return (x.mT @ x).squeeze(0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", LAYERS)
def test_every_layer(kind, dtype, device):
    module = layer(kind, dtype).to(device)
    batches = [inputs(kind, dtype, seed=seed).to(device) for seed in range(3)]
    if kind not in ("row", "image"):  # which have no samples
        batches += [inputs(kind, dtype, count=count, seed=3).to(device) for count in (1, 0)]
    with LayerHessian(module) as hessians:
        for batch in batches:
            module(batch)
    tokens = sum(rows(module, batch.cpu()).shape[1] for batch in batches)
    assert hessians.tokens == {"": tokens} and hessians.refused == {"": 0} and list(hessians) == [""]
    assert_hessian(hessians[""], 2 * moments(module, batches) / tokens, tokens, dtype)


@pytest.mark.parametrize(("scale", "factor"), [("hessian", 2 / 13), ("mean", 1 / 13), ("sum", 1.0)])
def test_scales(scale, factor):
    module, batches = layer("linear"), [inputs("linear", count=n, seed=n) for n in (4, 9)]
    with LayerHessian(module, scale=scale) as hessians:
        for batch in batches:
            module(batch)
    assert_hessian(hessians[""], factor * moments(module, batches), 13, torch.float64)


def assert_identity(got: Tensor, cond: Tensor) -> None:
    """U has a relative error of c n eps cond; c = 4, as in tests/ops."""
    unit = torch.eye(got.shape[-1], dtype=torch.float64)
    assert bool(((got - unit).abs() <= 4 * len(unit) * EPS[torch.float64] * cond).all())


@pytest.mark.parametrize("kind", ["sequence", "grouped"])
def test_inverse_factor(kind):
    """U^T U H = I, with H as it is and with dead inputs and damping."""
    module = layer(kind)
    with LayerHessian(module) as hessians:
        module(inputs(kind, count=40))
    h = hessians[""]
    factor = ops.cholesky_inverse_factor(h)
    assert_identity(factor.mT @ factor @ h, torch.linalg.cond(h).max())
    x = inputs(kind, count=40)
    x[:, 0] = 0  # a channel
    with LayerHessian(module) as hessians:
        module(x if kind == "grouped" else x * (torch.arange(12) != 3))
    h = hessians[""]
    dead = h.diagonal(dim1=-2, dim2=-1) == 0
    assert bool(dead.any()) and not bool(dead.all())
    factor = ops.cholesky_inverse_factor(h, 0.01, relative=True, dead=True)
    h = h + torch.diag_embed(dead.double())
    h = h + torch.diag_embed(0.01 * h.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True).expand(h.shape[:-1]))
    assert_identity(factor.mT @ factor @ h, torch.linalg.cond(h).max())


def test_many_tokens_in_16_bits():
    """Sums in bfloat16 would stop at 256 equal terms."""
    module = nn.Linear(2, 1, dtype=torch.bfloat16)
    with LayerHessian(module, scale="sum") as hessians:
        for _ in range(10):
            module(torch.ones(1000, 2, dtype=torch.bfloat16))
    assert torch.equal(hessians[""], torch.full((2, 2), 10_000.0))


@pytest.mark.parametrize("kind", ["sequence", "grouped", "conv2d"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite(kind, bad, device):
    """They are refused and counted, and lose nothing of the others."""
    module = layer(kind).to(device)
    batches = [inputs(kind, seed=seed).to(device) for seed in range(3)]
    broken = batches[1].clone()
    broken.view(-1)[7] = bad
    hessians = LayerHessian(nn.Sequential(nn.Identity(), module))
    with pytest.warns(UserWarning, match="^LayerHessian refused calls whose inputs are not finite: 1: 1$"), hessians:
        for batch in (batches[0], broken, batches[2]):
            module(batch)
    used = [batches[0], batches[2]]
    tokens = sum(rows(module, batch.cpu()).shape[1] for batch in used)
    assert hessians.tokens == {"1": tokens} and hessians.refused == {"1": 1}
    assert_hessian(hessians["1"], 2 * moments(module, used) / tokens, tokens, torch.float64)
    alone = LayerHessian(module)
    with pytest.warns(UserWarning, match="finite: the model itself: 1$"), alone:
        module(broken)
    assert list(alone) == [] and alone.tokens == {"": 0} and alone.refused == {"": 1}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, groups=2),  # 2 x 9 x 9
        nn.Flatten(),
        nn.Linear(36, 10),
        nn.Sequential(nn.Tanh(), nn.Linear(10, 8), nn.Linear(8, 10)),
        nn.Linear(10, 3),
    ).double()


def data(count: int = 3) -> list[Tensor]:
    return list(torch.randn(count, 5, 2, 5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64))


def gathered(model: nn.Module, **options: object) -> LayerHessian:
    with LayerHessian(model, **options) as hessians:
        for batch in data():
            model(batch)
    return hessians


def test_names():
    model = network()
    assert list(gathered(model)) == ["0", "2", "3.1", "3.2", "4"]
    assert list(gathered(model, include=["3.*", "4"])) == ["3.1", "3.2", "4"]
    assert list(gathered(model, include=["3.*", "4"], exclude=["*.1"])) == ["3.2", "4"]
    assert list(gathered(model, exclude=["0"])) == ["2", "3.1", "3.2", "4"]


def test_shared_weights():
    """One Hessian, of the inputs of all that share it."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 4, bias=False)).double()
    model[2].weight = model[0].weight
    x = inputs("linear", count=7)[:, :4]
    with LayerHessian(model) as hessians:
        model(x)
    both = torch.cat([x, model[:2](x).detach()])
    assert hessians.tokens == {"0": 14}
    assert_hessian(hessians["0"], 2 * both.T @ both / 14, 14, torch.float64)


def test_nothing_stays_on_the_model():
    model = network()
    hessians = gathered(model)
    before = hessians.state_dict()
    model(data()[0])
    with pytest.raises(ZeroDivisionError), LayerHessian(model, include=["0"]) as other:
        model(data()[0])
        1 / 0  # noqa: B018
    assert list(other) == ["0"]
    assert all(not module._forward_hooks for module in model.modules())
    assert all(torch.equal(hessians.state_dict()[n]["total"], before[n]["total"]) for n in before)
    with hessians, pytest.raises(RuntimeError, match=r"^LayerHessian: it is gathering already"):
        hessians.__enter__()


def test_going_on_and_states():
    """Entered again, from a state, and the sum of two processes' states."""
    model = network()
    whole, again = gathered(model), LayerHessian(model)
    with again:
        model(data()[0])
    state = again.state_dict()
    with again:
        model(data()[1])
        model(data()[2])
    assert same_hessians(again, whole)
    resumed = LayerHessian(model)
    resumed.load_state_dict(state)
    with resumed:
        for batch in data()[1:]:
            model(batch)
    assert same_hessians(resumed, whole) and resumed.tokens == whole.tokens
    other = LayerHessian(model)
    with other:
        for batch in data()[1:]:
            model(batch)
    added = {n: {key: state[n][key] + other.state_dict()[n][key] for key in state[n]} for n in state}
    resumed.load_state_dict(added)
    assert resumed.tokens == whole.tokens
    for name in whole:
        torch.testing.assert_close(resumed[name], whole[name])
    for change, kind in [
        ({"5": state["0"]}, KeyError),
        ({"0": {"total": state["0"]["total"]}}, KeyError),
        ({"0": state["2"]}, ValueError),
        ({"0": {**state["0"], "tokens": torch.zeros(())}}, ValueError),
    ]:
        with pytest.raises(kind, match="state_dict"):
            resumed.load_state_dict({**state, **change})
        assert resumed.tokens == whole.tokens


SIZES = [2 * 81 * 8, 1296 * 8, 100 * 8, 64 * 8, 100 * 8]  # of the network's Hessians, bytes


@pytest.mark.parametrize(
    ("memory", "parts"),
    [
        (None, [5]),
        (sum(SIZES), [5]),
        (sum(SIZES) - 1, [4, 1]),
        (SIZES[1], [1, 1, 3]),
        (SIZES[1] + SIZES[2], [1, 2, 2]),
    ],
)
def test_shards(memory, parts):
    model = network()
    whole, hessians = gathered(model), LayerHessian(model, memory=memory)
    seen, earlier = [], []
    for shard in hessians.shards():
        assert all(not before for before in earlier), "what came before is let go"
        with shard:
            for batch in data():
                model(batch)
        if memory is not None:
            assert sum(shard[name].nbytes for name in shard) <= memory
        assert all(torch.equal(shard[name], whole[name]) for name in shard)
        seen.append(list(shard))
        earlier.append(shard)
    assert [len(names) for names in seen] == parts and [name for part in seen for name in part] == list(whole)


def test_later_shards_see_what_became_of_earlier_layers():
    model = network()
    first = gathered(model)
    for shard in LayerHessian(model, memory=SIZES[1]).shards():
        with shard:
            for batch in data():
                model(batch)
        for name in shard:
            assert torch.equal(shard[name], gathered(model)[name])
            assert torch.equal(shard[name], first[name]) == (name == "0")
        with torch.no_grad():
            model[0].weight.mul_(0.5)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"scale": "2/T"}, ValueError, "scale: expected 'hessian', 'mean' or 'sum', got '2/T'"),
        ({"memory": 0}, ValueError, "memory: expected at least 1, got 0"),
        ({"include": "0"}, TypeError, "include: expected a sequence of names, got the string '0'"),
        ({"exclude": "0"}, TypeError, "exclude: expected a sequence of names, got the string '0'"),
        ({"include": ["0", "9"]}, ValueError, "include: expected patterns that fit layers, got '9'"),
        ({"exclude": ["1"]}, ValueError, "exclude: expected patterns that fit layers, got '1'"),
        ({"experts": "0"}, TypeError, "experts: expected a sequence of names, got the string '0'"),
        ({"experts": ["2.weight"]}, ValueError, "experts: expected patterns that fit parameters of 3 dimensions, got"),
        ({"exclude": ["*"]}, ValueError, "model: expected linear or convolutional layers, got none"),
    ],
)
def test_errors(options, kind, message):
    with pytest.raises(kind, match=f"^{message}"):
        LayerHessian(network(), **options)


def test_more_errors():
    with pytest.raises(ValueError, match=f"^memory: expected at least {sum(SIZES)} bytes for 5 Hessians at once, got "):
        LayerHessian(network(), memory=sum(SIZES) - 1).__enter__()
    with pytest.raises(ValueError, match=f"^memory: expected at least {SIZES[1]} bytes for the Hessian of 2, got 5000"):
        list(LayerHessian(network(), memory=5000).shards())
    with pytest.raises(ValueError, match=r"^model: expected layers with a shape, got 1: call the model once before"):
        LayerHessian(nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3)))
    with pytest.raises(ValueError, match=r"^model: expected linear or convolutional layers, got none"):
        LayerHessian(nn.Tanh())
    with pytest.raises(KeyError, match="1: expected a layer that Hessians are gathered of"):
        gathered(network())["1"]


def test_compiled():
    """A model compiled inside ``with``; keywords; no gradients, graphs, or modes are touched."""
    model = network()
    compiled = torch.compile(model, backend="eager")
    with LayerHessian(model) as hessians:
        for batch in data():
            compiled(batch).sum().backward()
    assert same_hessians(hessians, gathered(model)) and model.training
    module, x = layer("linear"), inputs("linear")
    with LayerHessian(module) as hessians:
        module(input=x)
    assert hessians.tokens == {"": len(x)} and not hessians[""].requires_grad
