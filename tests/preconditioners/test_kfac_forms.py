"""The form of A and B by patterns of names: the diagonal is that of the dense factor, and all else follows from it."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gathering_cases import EKFAC, F64, KINDS, Net, assert_same, batch, factors, kfac, loss_of, seeded
from torch import Tensor, nn

import mfac_kernels as mk

DIAGONAL = {"output": {"*": "diagonal"}, "input": {"*": "diagonal"}}
KIND_NETS = (*KINDS, "embedding", "pointwise")


def make(kind: str) -> nn.Module:
    if kind in KINDS:
        return Net(kind)
    kinds = {"embedding": lambda: nn.Embedding(6, 3, padding_idx=1), "pointwise": lambda: nn.Conv2d(3, 4, 1)}
    module = kinds[kind]().double()
    with torch.no_grad():
        for i, q in enumerate(module.parameters()):
            q.copy_(seeded(*q.shape, seed=i))
    return module


def inputs(kind: str, seed: int = 0) -> Tensor:
    if kind == "embedding":
        return torch.randint(6, (5, 4), generator=torch.Generator().manual_seed(seed))
    return batch("convolution" if kind == "pointwise" else kind, seed=seed)


def gather(net: nn.Module, kind: str, steps: int = 1, **options: Any) -> mk.KFAC:
    """After ``steps`` steps; hooks are off."""
    p = kfac(net, **options)
    for step in range(steps):
        net.zero_grad()
        loss_of(net(inputs(kind, step))).backward()
        p.step()
    p.remove_hooks()
    return p


def dense(factor: Tensor) -> Tensor:
    return torch.block_diag(*factor)


def inverse(factor: Tensor, damping: Tensor) -> Tensor:
    return torch.linalg.inv(factor + damping * torch.eye(len(factor), dtype=F64))


@pytest.mark.parametrize("loss_average", ["batch", "positions"])
@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize("kind", KIND_NETS)
def test_a_diagonal_is_that_of_the_dense_factor(kind, approximation, loss_average):
    net, options = make(kind), {"approximation": approximation, "loss_average": loss_average}
    whole, diagonal = (factors(gather(net, kind, **o, **options)) for o in ({}, DIAGONAL))
    for want, got in zip(whole, diagonal, strict=True):
        rows = want.shape[0] * want.shape[1]
        assert got.shape == (rows, 1, 1)
        assert_same([got.flatten()], [want.diagonal(dim1=1, dim2=2).flatten()])


@pytest.mark.parametrize("spatial", ["full", "sua"])
@pytest.mark.parametrize("kind", ["convolution", "strided", "pointwise"])
def test_diagonals_of_convolutions(kind, spatial):
    net = make(kind)
    whole, diagonal = (factors(gather(net, kind, spatial=spatial, **o)) for o in ({}, DIAGONAL))
    for want, got in zip(whole, diagonal, strict=True):
        assert_same([got.flatten()], [want.diagonal(dim1=1, dim2=2).flatten()])


@pytest.mark.parametrize("options", [{}, {"pi_correction": False}, {"damping_style": "exact"}])
@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("kind", KIND_NETS)
def test_the_step_is_that_of_the_dense_inverse(kind, side, options):
    """Of one factor dense, the other's off-diagonal left out."""
    net = make(kind)
    p = gather(net, kind, **{side: {"*": "diagonal"}}, **options)
    net.zero_grad()
    loss_of(net(inputs(kind))).backward()
    gradients = [layer.gradient().clone() for layer in p._layers]
    got = p.fisher.ihvp(gradients)
    for i, (gradient, update) in enumerate(zip(gradients, got, strict=True)):
        a, b = map(dense, p.fisher.factors(i))
        if "damping_style" in options:
            block = torch.kron(b, a)
            want = (inverse(block, torch.tensor(1e-2, dtype=F64)) @ gradient.flatten()).view_as(gradient)
        else:
            pi = (a.trace() / len(a)) / (b.trace() / len(b)) if not options else torch.tensor(1.0, dtype=F64)
            want = inverse(b, (1e-2 / pi).sqrt()) @ gradient @ inverse(a, (1e-2 * pi).sqrt())
        torch.testing.assert_close(update, want, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("options", [{}, {"fisher_type": "mc"}, EKFAC, {"damping_style": "exact"}])
@pytest.mark.parametrize("kind", KIND_NETS)
def test_a_diagonal_is_blocks_of_one(kind, options):
    """The same step, factors and moments as with groups of one on that side."""
    found = []
    for form in ({"output": {"*": "diagonal"}}, {"group_size": (None, 1)}, {"output": {"*": 1}}):
        net = make(kind)
        p = kfac(net, **form, **options)
        for step in range(2):
            net.zero_grad()
            output = net(inputs(kind, step))
            if "fisher_type" in options:
                with p.sampling():
                    loss_of(output, seed=4).backward(retain_graph=True)
            loss_of(output).backward()
            p.step()
        found.append([*factors(p), *(q.grad.clone() for q in net.parameters())])
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@pytest.mark.parametrize("kind", ["linear", "sequence", "embedding"])
def test_moments_beside_a_diagonal(kind):
    """EKFAC: (1 / N) sum over rows of g_i^2 (U_A^T a)_j^2, B's basis being the outputs themselves."""
    net = nn.Linear(3, 4, bias=False).double() if kind != "embedding" else make(kind)
    p = kfac(net, output={"*": "diagonal"}, **EKFAC)
    for _ in range(2):
        net.zero_grad()
        x = inputs(kind)
        output = net(x)
        target = seeded(*output.shape, seed=9)
        loss_of(output).backward()
        p.step()
    g = (output - target).detach().flatten(0, -2)
    if kind == "embedding":
        a = F.one_hot(x.flatten(), 6).double() * (x.flatten() != 1)[:, None]
    else:
        a = x.detach().flatten(0, -2) @ p.fisher._inverses._inputs[0][0, 0]
    want = g.square().mT @ a.square() / len(x)
    assert_same([p.fisher._inverses.moments[0][0, 0, :, 0]], [want])


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize("kind", ["sequence", "convolution", "embedding"])
def test_diagonals_under_a_mask(kind, approximation):
    net, found = make(kind), []
    for form in ({}, DIAGONAL):
        p = kfac(net, masked=True, approximation=approximation, **form)
        x = inputs(kind)
        output = net(x)
        positions = output.shape[2:] if kind == "convolution" else output.shape[1:-1]
        mask = seeded(len(x), *positions, seed=3) > -0.5
        p.valid(mask)
        output = net(x)
        loss_of(output * (mask[:, None] if kind == "convolution" else mask[..., None])).backward()
        p.step()
        p.remove_hooks()
        found.append(factors(p))
    for want, got in zip(*found, strict=True):
        assert_same([got.flatten()], [want.diagonal(dim1=1, dim2=2).flatten()])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_of_16_bits(dtype):
    """Squared and summed in float32: as of the same rows in float32, to the rounding of the sums."""
    net, x = nn.Linear(6, 5).to(dtype), seeded(4, 7, 6).to(dtype)
    p = mk.KFAC(net, 1e-2, kl_clip=None, factor_decay=0.0, **DIAGONAL)
    output = net(x)
    (gradient,) = torch.autograd.grad(output.square().sum() / 64, output, retain_graph=True)
    (output.square().sum() / 64).backward()
    p.step()
    a, b = (f.flatten() for f in p.fisher.factors(0))
    rows, g = x.float().flatten(0, 1), 4 * gradient.float().flatten(0, 1)
    torch.testing.assert_close(a, torch.cat([rows.square().sum(0), torch.tensor([28.0])]) / 4, rtol=1e-5, atol=0)
    torch.testing.assert_close(b, g.square().sum(0) / 28, rtol=1e-5, atol=0)


def test_the_first_pattern_that_fits_is_taken():
    net = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4), nn.Sequential(nn.Linear(4, 7)))
    p = mk.KFAC(net, output={"2.*": "diagonal", "0": None, "*": 2}, input={"1": 3}, group_size=4)
    shapes = [layer.shape for layer in p._layers]
    assert [s.output_block for s in shapes] == [None, 2, 1]
    assert [s.input_block for s in shapes] == [4, 3, 4]


