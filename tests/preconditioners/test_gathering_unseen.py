"""Layers that are trained and give no factors are named, once; what cannot be counted is left alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from gathering_cases import F64, Net, assert_same, batch, factors, kfac, loss_of, plain
from torch import Tensor, nn

import mfac_kernels as mk

KINDS = ("linear", "sequence", "convolution")


def in_evaluation(net: Net) -> Callable[[Tensor], Tensor]:
    net.eval()
    return net


def vmapped(net: Net) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.func.vmap(net)(x[:, None])[:, 0] if x.dim() != 2 else torch.func.vmap(net)(x)


def by_function(net: Net) -> Callable[[Tensor], Tensor]:
    def layer(module: nn.Module, x: Tensor) -> Tensor:
        if isinstance(module, nn.Linear):
            return F.linear(x, module.weight, module.bias)
        return F.conv2d(x, module.weight, module.bias, padding=module.padding)

    return lambda x: layer(net.head, torch.tanh(layer(net.body, x)))


def by_forward(net: Net) -> Callable[[Tensor], Tensor]:
    return lambda x: net.head.forward(torch.tanh(net.body.forward(x)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("use", [in_evaluation, vmapped, by_function, by_forward])
def test_calls_that_are_not_seen(use, kind):
    net, x = Net(kind), batch(kind)
    p = kfac(net)
    call = use(net)
    for step in range(3):
        net.zero_grad()
        loss_of(call(x)).backward()
        kept = [q.grad.clone() for q in net.parameters()]
        if step == 0:
            with pytest.warns(UserWarning, match="no factors of them: body, head") as caught:
                p.step()
            assert len(caught) == 1
            assert caught[0].filename == __file__
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                p.step()
        assert all(map(torch.equal, kept, [q.grad for q in net.parameters()]))
    figures = p.diagnostics()
    assert (figures["steps"], figures["seen"], figures["skipped"], figures["layers_without_factors"]) == (3, 0, 0, 2)


@pytest.mark.parametrize("use", [in_evaluation, by_function])
def test_calls_that_are_seen_no_more(use):
    """As where training goes on in evaluation mode."""
    net, x = Net("linear"), batch("linear")
    p = kfac(net)
    call = net
    for step in range(4):
        net.zero_grad()
        loss_of(call(x)).backward()
        if step == 2:
            with pytest.warns(UserWarning, match="saw no call of these layers in this step: .* batches: body, head"):
                p.step()
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            p.step()
        call = use(net) if step == 1 else call
    assert p.fisher.seen == 2


@pytest.mark.parametrize("kind", KINDS)
def test_one_layer_of_two_is_not_seen(kind):
    net, x = Net(kind), batch(kind)
    p = kfac(net)
    loss_of(net.head.forward(net.segment(x))).backward()
    with pytest.warns(UserWarning, match="no factors of them: head"):
        p.step()
    assert p.diagnostics()["layers_without_factors"] == 1
    assert p.fisher.seen == 1
    assert_same(p.fisher.factors(0), plain(net, [lambda: loss_of(net(x))])[:2])


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_was_compiled_and_called_before(kind):
    torch._dynamo.reset()
    net, x = Net(kind), batch(kind)
    model = torch.compile(net, backend="eager")
    model(x)
    p = kfac(net)
    loss_of(model(x)).backward()
    with pytest.warns(UserWarning, match="no factors of them: body, head"):
        p.step()
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["replaced", "added"])
def test_layers_that_come_later(how, kind):
    net, x = Net(kind), batch(kind)
    p = kfac(net)
    if how == "replaced":
        net.body = Net(kind).body
    else:
        net.more = Net(kind).body
        net.segment = lambda x: torch.tanh(net.more(net.body(x)))
    loss_of(net(x)).backward()
    name = "body" if how == "replaced" else "more"
    with pytest.warns(UserWarning, match=f"no factors of them: {name}\\."):
        p.step()
    assert p.diagnostics()["layers_without_factors"] == 1


@pytest.mark.parametrize("what", ["layer", "bias", "norm"])
def test_unfreezing_raises(what):
    net = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 2)).double()
    frozen = {"layer": net[0].weight, "bias": net[2].bias, "norm": net[1].weight}[what]
    owner = {"layer": net[0], "bias": None, "norm": net[1]}[what]
    for q in owner.parameters() if owner else [frozen]:
        q.requires_grad_(False)
    p = kfac(net)
    x = batch("linear")
    loss_of(net(x)).backward()
    p.step()
    frozen.requires_grad_(True)
    kept, steps = [f.clone() for f in factors(p)], p.steps
    loss_of(net(x)).backward()
    with pytest.raises(RuntimeError, match=r"KFAC: \d\.(weight|bias) was frozen at construction .* construct a new"):
        p.step()
    assert p.steps == steps
    assert all(map(torch.equal, kept, factors(p)))


def test_what_was_not_asked_for_may_be_unfrozen():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)).double()
    net[0].requires_grad_(False)
    p = kfac(net, skip_layers=["0"])
    net[0].requires_grad_(True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss_of(net(batch("linear"))).backward()
        p.step()
    assert p.diagnostics()["layers_without_factors"] == 0


def test_no_warning_where_there_is_no_reason():
    """A layer that rests, one whose calls have no samples, steps without use for factors, a pass that is refused."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.first, self.second, self.resting = (nn.Linear(3, 3).double() for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.first(self.gate(x)), self.second(x[:0])])

    net = Experts()
    p = kfac(net, factor_update_steps=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(4):
            net.zero_grad(set_to_none=False)
            (net(batch("linear")).square().sum() * (float("nan") if step == 0 else 1)).backward()
            p.step()
        with p.paused():
            net(batch("linear")).square().sum().backward()
        p.step()
    assert p.diagnostics()["layers_without_factors"] == 0
    assert (p.fisher.seen, p.fisher.skipped) == (1, 1)


# ---- what cannot be counted ------------------------------------------------------------------------------------------


class Pair(nn.Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return super().forward(x), None


UNFIT = {
    "unbatched Conv1d": (nn.Conv1d(3, 2, 2), torch.randn(3, 5), "expected inputs of 3 dimensions"),
    "unbatched Conv2d": (nn.Conv2d(3, 2, 2), torch.randn(3, 5, 5), "expected inputs of 4 dimensions"),
    "unbatched Conv3d": (nn.Conv3d(3, 2, 2), torch.randn(3, 5, 5, 5), "expected inputs of 5 dimensions"),
    "one row": (nn.Linear(3, 2), torch.randn(3), r"expected inputs of at least 2 dimensions, .* got shape \(3,\)"),
    "one row, LayerNorm": (nn.LayerNorm(3), torch.randn(3), "expected inputs of at least 2 dimensions"),
    "a scalar index": (nn.Embedding(5, 2), torch.tensor(3), r"expected inputs of at least 1 dimensions"),
    "a tuple": (Pair(3, 2), torch.randn(4, 3), "expected a tensor as output, got tuple"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_calls_that_cannot_be_counted(name):
    module, x, message = UNFIT[name]
    net = nn.ModuleDict({"odd": module, "other": nn.Linear(2, 2)})
    p = mk.KFAC(net, kl_clip=None)

    def loss() -> Tensor:
        output = net["odd"](x)
        return (output[0] if isinstance(output, tuple) else output).square().sum()

    with pytest.warns(UserWarning, match=f"KFAC leaves the gradient of odd as it is: {message}") as caught:
        (loss() + net["other"](torch.randn(3, 2)).sum()).backward()
    assert len(caught) == 1
    kept = module.weight.grad.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        p.step()
        assert torch.equal(module.weight.grad, kept)
        for _ in range(2):
            loss().backward()
            p.step()
    assert p.diagnostics()["layers_without_factors"] == 1


def test_jagged_tensors():
    net = nn.Sequential(nn.Linear(3, 2))
    p = kfac(net)
    x = torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(4, 3)], layout=torch.jagged)
    with pytest.warns(UserWarning, match="KFAC leaves the gradient of 0 as it is: expected a dense tensor as input"):
        net(x).values().sum().backward()
    p.step()


@pytest.mark.parametrize("second", [0, 1])
def test_layers_of_different_dtypes(second):
    """float32 and float64 in one model: the factors are float64."""
    net = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 2))
    net.double()
    x = batch("linear").detach()
    p = kfac(net)
    loss_of(net(x)).backward()
    p.step()
    p.remove_hooks()
    want = factors(p)
    (net[0] if second else net[2]).float()
    q = kfac(net)
    h = net[1](net[0](x.float() if second else x).double())
    loss_of(net[2](h if second else h.float()).double()).backward()
    q.step()
    assert all(f.dtype == F64 for f in factors(q))
    for got, right in zip(factors(q), want, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-4)


