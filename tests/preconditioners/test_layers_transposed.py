"""Transposed convolutions: against dense Fisher matrices, linear layers, and plain convolutions of the same map."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gathering_cases import EKFAC, F64, FixedScaler, assert_same, factors, kfac, loss_of, seeded
from module_cases import WAYS, Repeated, assert_same_layers, blocks, stepped
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mfac_kernels as mk

N = 4
KINDS = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
GEOMETRIES: list[tuple[int, dict[str, Any]]] = [
    (1, {"kernel_size": 3}),
    (1, {"kernel_size": 4, "stride": 3, "padding": 2, "output_padding": 1}),
    (2, {"kernel_size": 2, "stride": 2}),
    (2, {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0), "output_padding": (1, 0)}),
    (2, {"kernel_size": 3, "stride": 1, "padding": 2, "dilation": 2}),
    (2, {"kernel_size": 2, "stride": 3, "padding": 1, "dilation": 4, "output_padding": (2, 0)}),
    (2, {"kernel_size": 3, "padding": 1, "groups": 2}),
    (3, {"kernel_size": (1, 2, 2), "stride": (1, 2, 1), "padding": (0, 1, 0)}),
]


def module(dims: int, channels: tuple[int, int] = (4, 2), **geometry: Any) -> nn.Module:
    made = KINDS[dims](*channels, **geometry).double()
    with torch.no_grad():
        for i, p in enumerate(made.parameters()):
            p.copy_(0.5 * seeded(*p.shape, seed=i))
    return made


def images(dims: int, channels: int = 4, seed: int = 0, n: int = N) -> Tensor:
    return seeded(n, channels, *(5, 3, 4)[:dims], seed=seed)


def rows_of(conv: nn.Module, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """(groups, n, pixels, inputs) and the patches of g, (groups, n, pixels, outputs * offsets), by the definition.

    Patch and pixel are those of the product a_s P_s^T which is the gradient in the weight: P_s is the derivative of
    <g, output> in the weight for an input that is 1 at the pixel s of one channel.
    """
    groups, each = conv.groups, conv.in_channels // conv.groups
    a = x.flatten(2).unflatten(1, (groups, each)).permute(1, 0, 3, 2)
    patches = torch.zeros(groups, len(x), a.shape[2], conv.weight[0].numel(), dtype=F64)
    for group in range(groups):
        for s in range(a.shape[2]):
            unit = torch.zeros_like(x)
            unit.flatten(2)[:, group * each, s] = 1
            for n in range(len(x)):
                y = (conv(unit[n : n + 1]) * g[n]).sum()
                (of_weight,) = torch.autograd.grad(y, conv.weight)
                patches[group, n, s] = of_weight[group * each].flatten()
    return a, patches


def definition(conv: nn.Module, x: Tensor, g: Tensor, approximation: str) -> Tensor:
    """The block of the weight; g is N times the gradient of the mean loss."""
    a, p = rows_of(conv, x, g)
    if approximation == "reduce":
        a, p = a.sum(2, keepdim=True), p.mean(2, keepdim=True)
    n, s = a.shape[1:3]
    parts = [(u.flatten(0, 1).mT @ u.flatten(0, 1) / n, v.flatten(0, 1)) for u, v in zip(a, p, strict=True)]
    return torch.block_diag(*(torch.kron(of_input, v.mT @ v / (n * s)) for of_input, v in parts))


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize(("dims", "geometry"), GEOMETRIES, ids=str)
def test_factors_are_those_of_pixels_and_of_patches_of_the_gradient(dims, geometry, approximation):
    conv, x = module(dims, **geometry), images(dims)
    p = kfac(conv, approximation=approximation)
    output = conv(x)
    loss = loss_of(output)
    (g,) = torch.autograd.grad(loss, output, retain_graph=True)
    loss.backward()
    p.step()
    assert [layer.title for layer in p._layers] == [f"{type(conv).__name__}, the model itself", "bias"]
    assert_same(blocks(p)[:1], [definition(conv, x, N * g, approximation)])
    of_bias = N * g.flatten(2).sum(2)
    assert_same(blocks(p)[1:], [of_bias.mT @ of_bias / N])


@pytest.mark.parametrize(("dims", "geometry"), GEOMETRIES, ids=str)
def test_rows_make_the_gradient(dims, geometry):
    """The definition that the others are tested by: the sum over pixels of products is autograd's gradient."""
    conv, x = module(dims, **geometry), images(dims)
    output = conv(x)
    g = seeded(*output.shape, seed=7)
    (want,) = torch.autograd.grad((output * g).sum(), conv.weight)
    a, p = rows_of(conv, x, g)
    got = torch.einsum("gnsi,gnsj->gij", a, p)
    torch.testing.assert_close(got.reshape(want.shape), want, rtol=1e-11, atol=1e-12)