@pytest.mark.parametrize("pattern", ["embedding", "head", "h*"])
def test_a_layer_of_two_modules_has_the_names_of_both(pattern):
    net = nn.ModuleDict({"embedding": nn.Embedding(7, 4), "body": nn.Linear(4, 4), "head": nn.Linear(4, 7)})
    net["head"].weight = net["embedding"].weight
    shapes = {layer.title: layer.shape for layer in mk.KFAC(net, input={pattern: 2})._layers}
    assert [shape.input_block for shape in shapes.values()] == [2, None]


def test_a_model_that_is_a_layer_has_no_name():
    assert mk.KFAC(nn.Linear(3, 4), output={"": "diagonal"})._layers[0].shape.output_block == 1


@pytest.mark.parametrize("style", ["factored", "exact"])
def test_state_resumes_bit_for_bit(style):
    net = make("sequence")
    p = gather(net, "sequence", 3, damping_style=style, **DIAGONAL)
    q = kfac(net, damping_style=style, **DIAGONAL)
    q.load_state_dict(copy.deepcopy(p.state_dict()))
    gradients = [seeded(*layer.gradient().shape) for layer in p._layers]
    assert all(map(torch.equal, p.fisher.ihvp(gradients), q.fisher.ihvp(gradients)))
    with pytest.raises(ValueError, match=r"\(1, 4, 1, 1\), got .*\(1, 1, 4, 4\)"):
        q.load_state_dict(kfac(make("sequence"), damping_style=style).state_dict())


