"""KFAC against dense Fisher and Gauss-Newton matrices."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from kfac_cases import F64, kfac, layer_fisher, mse, network, run, seeded
from torch import Tensor, nn

import mfac_kernels as mk


def gather_gauss_newton(net: nn.Module, p: mk.KFAC, x: Tensor) -> None:
    """One backward pass for each unit vector of the output: for the squared error their sum is the expectation."""
    output = net(x)
    with p.sampling():
        for k in range(output[0].numel()):
            (output.flatten(1)[:, k].sum() / len(x)).backward(retain_graph=True)
    output.sum().backward()
    p.step()


def per_sample_gradients(net: nn.Module, x: Tensor, loss, module: nn.Module) -> Tensor:
    """(N, p) of one module: weight and bias side by side, row-major."""
    rows = []
    for i in range(len(x)):
        net.zero_grad()
        loss(net(x[i : i + 1]), i).backward()
        parts = [module.weight.grad.flatten(1)]
        if module.bias is not None:
            parts.append(module.bias.grad[:, None])
        rows.append(torch.cat(parts, 1).flatten())
    net.zero_grad()
    return torch.stack(rows)


def test_one_sample_of_an_mlp_is_exact():
    net = network(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    x, target = seeded(1, 4), seeded(1, 3, seed=9)
    p = kfac(net)
    run(net, p, x, lambda y: mse(y, target))
    for layer, module in enumerate((net[0], net[2])):
        g = per_sample_gradients(net, x, lambda y, i: mse(y, target), module)[0]
        torch.testing.assert_close(layer_fisher(p, layer), torch.outer(g, g), rtol=1e-10, atol=1e-12)


def test_empirical_factors_are_not_the_empirical_fisher():
    net = network(nn.Linear(4, 3))
    x, target = seeded(6, 4), seeded(6, 3, seed=9)
    p = kfac(net)
    run(net, p, x, lambda y: mse(y, target))
    g = per_sample_gradients(net, x, lambda y, i: mse(y, target[i : i + 1]), net[0])
    exact = g.mT @ g / 6
    assert float((layer_fisher(p) - exact).norm()) > 0.1 * float(exact.norm())


@pytest.mark.parametrize("bias", [True, False])
def test_expand_is_the_gauss_newton_matrix_of_a_deep_linear_network(bias):
    """Each position with an output of its own."""
    net = network(nn.Linear(3, 4, bias=bias), nn.Linear(4, 2, bias=bias))
    x = seeded(5, 7, 3)
    p = kfac(net, fisher_type="mc")
    gather_gauss_newton(net, p, x)
    for layer, module in enumerate(net):
        torch.testing.assert_close(layer_fisher(p, layer), gauss_newton(net, x, module), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("pool", ["sum", "mean"])
def test_reduce_is_the_gauss_newton_matrix_of_a_pooled_linear_network(pool):
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = network(nn.Linear(3, 4), nn.Linear(4, 2))

        def forward(self, x: Tensor) -> Tensor:
            h = self.last(self.first(x))
            return h.sum(1) if pool == "sum" else h.mean(1)

    net, x = Pooled(), seeded(5, 7, 3)
    p = kfac(net, fisher_type="mc", approximation="reduce")
    gather_gauss_newton(net, p, x)
    for layer, module in enumerate((net.first, net.last)):
        torch.testing.assert_close(layer_fisher(p, layer), gauss_newton(net, x, module), rtol=1e-10, atol=1e-12)


def gauss_newton(net: nn.Module, x: Tensor, module: nn.Module) -> Tensor:
    """(1/N) sum over samples and outputs of the outer products of gradients."""
    outputs = net(x[:1])[0].numel()
    total = 0
    for k in range(outputs):
        g = per_sample_gradients(net, x, lambda y, i, k=k: y.flatten(1)[0, k], module)
        total = total + g.mT @ g
    return total / len(x)


def test_convolution_factors_are_sums_over_patches_and_pixels():
    net = network(nn.Conv2d(3, 4, 3, stride=2, padding=1))
    x, target = seeded(5, 3, 6, 7), seeded(5, 4, 3, 4, seed=3)
    p = kfac(net)
    run(net, p, x, lambda y: mse(y, target))
    patches = F.pad(F.unfold(x, 3, stride=2, padding=1).transpose(1, 2), (0, 1), value=1.0).flatten(0, 1)
    g = (net(x) - target).detach().flatten(2).transpose(1, 2).flatten(0, 1)
    (a,), (b,) = p.fisher.factors(0)
    torch.testing.assert_close(a, patches.mT @ patches / 5)
    torch.testing.assert_close(b, g.mT @ g / (5 * 12))


def test_sua_is_full_for_a_kernel_of_one():
    x = seeded(4, 3, 5, 5)
    results = []
    for spatial in ("full", "sua"):
        net = network(nn.Conv2d(3, 4, 1), nn.Tanh(), nn.Conv2d(4, 2, 1, bias=False))
        run(net, kfac(net, spatial=spatial), x)
        results.append([q.grad for q in net.parameters()])
    for full, sua in zip(*results, strict=True):
        torch.testing.assert_close(full, sua, rtol=1e-12, atol=1e-12)


def test_a_kernel_that_covers_the_input_is_a_linear_layer():
    x = seeded(6, 2, 3, 3)
    conv, linear = network(nn.Conv2d(2, 4, 3)), network(nn.Linear(18, 4))
    with torch.no_grad():
        linear[0].weight.copy_(conv[0].weight.flatten(1))
        linear[0].bias.copy_(conv[0].bias)
    run(conv, kfac(conv), x)
    run(linear, kfac(linear), x.flatten(1))
    torch.testing.assert_close(conv[0].weight.grad.flatten(1), linear[0].weight.grad, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(conv[0].bias.grad, linear[0].bias.grad, rtol=1e-11, atol=1e-12)


def test_exact_damping_is_the_dense_solve():
    net = network(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2))
    x, target = seeded(7, 2, 3, 3), seeded(7, 2, seed=5)
    p = kfac(net, damping_style="exact")
    net.zero_grad()
    mse(net(x), target).backward()
    before = [layer.gradient() for layer in p._layers]
    p.step()
    for i, (layer, g) in enumerate(zip(p._layers, before, strict=True)):
        fisher = layer_fisher(p, i)
        want = torch.linalg.solve(fisher + 1e-2 * torch.eye(len(fisher), dtype=F64), g.flatten())
        torch.testing.assert_close(layer.gradient().flatten(), want, rtol=1e-8, atol=1e-10)


def test_factored_damping_is_the_dense_solve_of_the_damped_factors():
    net = network(nn.Linear(5, 3))
    x, target = seeded(7, 5), seeded(7, 3, seed=5)
    p = kfac(net)
    net.zero_grad()
    mse(net(x), target).backward()
    g = p._layers[0].gradient()
    p.step()
    (a,), (b,) = p.fisher.factors(0)
    pi = a.trace() / 6 / (b.trace() / 3)
    left = b + (1e-2 / pi).sqrt() * torch.eye(3, dtype=F64)
    right = a + (1e-2 * pi).sqrt() * torch.eye(6, dtype=F64)
    want = torch.linalg.solve(left, g) @ torch.linalg.inv(right)
    torch.testing.assert_close(p._layers[0].gradient(), want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("normalization", ["unit", "diagonal"])
@pytest.mark.parametrize(
    "module", [nn.BatchNorm2d(3), nn.GroupNorm(1, 3), nn.LayerNorm([3, 4, 4]), nn.InstanceNorm2d(3, affine=True)]
)
def test_normalization_blocks_are_the_empirical_fisher(module, normalization):
    if isinstance(module, nn.InstanceNorm2d):
        with pytest.warns(UserWarning, match="InstanceNorm2d"):
            kfac(nn.Sequential(copy.deepcopy(module), nn.Linear(4, 2)))
        return
    net = nn.Sequential(copy.deepcopy(module)).double()
    with torch.no_grad():
        for q in net.parameters():
            q.copy_(seeded(*q.shape))
    x, target = seeded(6, 3, 4, 4), seeded(6, 3, 4, 4, seed=4)
    p = kfac(net, damping=0.1, normalization=normalization)
    net.zero_grad()
    output = net(x)
    mse(output, target).backward()
    gradient = p._layers[0].gradient()
    p.step()
    with torch.no_grad():
        shape = (1, -1) + (1,) * (x.dim() - 2) if net[0].weight.dim() == 1 else net[0].weight.shape
        normal = (output - net[0].bias.view(shape)) / net[0].weight.view(shape)
        g = output - target
        dims = (2, 3) if net[0].weight.dim() == 1 else ()
        rows = torch.stack([(g * normal).sum(dims) if dims else g * normal, g.sum(dims) if dims else g], -1)
        rows = rows.reshape(6, -1, 2)
    blocks = torch.einsum("nui,nuj->uij", rows, rows) / 6
    if normalization == "diagonal":
        blocks = blocks * torch.eye(2, dtype=F64)
    want = torch.linalg.solve(blocks + 0.1 * torch.eye(2, dtype=F64), gradient.view(-1, 2))
    torch.testing.assert_close(p._layers[0].gradient().view(-1, 2), want, rtol=1e-8, atol=1e-10)


def test_embedding_factor_is_diagonal():
    net = network(nn.Embedding(6, 3, padding_idx=0))
    tokens = torch.tensor([[1, 2, 2, 0], [5, 1, 1, 0]])
    p = kfac(net, damping=0.1)
    net.zero_grad()
    mse(net(tokens), torch.ones(2, 4, 3, dtype=F64)).backward()
    before = net[0].weight.grad.clone()
    p.step()
    a, (b,) = p.fisher.factors(0)
    a = a.flatten()
    assert a.tolist() == pytest.approx([0, 1.5, 1, 0, 0, 0.5])
    pi = a.mean() / (b.trace() / 3)
    left = torch.linalg.inv(b + (0.1 / pi).sqrt() * torch.eye(3, dtype=F64))
    want = (before / (a + (0.1 * pi).sqrt())[:, None]) @ left
    torch.testing.assert_close(net[0].weight.grad, want, rtol=1e-10, atol=1e-12)