def test_one_sample_and_pixel_is_exact():
    """The block of the weight is the dense Fisher matrix of the sample; that of the bias is for any."""
    conv, x = module(2, kernel_size=3, stride=2, padding=1, output_padding=1), seeded(1, 4, 1, 1)
    p = kfac(conv)
    loss_of(conv(x)).backward()
    exact = [torch.outer(q.grad.flatten(), q.grad.flatten()) for q in conv.parameters()]
    p.step()
    assert_same(blocks(p), exact)


@pytest.mark.parametrize("options", [{}, EKFAC, {"group_size": 2}, {"spatial": "sua"}], ids=str)
@pytest.mark.parametrize(("calls", "passes", "approximation"), WAYS)
def test_a_kernel_of_one_is_a_convolution(calls, passes, approximation, options):
    """Whose weight is the transpose."""
    own, plain = module(2, (4, 4), kernel_size=1, bias=False), nn.Conv2d(4, 4, 1, bias=False).double()
    with torch.no_grad():
        plain.weight.copy_(own.weight.transpose(0, 1))
    got, want = (
        stepped(Repeated(net, calls), [images(2, 4, i) for i in range(passes)], approximation=approximation, **options)
        for net in (own, plain)
    )
    (a,), (b,) = blocks(got), blocks(want)
    assert_same([a], [b.view(4, 4, 4, 4).permute(1, 0, 3, 2).reshape(16, 16)])
    update, expected = own.weight.grad, plain.weight.grad.transpose(0, 1)
    torch.testing.assert_close(update, expected, rtol=1e-9, atol=1e-11 * float(expected.abs().max()))


@pytest.mark.parametrize("options", [{}, EKFAC, {"group_size": (None, 3)}], ids=str)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_kernel_that_makes_the_whole_output_is_a_linear_layer(dims, options):
    size = (3, 2, 2)[:dims]
    own = module(dims, kernel_size=size, bias=False)
    plain = nn.Linear(4, own.weight[0].numel(), bias=False).double()
    with torch.no_grad():
        plain.weight.copy_(own.weight.flatten(1).mT)
    got = stepped(own, [seeded(N, 4, *[1] * dims)], lambda y: loss_of(y.flatten(1)), **options)
    want = stepped(plain, [seeded(N, 4)], **options)
    torch.testing.assert_close(own.weight.grad.flatten(1), plain.weight.grad.mT, rtol=1e-9, atol=1e-11)
    for a, b in zip(got.fisher.factors(0), reversed(want.fisher.factors(0)), strict=True):
        assert_same([a], [b])


@pytest.mark.parametrize("geometry", [{"kernel_size": 1}, {"kernel_size": 2, "stride": 2}])
def test_without_overlap_it_is_a_convolution_before_a_rearrangement(geometry):
    """k x k kernels of stride k: a kernel of one to k^2 times the channels, whose pixels are then put apart."""
    own = module(2, bias=False, **geometry)
    k = geometry["kernel_size"]
    plain = nn.Conv2d(4, 2 * k * k, 1, bias=False).double()
    with torch.no_grad():
        plain.weight.copy_(own.weight.flatten(1).mT[..., None, None])
    got = stepped(own, [images(2)])
    want = stepped(nn.Sequential(plain, nn.PixelShuffle(k)), [images(2)])
    torch.testing.assert_close(own.weight.grad.flatten(1), plain.weight.grad.flatten(1).mT, rtol=1e-9, atol=1e-11)
    for a, b in zip(got.fisher.factors(0), reversed(want.fisher.factors(0)), strict=True):
        assert_same([a], [b])


