"""Only passes that compute the weight's gradient give factors: probes, penalties, dropped outputs leave no trace."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from gathering_cases import KINDS, Net, assert_same, batch, factors, gathering, kfac, loss_of, plain
from torch import Tensor

import mfac_kernels as mk


def probe_inputs(net: Net, x: Tensor, output: Tensor) -> None:
    torch.autograd.grad(output.sum(), x, create_graph=True)


def probe_all_inputs(net: Net, x: Tensor, output: Tensor) -> None:
    for part in output.flatten(1).unbind(1)[:3]:
        torch.autograd.grad(1e5 * part.sum(), x, retain_graph=True)


def probe_an_output(net: Net, x: Tensor, output: Tensor) -> None:
    """As for a saliency map."""
    torch.autograd.grad(output.square().sum(), output, retain_graph=True)


def backward_to_inputs(net: Net, x: Tensor, output: Tensor) -> None:
    output.sum().backward(inputs=[x], retain_graph=True)


def penalty(net: Net, x: Tensor, output: Tensor) -> None:
    """Its derivative is taken inside: a pass through the graph of another."""
    (g,) = torch.autograd.grad(output.sum(), x, create_graph=True)
    torch.autograd.grad(g.square().sum(), x, retain_graph=True)


def another_forward(net: Net, x: Tensor, output: Tensor) -> None:
    net(3 * x)


def several_forwards(net: Net, x: Tensor, output: Tensor) -> None:
    for _ in range(3):
        kept = net(3 * x)
        del kept


def a_derivative_of_another_forward(net: Net, x: Tensor, output: Tensor) -> None:
    y = (2 * x).detach().requires_grad_()
    torch.autograd.grad(net(y).sum(), y)


def a_forward_without_gradients(net: Net, x: Tensor, output: Tensor) -> None:
    with torch.no_grad():
        net(3 * x)
    with torch.inference_mode():
        net(3 * x.detach())


def evaluation(net: Net, x: Tensor, output: Tensor) -> None:
    net.eval()
    torch.autograd.grad(net(3 * x).sum(), x)
    net.train()


PROBES: list[Callable[[Net, Tensor, Tensor], None]] = [
    probe_inputs,
    probe_all_inputs,
    probe_an_output,
    backward_to_inputs,
    penalty,
    another_forward,
    several_forwards,
    a_derivative_of_another_forward,
    a_forward_without_gradients,
    evaluation,
]


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("probe", PROBES)
def test_probes_leave_no_trace(probe, kind, calls, k):
    net, x = Net(kind, calls), batch(kind)
    p = kfac(net, accumulation_steps=k)
    for _ in range(k):
        output = net(x)
        probe(net, x, output)
        (loss_of(output) / k).backward()
    p.step()
    want = plain(net, [lambda: loss_of(net(x))])
    assert_same(factors(p), want)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("probe", PROBES)
def test_probes_before_labels_are_sampled(probe, kind):
    net, x = Net(kind, 2), batch(kind)
    p = kfac(net, fisher_type="mc")
    output = net(x)
    probe(net, x, output)
    with p.sampling():
        probe(net, x, output)
        loss_of(output, 3).backward(retain_graph=True)
    loss_of(output).backward()
    p.step()
    assert_same(factors(p), plain(net, [lambda: loss_of(net(x), 3)]))


def step_with(net: Net, p: mk.KFAC, compute: Callable[[Tensor], None], x: Tensor) -> list[Tensor]:
    net.zero_grad()
    compute(loss_of(net(x)))
    p.step()
    found = factors(p)
    p.remove_hooks()
    return found


@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_every_way_to_ask_for_the_weights_counts(kind, calls):
    """backward(), backward(inputs=), autograd.grad: the same factors."""
    net, x = Net(kind, calls), batch(kind)
    weights = [net.body.weight, net.head.weight]
    ways: list[Callable[[Tensor], None]] = [
        lambda loss: loss.backward(),
        lambda loss: loss.backward(inputs=weights),
        lambda loss: [setattr(w, "grad", g) for w, g in zip(weights, torch.autograd.grad(loss, weights), strict=True)],
        lambda loss: torch.autograd.grad(loss, [x, *weights]),
    ]
    want = plain(net, [lambda: loss_of(net(x))])
    for way in ways:
        assert_same(step_with(net, kfac(net), way, x), want)


@pytest.mark.parametrize("kind", KINDS)
def test_a_pass_to_one_of_two_layers(kind):
    net, x = Net(kind), batch(kind)
    p = kfac(net)
    loss_of(net(x)).backward(inputs=[net.head.weight])
    p.step()
    assert float(p.fisher.factors(0)[0].abs().sum()) == 0
    assert_same(p.fisher.factors(1), plain(net, [lambda: loss_of(net(x))])[2:])


@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_a_penalty_on_derivatives(kind, calls):
    """What comes back to an output by way of the penalty is in B; the penalty's own way to the weights is not."""
    net, x = Net(kind, calls), batch(kind)

    def loss() -> Tensor:
        output = net(x)
        (g,) = torch.autograd.grad(output.sum(), x, create_graph=True)
        return loss_of(output) + 0.1 * (g.flatten(1).norm(dim=1) - 1).square().mean()

    p = kfac(net)
    loss().backward()
    p.step()
    assert_same(factors(p), plain(net, [loss]))