def test_two_levels_over_diagonals():
    """The spectral space takes eigenvectors of the factors, here axes."""
    net = make("linear")
    p = mk.TwoLevelKFAC(net, 1e-2, coarse_space="spectral", kl_clip=None, **DIAGONAL)
    loss_of(net(batch("linear"))).backward()
    p.step()
    for (a, b), vector in zip((p.fisher.factors(i) for i in range(2)), p.fisher.smallest_eigenvectors(), strict=True):
        want = torch.zeros_like(vector)
        want[int(b.argmin()), int(a.argmin())] = 1
        assert torch.equal(vector, want)
    assert p.diagnostics()["coarse_fallbacks"] == 0


def test_memory_of_a_head_is_linear_in_its_outputs():
    p = mk.KFAC(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 50_257)), output={"1": "diagonal"})
    (_, head) = p.covered().layers
    assert head.outputs == "diagonal of 50257"
    assert head.megabytes == pytest.approx((3 * 50_257 + 3 * 16) * 4 / 1e6)


BAD = [
    ({"output": {"heda": "diagonal"}}, ValueError, "output: expected patterns of the names of modules, got 'heda'"),
    ({"input": {"0": "dense"}}, ValueError, "input['0']: expected \"diagonal\", a block size or None, got 'dense'"),
    ({"output": {"0": 0}}, ValueError, "output['0']: expected at least 1, got 0"),
    ({"output": {"0": 1.5}}, TypeError, "output['0']: expected an int, got 1.5"),
    ({"output": "diagonal"}, TypeError, "output: expected forms by name"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD)
def test_errors(options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        mk.KFAC(nn.Sequential(nn.Linear(2, 2)), **options)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("kind", KIND_NETS)
def test_a_batch_that_is_not_finite_changes_nothing(kind, bad):
    net = make(kind)
    p = kfac(net, factor_decay=0.5, **DIAGONAL)
    for step, scale in enumerate((1.0, bad, 1.0)):
        kept = [f.clone() for f in factors(p)]
        net.zero_grad()
        (scale * loss_of(net(inputs(kind, step)))).backward()
        p.step()
        if step == 1:
            assert p.fisher.skipped == 1
            assert all(map(torch.equal, kept, factors(p)))
    assert p.fisher.seen == 2 and all(bool(f.isfinite().all()) for f in factors(p))