@pytest.mark.parametrize(("dims", "geometry"), GEOMETRIES, ids=str)
def test_without_spatial_correlations(dims, geometry):
    """A is the mean over offsets of the diagonal blocks of the full one."""
    conv = module(dims, bias=False, **geometry)
    found = []
    for spatial in ("full", "sua"):
        found.append(stepped(conv, [images(dims)], spatial=spatial))
        found[-1].remove_hooks()
    full, sua = found
    outputs, offsets = conv.out_channels // conv.groups, conv.weight[0, 0].numel()
    whole = full.fisher.factors(0)[0].unflatten(2, (outputs, offsets)).unflatten(1, (outputs, offsets))
    assert_same([sua.fisher.factors(0)[0]], [torch.einsum("guovo->guv", whole) / offsets])
    assert_same([sua.fisher.factors(0)[1]], [full.fisher.factors(0)[1]])


@pytest.mark.parametrize("use_reentrant", [None, False, True])
@pytest.mark.parametrize(("calls", "passes"), [(1, 1), (2, 1), (1, 3), (2, 3)])
def test_shared_and_accumulated(calls, passes, use_reentrant):
    """Calls of a pass are one call of all their samples' pixels; passes are averaged. Checkpoints change nothing."""
    conv = module(2, (3, 3), kernel_size=3, padding=1, bias=False)
    p = kfac(conv, accumulation_steps=passes)
    found = []
    for i in range(passes):
        x = images(2, 3, i).requires_grad_()
        inputs, outputs = [], []
        for _ in range(calls):
            inputs.append(x.detach())
            y = conv(x) if use_reentrant is None else checkpoint(conv, x, use_reentrant=use_reentrant)
            outputs.append(y)
            x = torch.tanh(y)
        loss = loss_of(x)
        with p.paused():
            gradients = torch.autograd.grad(loss, outputs, retain_graph=True) if use_reentrant is not True else None
        (loss / passes).backward()
        if gradients is None:
            again = images(2, 3, i)
            values = []
            for _ in range(calls):
                values.append(F.conv_transpose2d(again, conv.weight, padding=1))
                again = torch.tanh(values[-1])
            gradients = torch.autograd.grad(loss_of(again), values)
        with p.paused():
            rows = [rows_of(conv, a, N * g) for a, g in zip(inputs, gradients, strict=True)]
        a, patches = (torch.cat(parts, 2)[0] for parts in zip(*rows, strict=True))
        pixels = a.shape[1]
        found.append(
            (
                torch.einsum("nsi,nsj->ij", a, a) / N,
                torch.einsum("nsi,nsj->ij", patches, patches) / (N * pixels),
            )
        )
    p.step()
    of_inputs, of_patches = (torch.stack(parts).mean(0) for parts in zip(*found, strict=True))
    assert_same(blocks(p), [torch.kron(of_inputs, of_patches)])


@pytest.mark.parametrize("scale", [2.0**-4, 2.0**8])
@pytest.mark.parametrize("options", [{}, EKFAC], ids=["plain", "EKFAC"])
def test_a_scaled_loss(options, scale):
    """The scale is taken from the factor of the gradients, which is A."""

    found = []
    for scaler in (None, FixedScaler(scale)):
        conv = module(2, kernel_size=2, stride=2)
        p = kfac(conv, scaler=scaler, **options)
        for _ in range(2):
            conv.zero_grad()
            (loss_of(conv(images(2))) * (1 if scaler is None else scale)).backward()
            for q in conv.parameters():
                q.grad /= 1 if scaler is None else scale
            p.step()
        found.append(p)
    assert_same_layers(*found)
    assert_same(*(factors(p) for p in found))


@pytest.mark.parametrize("average", ["positions", "sum"])
def test_other_means(average):
    conv, x = module(2, kernel_size=2, stride=2, bias=False), images(2)
    p, q = kfac(conv), None
    loss_of(conv(x)).backward()
    p.step()
    p.remove_hooks()
    conv.zero_grad()
    q = kfac(conv, loss_average=average)
    pixels = x[0, 0].numel()
    (loss_of(conv(x)) * (N if average == "sum" else 1 / pixels)).backward()
    q.step()
    # Of N times the pixels samples, whose gradients are those of the mean over them
    assert_same(blocks(q), [b / (1 if average == "sum" else pixels) for b in blocks(p)])


