"""KFAC against dense Fisher matrices, Gauss-Newton matrices and itself on other roads to the same numbers."""

from __future__ import annotations

import copy
import itertools
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

import mfac_kernels as mk

F64 = torch.float64


def seeded(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def network(*modules: nn.Module, seed: int = 0) -> nn.Sequential:
    """In float64, weights of unit scale."""
    net = nn.Sequential(*modules).double()
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            p.copy_(seeded(*p.shape, seed=seed + i) / max(1, p[0].numel()) ** 0.5)
    return net


def mse(output: Tensor, target: Tensor) -> Tensor:
    """Half the squared error of a sample, averaged over samples: its Hessian in the output is I / N."""
    return 0.5 * (output - target).square().sum() / len(output)


def run(net: nn.Module, p: mk.KFAC, x: Tensor, loss=lambda y: mse(y, torch.zeros_like(y))) -> None:
    net.zero_grad()
    loss(net(x)).backward()
    p.step()


def gather_gauss_newton(net: nn.Module, p: mk.KFAC, x: Tensor) -> None:
    """One backward pass for each unit vector of the output: for the squared error their sum is the expectation."""
    output = net(x)
    with p.sampling():
        for k in range(output[0].numel()):
            (output.flatten(1)[:, k].sum() / len(x)).backward(retain_graph=True)
    output.sum().backward()
    p.step()


def kfac(net: nn.Module, damping: float = 1e-2, **options: object) -> mk.KFAC:
    return mk.KFAC(net, damping, **{"kl_clip": None, **options})


def layer_fisher(p: mk.KFAC, layer: int = 0) -> Tensor:
    """B (x) A, undamped, over the gradient row-major."""
    a, b = p.fisher.factors(layer)
    return torch.block_diag(*(torch.kron(y, x) for x, y in zip(a, b, strict=True)))


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


# ---- oracles --------------------------------------------------------------------------------------------------------


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
    assert a.tolist() == pytest.approx([0, 1.5, 1, 0, 0, 0.5])
    pi = a.mean() / (b.trace() / 3)
    left = torch.linalg.inv(b + (0.1 / pi).sqrt() * torch.eye(3, dtype=F64))
    want = (before / (a + (0.1 * pi).sqrt())[:, None]) @ left
    torch.testing.assert_close(net[0].weight.grad, want, rtol=1e-10, atol=1e-12)


# ---- options --------------------------------------------------------------------------------------------------------


CONVS = {
    "dilation": nn.Conv2d(4, 6, 3, dilation=2, padding=2),
    "same": nn.Conv2d(4, 6, (3, 2), padding="same"),
    "groups": nn.Conv2d(4, 6, 3, groups=2, stride=2),
    "depthwise": nn.Conv2d(4, 4, 3, groups=4, padding=1),
    "circular": nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
}


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize("name", CONVS)
def test_convolutions_of_all_kinds(name, approximation):
    """Against patches found by autograd."""
    module = copy.deepcopy(CONVS[name])
    net = nn.Sequential(module).double()
    x = seeded(3, 4, 6, 5)
    p = kfac(net, approximation=approximation)
    output = net(x)
    target = seeded(*output.shape, seed=8)
    net.zero_grad()
    mse(output, target).backward()
    p.step()
    # Patches by autograd: the weight's gradient of one output pixel is the patch that it sees.
    n, positions = len(x), output[0, 0].numel()
    g = (output - target).detach().flatten(2)
    a, b = p.fisher.factors(0)
    groups, per_group = module.groups, module.out_channels // module.groups
    for group in range(groups):
        rows = torch.empty(n, positions, a.shape[-1], dtype=F64)
        channel = group * per_group
        for i in range(n):
            for s in range(positions):
                pixel = net(x[i : i + 1]).flatten(2)[0, channel, s]
                weight, bias = torch.autograd.grad(pixel, (module.weight, module.bias))
                rows[i, s] = torch.cat([weight[channel].flatten(), bias[channel : channel + 1]])
        outputs = g[:, channel : channel + per_group].transpose(1, 2)
        if approximation == "reduce":
            summed, mean = rows.sum(1), outputs.mean(1)
            want_a, want_b = summed.mT @ summed / n, mean.mT @ mean / n
        else:
            flat, pixels = rows.flatten(0, 1), outputs.flatten(0, 1)
            want_a, want_b = flat.mT @ flat / n, pixels.mT @ pixels / (n * positions)
        torch.testing.assert_close(a[group], want_a, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(b[group], want_b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_convolutions_of_all_dimensions(dims):
    kind = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
    net = network(kind(2, 3, 2, padding=1), nn.Flatten(), nn.Linear(3 * 4**dims, 2))
    x = seeded(4, 2, *[3] * dims)
    p = kfac(net)
    run(net, p, x)
    assert all(bool(q.grad.isfinite().all()) for q in net.parameters())
    assert p.diagnostics()["seen"] == 1


def test_groups_of_one_and_one_group():
    x, target = seeded(8, 6), seeded(8, 4, seed=3)
    results = {}
    for size in (None, 100, (7, 4), 1):
        net = network(nn.Linear(6, 4))
        p = kfac(net, group_size=size)
        run(net, p, x, lambda y: mse(y, target))
        results[size] = (net[0].weight.grad.clone(), p.fisher.factors(0))
    for size in (100, (7, 4)):
        torch.testing.assert_close(results[size][0], results[None][0], rtol=1e-12, atol=0)
    (a, b), (ones_a, ones_b) = results[None][1], results[1][1]
    torch.testing.assert_close(ones_a.flatten(), a[0].diagonal(), rtol=1e-12, atol=0)
    torch.testing.assert_close(ones_b.flatten(), b[0].diagonal(), rtol=1e-12, atol=0)


def test_gradient_accumulation_equals_the_big_batch():
    x, target = seeded(8, 2, 5, 5), seeded(8, 3, 3, 3, seed=1)
    results = []
    for parts in (1, 4):
        net = network(nn.Conv2d(2, 3, 3))
        p = kfac(net, accumulation_steps=parts)
        for chunk, goal in zip(x.chunk(parts), target.chunk(parts), strict=True):
            (mse(net(chunk), goal) / parts).backward()
        p.step()
        results.append([*p.fisher.factors(0), *(q.grad for q in net.parameters())])
    for big, small in zip(*results, strict=True):
        torch.testing.assert_close(big, small, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("loss_average", ["sum", "positions"])
def test_loss_averages(loss_average):
    """The sum over samples has the factors of the mean; tokens that are averaged are samples."""
    x, target = seeded(4, 5, 3), seeded(4, 5, 2, seed=1)
    net = network(nn.Linear(3, 2))
    p = kfac(net, loss_average=loss_average)
    error = 0.5 * (net(x) - target).square()
    (error.sum() if loss_average == "sum" else error.sum(-1).mean()).backward()
    p.step()
    flat = network(nn.Linear(3, 2))
    q = kfac(flat)
    if loss_average == "positions":
        x, target = x.flatten(0, 1), target.flatten(0, 1)
    run(flat, q, x, lambda y: mse(y, target))
    for got, want in zip(p.fisher.factors(0), q.fisher.factors(0), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


def test_kl_clip_scales_the_update():
    x, target = seeded(8, 6), seeded(8, 4, seed=3)
    updates = []
    for clip in (None, 1e-3, 1e6):
        net = network(nn.Linear(6, 4))
        p = mk.KFAC(net, 1e-2, kl_clip=clip, lr=0.5)
        net.zero_grad()
        mse(net(x), target).backward()
        before = net[0].weight.grad.clone(), net[0].bias.grad.clone()
        p.step()
        updates.append((net[0].weight.grad.clone(), net[0].bias.grad.clone()))
    free, clipped, loose = updates
    product = sum(float((u * g).sum()) for u, g in zip(free, before, strict=True))
    nu = math.sqrt(1e-3 / (0.25 * product))
    assert nu < 1
    torch.testing.assert_close(clipped[0], nu * free[0], rtol=1e-10, atol=0)
    torch.testing.assert_close(loose[0], free[0], rtol=1e-12, atol=0)


def test_update_frequencies():
    net = network(nn.Linear(3, 2))
    p = kfac(net, factor_update_steps=2, inv_update_steps=4)
    seen, inverses = [], []
    for step in range(6):
        run(net, p, seeded(4, 3, seed=step))
        seen.append(p.fisher.seen)
        inverses.append(p.fisher.inverse(0))
    assert seen == [1, 1, 2, 2, 3, 3]
    changed = [not torch.equal(a, b) for a, b in itertools.pairwise(inverses)]
    assert changed == [False, False, False, True, False]


def test_hyperparameters_may_be_functions_of_the_step():
    net = network(nn.Linear(3, 2))
    p = mk.KFAC(
        net, lambda step: 1.0 / (1 + step), factor_decay=lambda step: 0.5, kl_clip=lambda step: 1.0, lr=lambda step: 0.1
    )
    for step in range(3):
        run(net, p, seeded(4, 3, seed=step))
    assert p.fisher.damping == pytest.approx(1 / 3)
    p.damping = lambda step: -1.0
    before = copy.deepcopy(p.state_dict())
    with pytest.raises(ValueError, match=r"damping: expected a positive number, got -1\.0"):
        p.step()
    assert p.steps == before["steps"]


# ---- modules of all kinds -------------------------------------------------------------------------------------------


def test_a_module_called_twice_has_the_rows_of_both_calls():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            (self.layer,) = network(nn.Linear(3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(torch.tanh(self.layer(x)))

    net, x = Twice(), seeded(5, 3)
    p = kfac(net)
    run(net, p, x)
    first = torch.tanh(net.layer(x)).detach()
    rows = F.pad(torch.cat([x, first]), (0, 1), value=1.0)
    (a,), (b,) = p.fisher.factors(0)
    torch.testing.assert_close(a, rows.mT @ rows / 5)
    out = net.layer(first).detach()
    inner = (out @ net.layer.weight) * (1 - first**2)
    g = torch.cat([out, inner])
    torch.testing.assert_close(b, g.mT @ g / 10)


def test_modules_not_called_keep_their_factors_and_gradients():
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = network(nn.Linear(3, 2), nn.Linear(3, 2))
            self.use_right = True

        def forward(self, x: Tensor) -> Tensor:
            return self.right(x) if self.use_right else self.left(x)

    net = Branch()
    p = kfac(net)
    run(net, p, seeded(4, 3))
    kept = [f.clone() for f in p.fisher.factors(1)]
    net.use_right = False
    net.zero_grad()
    run(net, p, seeded(4, 3, seed=1))
    assert net.right.weight.grad is None
    for got, want in zip(p.fisher.factors(1), kept, strict=True):
        assert torch.equal(got, want)


def test_frozen_parameters():
    net = network(nn.Linear(3, 4), nn.Linear(4, 2))
    net[0].weight.requires_grad_(False)
    net[0].bias.requires_grad_(False)
    net[1].bias.requires_grad_(False)
    p = kfac(net)
    run(net, p, seeded(5, 3))
    assert [layer.name for layer in p._layers] == ["1"]
    assert p.fisher.shapes[0].columns == 4
    assert net[1].bias.grad is None


def test_what_is_left_alone_is_listed_once():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
            self.embed = nn.Embedding(5, 4)
            self.head = nn.Linear(4, 5, bias=False)
            self.head.weight = self.embed.weight
            self.scale = nn.Parameter(torch.ones(1))
            self.linear = nn.Linear(4, 4)

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.embed(tokens)
            x = x + self.attention(x, x, x, need_weights=False)[0] * self.scale
            return self.head(self.linear(x))

    net = Net()
    with pytest.warns(UserWarning, match="KFAC leaves") as caught:
        p = kfac(net)
    assert len(caught) == 1
    assert set(p.skipped_layers) == {"", "attention", "attention.out_proj", "embed", "head"}
    for word in ("MultiheadAttention", "shares parameters with embed"):
        assert word in str(caught[0].message)
    tokens = torch.tensor([[0, 1, 2], [3, 4, 0]])
    F.cross_entropy(net(tokens).flatten(0, 1), tokens.flatten()).backward()
    alone = net.attention.in_proj_weight.grad.clone()
    p.step()
    assert torch.equal(net.attention.in_proj_weight.grad, alone)
    assert bool(net.embed.weight.grad.isfinite().all())


def test_include_and_skip_by_name():
    net = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what was asked for is no news
        p = kfac(net, include=["1.*"], skip_layers=["1.1"])
    assert [layer.name for layer in p._layers] == ["1.0"]
    with pytest.raises(ValueError, match="model: expected layers to precondition, found none"):
        kfac(net, include=["none"])


def test_evaluation_gathers_nothing():
    net = network(nn.Linear(3, 2))
    p = kfac(net)
    net.eval()
    net(seeded(4, 3)).sum().backward()
    with torch.no_grad():
        net.train()(seeded(4, 3))
    p.step()
    assert float(p.fisher.factors(0)[0].abs().sum()) == 0


def test_removed_hooks_gather_nothing():
    net = network(nn.Linear(3, 2))
    p = kfac(net)
    p.remove_hooks()
    run(net, p, seeded(4, 3))
    assert float(p.fisher.factors(0)[0].abs().sum()) == 0


def test_sampling_leaves_gradients_alone():
    net = network(nn.Linear(3, 4))
    x, labels = seeded(6, 3), torch.tensor([0, 1, 2, 3, 0, 1])
    p = kfac(net, fisher_type="mc")
    logits = net(x)
    with p.sampling():
        drawn = torch.distributions.Categorical(logits=logits.detach()).sample()
        F.cross_entropy(logits, drawn).backward(retain_graph=True)
    assert all(q.grad is None for q in net.parameters())
    F.cross_entropy(logits, labels).backward()
    p.step()
    g = logits.detach().softmax(1) - F.one_hot(drawn, 4)
    torch.testing.assert_close(p.fisher.factors(0)[1][0], g.mT @ g / 6)


def test_compiled_models():
    def train(compiled: bool) -> list[Tensor]:
        torch._dynamo.reset()
        net = network(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        p = kfac(net)
        model = torch.compile(net, backend="aot_eager") if compiled else net
        for step in range(2):
            net.zero_grad()
            mse(model(seeded(5, 3, seed=step)), torch.ones(5, 2, dtype=F64)).backward()
            p.step()
        return [q.grad for q in net.parameters()]

    for got, want in zip(train(True), train(False), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


# ---- mixed precision ------------------------------------------------------------------------------------------------


def test_autocast_gives_float32_factors():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 4))
    p = kfac(net)
    x = torch.randn(6, 3, 4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = net(x).square().mean()
    loss.backward()
    p.step()
    for layer in range(2):
        assert all(f.dtype == torch.float32 for f in p.fisher.factors(layer))
    patches = F.pad(F.unfold(x.bfloat16().float(), 3, padding=1).transpose(1, 2), (0, 1), value=1.0).flatten(0, 1)
    torch.testing.assert_close(p.fisher.factors(0)[0][0], patches.mT @ patches / 6, rtol=2e-2, atol=2e-2)


def test_grad_scaler():
    """The scale does not show in the factors; a batch that overflows changes nothing."""
    results = []
    for scaled in (False, True):
        net = network(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).float()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        p = mk.KFAC(net, 1e-2, scaler=scaler)
        for step in range(3):
            optimizer.zero_grad()
            loss = mse(net(seeded(5, 3, seed=step, dtype=torch.float32)), torch.ones(5, 2))
            scaler.scale(loss).backward()
            if scaled and step == 1:  # once more, with an overflow
                kept = copy.deepcopy(p.state_dict()["fisher"])
                optimizer.zero_grad()
                bad = mse(net(seeded(5, 3, seed=step, dtype=torch.float32)), torch.ones(5, 2)) * float("inf")
                scaler.scale(bad).backward()
                scaler.unscale_(optimizer)
                weights = [q.clone() for q in net.parameters()]
                p.step()
                scaler.step(optimizer)
                scaler.update()
                for mine, theirs in zip(p.state_dict()["fisher"]["stacks"], kept["stacks"], strict=True):
                    assert all(torch.equal(mine[k], theirs[k]) for k in mine)
                assert all(torch.equal(a, b) for a, b in zip(weights, net.parameters(), strict=True))
                assert p.fisher.skipped == 1
                optimizer.zero_grad()
                loss = mse(net(seeded(5, 3, seed=step, dtype=torch.float32)), torch.ones(5, 2))
                scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            p.step()
            scaler.step(optimizer)
            scaler.update()
        results.append([*p.fisher.factors(0), *net.parameters()])
    for plain, scaled in zip(*results, strict=True):
        torch.testing.assert_close(scaled, plain, rtol=1e-5, atol=1e-6)


def test_a_loss_scale_that_changes_does_not_show_in_any_block():
    x = seeded(5, 3, dtype=torch.float32)

    def blocks(scales: list[float]) -> list[Tensor]:
        net = network(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)).float()
        scaler = torch.amp.GradScaler("cpu", enabled=True)
        p = kfac(net, scaler=scaler)
        for scale in scales:
            scaler._scale = torch.tensor(scale)
            net.zero_grad()
            scaler.scale(mse(net(x), torch.ones(5, 2))).backward()
            p.step()
        return [torch.kron(b, a) for i in range(3) for a, b in zip(*p.fisher.factors(i), strict=False)]

    for changing, constant in zip(blocks([65536.0, 1024.0, 1.0]), blocks([1.0] * 3), strict=True):
        torch.testing.assert_close(changing, constant, rtol=1e-5, atol=1e-7)


def test_what_has_seen_no_batch_keeps_its_gradient():
    """The first batch overflows, and the inverses are not renewed at once."""
    for options in ({}, {"damping_style": "exact"}):
        net = network(nn.Linear(3, 2))
        p = kfac(net, inv_update_steps=5, **options)
        run(net, p, torch.full((4, 3), float("nan"), dtype=F64))
        net.zero_grad()
        mse(net(seeded(4, 3)), torch.zeros(4, 2)).backward()
        gradient = net[0].weight.grad.clone()
        p.step()
        torch.testing.assert_close(net[0].weight.grad, gradient)


@pytest.mark.parametrize("options", [{}, {"damping_style": "exact", "eigen_correction": True, "inv_update_steps": 5}])
def test_a_bad_batch_without_a_scaler_is_skipped(options):
    net = network(nn.Linear(3, 2))
    p = kfac(net, **options)
    run(net, p, seeded(4, 3))
    kept = copy.deepcopy(p.state_dict()["fisher"])
    x = seeded(4, 3)
    x[0, 0] = float("nan")
    run(net, p, x)
    for mine, theirs in zip(p.state_dict()["fisher"]["stacks"], kept["stacks"], strict=True):
        assert all(torch.equal(mine[k], theirs[k]) for k in mine)
    for mine, theirs in zip(p.fisher.state_dict()["inverses"].values(), kept["inverses"].values(), strict=True):
        assert all(map(torch.equal, mine, theirs))
    assert p.diagnostics()["skipped"] == 1
    assert bool(net[0].weight.grad.isnan().any()), "nothing is hidden"


# ---- how modules are used --------------------------------------------------------------------------------------------


def test_moments_of_what_is_not_called_stay():
    """Between inversions: of a layer that rests, and of a normalization layer, whose block needs no correction."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.resting, self.last = network(
                nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 2)
            )
            self.rests = False

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(self.first(x))
            return self.last(x if self.rests else self.resting(x))

    net, x = Net(), seeded(6, 3)
    p = kfac(net, damping_style="exact", eigen_correction=True, inv_update_steps=100, factor_decay=0.5)
    updates = []
    for step in range(4):
        net.rests = step > 1
        run(net, p, x)
        updates.append((net.norm.weight.grad.clone(), [m.clone() for m in p.fisher._inverses.moments]))
    for _, moments in updates[2:]:
        assert any(torch.equal(a, b) for a, b in zip(moments, updates[1][1], strict=True))
    rested = p.fisher._place[[layer.name for layer in p._layers].index("resting")]
    norm = p.fisher._place[[layer.name for layer in p._layers].index("norm")]
    for stack, row in (rested, norm):
        i = p.fisher._stacks.index(stack)
        assert torch.equal(updates[3][1][i][row], updates[1][1][i][row])


def test_moments_of_reduced_rows():
    """One sample: the moments of its summed rows are the eigenvalues of its factors, whose basis they are in."""
    net, x = network(nn.Linear(3, 2)), seeded(1, 5, 3)
    p = kfac(
        net,
        approximation="reduce",
        damping_style="exact",
        eigen_correction=True,
        inv_update_steps=100,
        factor_decay=0.0,
    )
    sums = []
    for _ in range(2):
        run(net, p, x, lambda y: mse(y.sum(1), torch.ones(1, 2, dtype=F64)))
        sums.append(p.fisher._inverses.moments[0].sum())
    torch.testing.assert_close(sums[1], sums[0])


def test_sampling_leaves_every_gradient_as_it_was():
    net = network(nn.Linear(3, 4), nn.Linear(4, 2))
    p = kfac(net, fisher_type="mc", skip_layers=["1"])
    output = net(seeded(5, 3))
    with p.sampling():
        output.sum().backward(retain_graph=True)
    assert all(q.grad is None for q in net.parameters())


def test_no_learning_rate_no_clip():
    x, results = seeded(5, 3), []
    for options in ({"kl_clip": None}, {"kl_clip": 1e-9, "lr": lambda step: 0.1 * step}):
        net = network(nn.Linear(3, 2))
        p = mk.KFAC(net, 1e-2, **options)
        run(net, p, x)
        results.append(net[0].weight.grad.clone())
    assert torch.equal(*results)
    run(net, p, x)
    assert float(net[0].weight.grad.norm()) < 1e-2 * float(results[0].norm())
    for options, message in (
        ({"kl_clip": -1.0}, "kl_clip: expected a positive"),
        ({"lr": -0.1}, "lr: expected a number >= 0"),
    ):
        with pytest.raises(ValueError, match=message):
            run(net, mk.KFAC(net, 1e-2, **options), x)


def test_positions_count_as_samples():
    """Tokens of sequences against the same tokens as samples: every kind of layer, and one that is called twice."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.last = network(nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 2))

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.norm(self.first(self.first(x).tanh())))

    x, found = seeded(4, 5, 3), []
    for tokens, average in ((x, "positions"), (x.flatten(0, 1), "batch")):
        net = Net()
        p = kfac(net, loss_average=average)
        run(net, p, tokens, lambda y: 0.5 * (y - 1).square().sum() / 20)
        found.append([layer_fisher(p, i) for i in range(3)])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_counts_once(use_reentrant):
    x, found = seeded(6, 3).requires_grad_(), []
    for checkpointed in (False, True):
        first, last = network(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), network(nn.Linear(3, 2), seed=9)
        net = nn.ModuleList([first, last])
        p = kfac(net)
        hidden = torch.utils.checkpoint.checkpoint(first, x, use_reentrant=use_reentrant) if checkpointed else first(x)
        mse(last(hidden), torch.zeros(6, 2)).backward()
        p.step()
        found.append([layer_fisher(p, i) for i in range(3)])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want)


def test_frozen_normalization_statistics():
    """BatchNorm in evaluation mode inside a model that trains."""
    net = network(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    p = kfac(net)
    net[1].eval()
    run(net, p, seeded(6, 3))
    (blocks, _) = p.fisher.factors(1)
    assert float(blocks.abs().amin(dim=(1, 2)).min()) > 0


def test_freezing_later_and_keywords():
    net = network(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    p = kfac(net)
    for parameter in (net[0].weight, net[0].bias, net[1].bias):
        parameter.requires_grad_(False)
    for _ in range(2):
        net.zero_grad()
        mse(net[2](input=net[1](net[0](seeded(5, 3)))), torch.zeros(5, 2)).backward()
        p.step()
    assert net[0].weight.grad is None and bool(net[2].weight.grad.isfinite().all())
    assert p.fisher.seen == p.steps == 2


def test_a_copy_steps_on_its_own():
    net, x = network(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)), seeded(5, 3)
    p = kfac(net)
    run(net, p, x)
    other, q = copy.deepcopy((net, p))
    for n, r in ((net, p), (other, q)):
        run(n, r, x)
    assert p.steps == q.steps == 2
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_a_weight_that_is_computed_is_left_alone():
    with pytest.warns(UserWarning, match="0: its weight is computed from other parameters"):
        p = kfac(nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), nn.Linear(3, 2)))
    assert [layer.name for layer in p._layers] == ["1"]


# ---- state ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"damping_style": "exact", "eigen_correction": True, "inv_update_steps": 3}])
def test_state_resumes_bit_for_bit(options):
    def make() -> tuple[nn.Module, mk.KFAC]:
        net = network(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(27, 2))
        return net, kfac(net, **options)

    net, p = make()
    for step in range(4):
        run(net, p, seeded(5, 2, 5, 5, seed=step))
    other, q = make()
    other.load_state_dict(net.state_dict())
    q.load_state_dict(copy.deepcopy(p.state_dict()))
    for step in range(4, 8):
        for n, r in ((net, p), (other, q)):
            run(n, r, seeded(5, 2, 5, 5, seed=step))
        for a, b in zip(net.parameters(), other.parameters(), strict=True):
            assert torch.equal(a.grad, b.grad)


def test_state_that_does_not_fit_changes_nothing():
    net = network(nn.Linear(3, 2))
    p = kfac(net)
    run(net, p, seeded(4, 3))
    other = kfac(network(nn.Linear(4, 2)))
    kept = copy.deepcopy(p.state_dict())
    with pytest.raises(
        ValueError, match=r"state_dict\['stacks'\]\[0\]\['inputs'\]: expected .*\(1, 1, 4, 4\), got .*\(1, 1, 5, 5\)"
    ):
        p.load_state_dict(other.state_dict())
    with pytest.raises(KeyError, match="state_dict: expected the entries"):
        p.load_state_dict({})
    assert p.steps == kept["steps"]
    for mine, theirs in zip(p.state_dict()["fisher"]["stacks"], kept["fisher"]["stacks"], strict=True):
        assert all(torch.equal(mine[k], theirs[k]) for k in mine)


BAD = [
    ({"spatial": "half"}, ValueError, "spatial: expected one of full, sua, got 'half'"),
    ({"approximation": "sum"}, ValueError, "approximation: expected one of expand, reduce"),
    ({"fisher_type": "true"}, ValueError, "fisher_type: expected one of empirical, mc"),
    ({"loss_average": "mean"}, ValueError, "loss_average: expected one of batch, positions, sum"),
    ({"normalization": "full"}, ValueError, "normalization: expected one of unit, diagonal, skip"),
    ({"factor_update_steps": 0}, ValueError, "factor_update_steps: expected at least 1, got 0"),
    ({"inv_update_steps": 0.5}, TypeError, "inv_update_steps: expected an int"),
    ({"accumulation_steps": -1}, ValueError, "accumulation_steps: expected at least 1, got -1"),
    ({"damping": 0.0}, ValueError, "damping: expected a positive finite number, got 0.0"),
    ({"damping": "1"}, TypeError, "damping: expected a number or a function of the step"),
    ({"factor_decay": 1.0}, ValueError, r"factor_decay: expected a number in \[0, 1\), got 1.0"),
    ({"group_size": 0}, ValueError, "input_block: expected at least 1, got 0"),
    ({"damping_style": "half"}, ValueError, "style: expected"),
    ({"eigen_correction": True}, ValueError, "eigen_correction: expected style"),
    ({"eigen_correction": True, "spatial": "sua"}, ValueError, 'eigen_correction: expected spatial "full", got "sua"'),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD)
def test_errors(options, error, message):
    with pytest.raises(error, match=message):
        mk.KFAC(nn.Linear(2, 2), **options)