@pytest.mark.parametrize("kind", KINDS)
def test_paused_passes_are_none(kind):
    """Whether forward, backward or both are paused; contexts nest; gradients are as they are."""
    net, x = Net(kind, 2), batch(kind)
    p = kfac(net)
    output = net(x)
    with p.paused():
        with p.paused():
            loss_of(net(2 * x)).backward()
        loss_of(output, 1).backward(retain_graph=True)
        another = net(3 * x)
    loss_of(another).backward()
    loss_of(output).backward()
    assert float(net.body.weight.grad.abs().sum()) > 0
    p.step()
    assert_same(factors(p), plain(net, [lambda: loss_of(net(x))]))


@pytest.mark.parametrize("kind", KINDS)
def test_the_second_pass_of_sam(kind):
    net, x, found = Net(kind), batch(kind), []
    for sharp in (False, True):
        with gathering(found, net) as p:
            net.zero_grad()
            loss_of(net(x)).backward()
            if sharp:
                with p.paused():
                    loss_of(net(x), 4).backward()
    assert_same(*found)


def test_outputs_that_are_written_to():
    """As by an activation in place: the gradient is that of what the layer returned."""
    found = []
    for inplace in (False, True):
        net = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.ReLU(inplace=inplace), torch.nn.Linear(3, 2)).double()
        with torch.no_grad():
            for q in net.parameters():
                q.copy_(torch.linspace(-1, 1, q.numel()).view_as(q))
        p = kfac(net)
        loss_of(net(batch("linear"))).backward()
        p.step()
        found.append(factors(p))
    assert_same(*found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_that_are_written_to_under_autocast(dtype):
    """Autograd keeps the cast of an input alone, so the input itself may change."""
    layer, x = torch.nn.Linear(3, 2), torch.randn(6, 3)
    p = kfac(layer)
    y = x.clone()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        output = layer(y)
    if dtype == torch.bfloat16:
        y += 100
    output.square().mean().backward()
    p.step()
    rows = torch.nn.functional.pad(x.to(dtype).float(), (0, 1), value=1.0)
    torch.testing.assert_close(p.fisher.factors(0)[0][0], rows.mT @ rows / 6)


def test_gathering_in_evaluation_mode():
    """As for an influence function or a Laplace approximation."""
    net, x = Net("linear"), batch("linear")
    net.eval()
    p = kfac(net, gather="always")
    loss_of(net(x)).backward()
    p.step()
    assert_same(factors(p), plain(net, [lambda: loss_of(net(x))]))


def test_compiled_models_and_probes():
    torch._dynamo.reset()
    net, x = Net("linear", 2), batch("linear")
    p = kfac(net)
    model = torch.compile(net, backend="aot_eager")
    for _ in range(2):
        output = model(x)
        torch.autograd.grad(output.sum(), x, retain_graph=True)
        net.zero_grad()
        loss_of(output).backward()
        p.step()
    assert_same(factors(p), plain(net, [lambda: loss_of(net(x))]))