def test_an_output_size_that_is_asked_for():
    conv, x = module(2, kernel_size=3, stride=2, padding=1), images(2)
    p = kfac(conv)
    output = conv(x, output_size=(10, 6))
    loss = loss_of(output)
    (g,) = torch.autograd.grad(loss, output, retain_graph=True)
    loss.backward()
    p.step()

    class Same(nn.Module):
        """With this output padding for all calls, for the definition."""

        weight, groups, in_channels = conv.weight, conv.groups, conv.in_channels

        def forward(self, x: Tensor) -> Tensor:
            return F.conv_transpose2d(x, self.weight, None, 2, 1, 1)

    same = Same.__new__(Same)
    nn.Module.__init__(same)
    assert output.shape[2:] == (10, 6)
    assert_same(blocks(p)[:1], [definition(same, x, N * g, "expand")])


def test_an_output_padding_of_a_stride_is_left_alone():
    net = nn.ModuleList([module(1, kernel_size=2, stride=2, dilation=4, output_padding=3), nn.Linear(2, 2).double()])
    with pytest.warns(UserWarning, match="0: its output_padding is not below its stride"):
        p = kfac(net)
    assert [layer.title for layer in p._layers] == ["1"]


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_frozen_parameters(frozen):
    net = nn.ModuleList([module(2, kernel_size=2), nn.Linear(2, 2).double()])
    getattr(net[0], frozen).requires_grad_(False)
    if frozen == "weight":
        with pytest.warns(UserWarning, match="0: its weight is not trained"):
            p = kfac(net)
        assert [layer.title for layer in p._layers] == ["1"]
    else:
        p = kfac(net)
        assert [layer.title for layer in p._layers] == ["0", "1"] and p.skipped_layers == {}


def test_masks_are_refused():
    conv = module(2, kernel_size=2)
    p = kfac(conv)
    p.valid(torch.ones(N, 15, dtype=torch.bool))
    with pytest.raises(ValueError, match="valid: mask: expected no transposed convolutions, got ConvTranspose2d"):
        conv(images(2))


@pytest.mark.parametrize(("dims", "geometry"), GEOMETRIES, ids=str)
def test_its_exact_fisher_matrix(dims, geometry):
    """For two-level K-FAC: the rows of J are the gradients of the samples, weight and bias."""
    conv, x = module(dims, **geometry), images(dims)
    p = mk.TwoLevelKFAC(conv, 1e-2, kl_clip=None)
    target = seeded(*conv(x).shape, seed=9)
    (0.5 * (conv(x) - target).square().sum() / N).backward()
    jacobian = p._batch.jacobian(None, F64, torch.device("cpu"))
    given = [seeded(*layer.gradient().shape, seed=i) for i, layer in enumerate(p._layers)]
    dots, sums = jacobian.jvp(given), jacobian.vjp(torch.arange(1.0, N + 1, dtype=F64))
    want = [torch.zeros_like(g) for g in given]
    for i in range(N):
        conv.zero_grad()
        (0.5 * (conv(x[i : i + 1]) - target[i]).square().sum()).backward()
        each = [layer.gradient() for layer in p._layers]
        torch.testing.assert_close(dots[i] * N, sum((g * b).sum() for g, b in zip(each, given, strict=True)))
        for total, g in zip(want, each, strict=True):
            total += (i + 1) * g / N
    for got, total in zip(sums, want, strict=True):
        torch.testing.assert_close(got, total)
    ones = [torch.ones(1, 1, dtype=F64).expand_as(g) for g in given]  # rows that are the same memory
    torch.testing.assert_close(jacobian.jvp(ones), jacobian.jvp([one.clone() for one in ones]))


def test_gradients_are_preconditioned():
    """The update of weight and bias, of a decoder: the dense solve."""
    conv = module(2, kernel_size=3, stride=2, padding=1)
    p = kfac(conv, damping_style="exact")
    loss_of(conv(images(2))).backward()
    before = [layer.gradient().flatten().clone() for layer in p._layers]
    p.step()
    for layer, block, g in zip(p._layers, blocks(p), before, strict=True):
        want = torch.linalg.solve(block + 1e-2 * torch.eye(len(block), dtype=F64), g)
        torch.testing.assert_close(layer.gradient().flatten(), want, rtol=1e-8, atol=1e-10)
    assert len(factors(p)) == 4
