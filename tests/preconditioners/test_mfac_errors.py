"""What MFAC refuses, before anything changes."""

from __future__ import annotations

import pytest
import torch
from mfac_cases import assert_equal, backward, batches, grads, mlp, tensors
from torch import Tensor, nn

import mfac_kernels as mk


def freeze(model: nn.Module) -> None:
    model[2].bias.requires_grad_(False)


def resize(model: nn.Module) -> None:
    model[2].bias.grad = None
    model[2].bias.data = torch.zeros(5)


def sparse_gradient(model: nn.Module) -> None:
    model[2].weight.grad = model[2].weight.grad.to_sparse()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (freeze, r"parameter 3 of shape \(3,\) no longer requires a gradient"),
        (resize, r"parameter 3: expected shape \(3,\) on cpu, as at construction, got \(5,\) on cpu"),
        (sparse_gradient, "parameter 2: expected a dense gradient, got a sparse one"),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
@pytest.mark.parametrize("per_group", [False, True])
def test_changed_parameters_are_refused_and_nothing_changes(change, message, per_group):
    model = mlp(torch.float32)
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters()}]
    p = mk.MFAC(groups, 3, lambda t: 0.1 / (1 + t), momentum=0.9, per_group=per_group)
    for x, y in batches(2, torch.float32):
        backward(model, x, y)
        p.step()
    backward(model, *batches(1, torch.float32)[0])
    change(model)
    if per_group:
        message = message.replace("parameter 3", "parameter 1").replace("parameter 2", "parameter 0")
    before, dense = tensors(p.state_dict()), tensors(model[0].weight.grad)
    with pytest.raises(RuntimeError, match=f"MFAC: {message}"):
        p.step()
    assert_equal(p.state_dict(), before)
    assert_equal(model[0].weight.grad, dense)


def test_a_parameter_unfrozen_later_is_refused():
    model = mlp(torch.float32)
    freeze(model)
    p = mk.MFAC(model.parameters(), 3, 0.1)
    backward(model, *batches(1, torch.float32)[0])
    p.step()
    model[2].bias.requires_grad_(True)
    with pytest.raises(RuntimeError, match="frozen at construction requires a gradient now"):
        p.step()
    assert (p.steps, p.windows[0].seen) == (1, 1)


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("momentum", 1.0, ValueError),
        ("momentum", -0.1, ValueError),
        ("momentum", float("nan"), ValueError),
        ("momentum", None, TypeError),
        ("weight_decay", -1e-9, ValueError),
        ("weight_decay", float("inf"), ValueError),
        ("weight_decay", 1e300, ValueError),
        ("weight_decay", "0.1", TypeError),
        ("damping", 0.0, ValueError),
        ("damping", float("nan"), ValueError),
        ("damping", [1e-5], TypeError),
    ],
)
@pytest.mark.parametrize("function", [False, True], ids=["number", "function"])
def test_hyper_parameters_out_of_range(name, value, kind, function):
    bad = (lambda t: value) if function else value
    with pytest.raises(kind, match=rf"^{name}: expected .* got "):
        mk.MFAC(mlp().parameters(), 3, **{name: bad})
    model = mlp(torch.float32)
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters()}]
    p = mk.MFAC(groups, 3, 0.1, momentum=0.9, per_group=True)
    backward(model, *batches(1, torch.float32)[0])
    p.step()
    setattr(p, name, bad)
    before = tensors([p.state_dict(), grads(model)])
    with pytest.raises(kind, match=rf"^{name}: expected .* got "):
        p.step()
    assert_equal([p.state_dict(), grads(model)], before)


def parameter(*shape: int, **options: object) -> Tensor:
    return torch.ones(*shape, requires_grad=True, **options)


W = parameter(2)


FLOATS = "float32, float64, bfloat16 or float16"
NONE_TRAINED = "params: expected at least one parameter that requires a gradient, got none"
TWICE = "params: expected each parameter once, got one twice"
TWO_DEVICES = [W, parameter(2, device="meta")]
COMPLEX = [parameter(2, dtype=torch.complex64)]


@pytest.mark.parametrize(
    ("params", "options", "kind", "message"),
    [
        ([], {}, ValueError, NONE_TRAINED),
        ([torch.ones(2)], {}, ValueError, NONE_TRAINED),
        (W, {}, TypeError, "params: expected an iterable of tensors or groups, got a tensor"),
        ([W, W], {}, ValueError, TWICE),
        ([{"params": [W]}, {"params": W}], {}, ValueError, TWICE),
        ([W, 3], {}, TypeError, "params: expected tensors, got int"),
        ([("w", W)], {}, TypeError, "params: expected tensors, got tuple"),
        ([{"params": [W]}, W], {}, TypeError, "params: expected tensors, got dict"),
        (TWO_DEVICES, {}, ValueError, "params: expected parameters on one device, got cpu, meta"),
        (COMPLEX, {}, TypeError, "params: expected floating-point parameters, got torch.complex64"),
        ([W], {"ngrads": 0}, ValueError, "ngrads: expected at least 1, got 0"),
        ([W], {"dtype": torch.int8}, TypeError, f"dtype: expected {FLOATS}, got torch.int8"),
        ([W], {"momentum_mode": "n"}, ValueError, "momentum_mode: expected 'coupled' or 'decoupled', got 'n'"),
        (
            [W],
            {"weight_decay_mode": None},
            ValueError,
            "weight_decay_mode: expected 'coupled' or 'decoupled', got None",
        ),
        ([W], {"normalize": "m"}, ValueError, "normalize: expected 'ngrads' or 'seen', got 'm'"),
    ],
)
def test_bad_arguments(params, options, kind, message):
    with pytest.raises(kind) as caught:
        mk.MFAC(params, **options)
    assert str(caught.value) == message


def test_parameters_cannot_be_added():
    p = mk.MFAC([parameter(2)])
    with pytest.raises(RuntimeError, match=r"parameters cannot be added: .* construct a new MFAC"):
        p.add_param_group({"params": [parameter(2)]})