LEFT = {
    "LSTM": (nn.LSTM(3, 2), "LSTM is of no kind that has Kronecker factors"),
    "GRU": (nn.GRU(3, 2), "GRU is of no kind that has Kronecker factors"),
    "RNNCell": (nn.RNNCell(3, 2), "RNNCell is of no kind that has Kronecker factors"),
    "PReLU": (nn.PReLU(), "PReLU is of no kind"),
    "Bilinear": (nn.Bilinear(3, 3, 2), "Bilinear is of no kind"),
    "complex": (nn.Linear(3, 2, dtype=torch.complex64), "expected a real weight, got torch.complex64"),
    "lazy": (nn.LazyLinear(2), "its weight has no shape yet: call the model once before"),
    "scripted": (torch.jit.script(nn.Linear(3, 2)), "it is scripted"),
    "traced": (torch.jit.trace(nn.Linear(3, 2), torch.randn(2, 3)), "it is scripted"),
}


@pytest.mark.parametrize("name", LEFT)
def test_modules_that_are_left_alone(name):
    module, why = LEFT[name]
    with pytest.warns(UserWarning, match=f"odd: {why}") as caught:
        p = mk.KFAC(nn.ModuleDict({"odd": module, "other": nn.Linear(3, 3)}))
    assert len(caught) == 1
    assert [layer.name for layer in p._layers] == ["other"]


def test_transforms_of_functions_run():
    """Their derivatives are no passes of training."""
    net, x = Net("linear"), batch("linear")
    p = kfac(net)
    torch.func.jacrev(net)(x.detach())
    torch.func.jvp(net, (x.detach(),), (x.detach(),))
    parameters = dict(net.named_parameters())
    torch.func.grad(lambda q: loss_of(torch.func.functional_call(net, q, (x,))))(parameters)
    loss_of(net(x)).backward()
    p.step()
    assert_same(factors(p), plain(net, [lambda: loss_of(net(x))]))
