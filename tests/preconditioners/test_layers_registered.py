"""Layers of the user's own, and those that are known by name, against the plain layers that they equal."""

from __future__ import annotations

import inspect
import textwrap

import pytest
import torch
from gathering_cases import EKFAC, F64, kfac, loss_of, seeded
from layer_cases import Conv1D
from module_cases import WAYS, Repeated, assert_same_layers, stepped
from torch import Tensor, nn

import mfac_kernels as mk
from mfac_kernels.preconditioners.layers import kinds


@pytest.fixture
def registered():
    """What a test registers does not outlive it."""
    known = dict(kinds._KINDS)
    yield mk.KFAC.register
    kinds._KINDS.clear()
    kinds._KINDS.update(known)


class Scale(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


def conv1d(real: bool) -> type[nn.Module]:
    return pytest.importorskip("transformers.pytorch_utils").Conv1D if real else Conv1D


def sequences(passes: int) -> list[Tensor]:
    return [seeded(4, 5, 3, seed=i) for i in range(passes)]


@pytest.mark.parametrize("options", [{}, EKFAC, {"group_size": 2}], ids=["plain", "EKFAC", "groups"])
@pytest.mark.parametrize(("calls", "passes", "approximation"), WAYS)
def test_the_ten_lines_of_the_docstring(calls, passes, approximation, options, registered):
    lines = inspect.getdoc(mk.KFAC.register).split("\n\n")
    code = textwrap.dedent("\n\n".join(part for part in lines if part.startswith("    ")))
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    names = {"mk": mk, "nn": nn, "torch": torch}
    exec(code, names)
    scaled, linear = names["Scaled"](3, 3).double(), nn.Linear(3, 3, bias=False).double()
    with torch.no_grad():
        linear.weight.copy_(scaled.weight)
    plain = nn.Sequential(Scale(3**-0.5), linear)
    got, want = (
        stepped(Repeated(module, calls), sequences(passes), approximation=approximation, **options)
        for module in (scaled, plain)
    )
    assert_same_layers(got, want)


@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize("options", [{}, EKFAC, {"group_size": 2}], ids=["plain", "EKFAC", "groups"])
@pytest.mark.parametrize(("calls", "passes", "approximation"), WAYS)
def test_conv1d_is_a_linear_layer(calls, passes, approximation, options, real):
    linear, other = nn.Linear(3, 3).double(), conv1d(real)(3, 3).double()
    with torch.no_grad():
        other.weight.copy_(linear.weight.T)
        other.bias.copy_(linear.bias)
    got, want = (
        stepped(Repeated(module, calls), sequences(passes), approximation=approximation, **options)
        for module in (other, linear)
    )
    assert_same_layers(got, want)
    torch.testing.assert_close(other.weight.grad, linear.weight.grad.T, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", [(2, 5), (5, 2), (1, 4), (4, 1)])
def test_a_transposed_weight_that_is_not_square(shape):
    linear, other = nn.Linear(*shape).double(), Conv1D(shape[1], shape[0]).double()
    with torch.no_grad():
        other.weight.copy_(linear.weight.T)
        other.bias.copy_(linear.bias)
    assert_same_layers(*(stepped(net, [seeded(6, shape[0])]) for net in (other, linear)))


def test_a_corrected_step_knows_transposed_weights():
    linear, other = nn.Linear(3, 2).double(), Conv1D(2, 3).double()
    with torch.no_grad():
        other.weight.copy_(linear.weight.T)
        other.bias.copy_(linear.bias)
    for net in (linear, other):
        p = mk.TwoLevelKFAC(net, 1e-2, kl_clip=None, coarse_space="krylov_residual")
        loss_of(net(seeded(4, 5, 3))).backward()
        p.step()
    torch.testing.assert_close(other.weight.grad, linear.weight.grad.T, rtol=1e-9, atol=1e-12)


def test_parameters_of_other_names(registered):
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel, self.shift = (nn.Parameter(seeded(*shape)) for shape in ((3, 2), (2,)))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.kernel + self.shift

    class OwnLayer(mk.layers.TransposedLinearLayer):
        weight_name, bias_name = "kernel", "shift"

    registered(Own, OwnLayer)
    own, linear = Own(), nn.Linear(3, 2).double()
    with torch.no_grad():
        linear.weight.copy_(own.kernel.T)
        linear.bias.copy_(own.shift)
    assert_same_layers(*(stepped(net, [seeded(6, 3)]) for net in (own, linear)))


def test_the_nearest_class_counts(registered):
    class Mine(nn.Linear):
        pass

    class Third(Mine):
        pass

    class MineLayer(mk.layers.LinearLayer):
        pass

    assert type(kfac(Mine(3, 2))._layers[0]) is mk.layers.LinearLayer
    registered(Mine, MineLayer)
    assert type(kfac(Third(3, 2))._layers[0]) is MineLayer
    assert type(kfac(nn.Linear(3, 2))._layers[0]) is mk.layers.LinearLayer
    registered(f"{Third.__module__}.{Third.__qualname__}", mk.layers.LinearLayer)
    assert type(kfac(Third(3, 2))._layers[0]) is mk.layers.LinearLayer


@pytest.mark.parametrize(
    ("kind", "layer", "message"),
    [
        (3, mk.layers.LinearLayer, "kind: expected a class of modules, or its name as 'package.module.Class', got 3"),
        ("Linear", mk.layers.LinearLayer, "kind: expected a class of modules, .* got 'Linear'"),
        (dict, mk.layers.LinearLayer, "kind: expected a class of modules, .* got <class 'dict'>"),
        (nn.Linear, nn.Linear, "layer: expected a class derived from mk.layers.Layer, got <class 'torch"),
    ],
)
def test_what_cannot_be_registered(kind, layer, message):
    before = dict(kinds._KINDS)
    with pytest.raises(TypeError, match=message):
        mk.KFAC.register(kind, layer)
    assert before == kinds._KINDS


def test_a_layer_without_the_weight_it_needs_is_named(registered):
    class Empty(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = nn.Parameter(torch.ones(2, 2))

    registered(Empty, mk.layers.LinearLayer)
    with pytest.warns(UserWarning, match="0: it has no weight"):
        kfac(nn.Sequential(Empty(), nn.Linear(2, 2)))


@pytest.mark.parametrize("module", [nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell])
def test_recurrent_layers_are_of_no_kind(module):
    net = nn.ModuleList([module(3, 3), nn.Linear(3, 2)]).to(F64)
    why = f"{module.__name__} is of no kind that has Kronecker factors"
    with pytest.warns(UserWarning, match=f"as they are: 0: {why}$"):
        p = kfac(net)
    assert p.skipped_layers == {"0": why}
