"""MiniBlockFisher against the dense empirical Fisher matrix, masked, in float64."""

from __future__ import annotations

import pytest
import torch
from per_sample import per_sample_gradients
from relatives_cases import build, loss_of
from torch import Tensor, nn
from two_level_cases import DAMPING, F64, close

import mfac_kernels as mk

KINDS = ["linear", "convolutional", "normalised", "resolutions"]


def fisher(net: nn.Module, p: mk.MiniBlockFisher, x: Tensor, shift: int = 0) -> Tensor:
    rows = per_sample_gradients(net, p._layers, lambda: loss_of(net, x, shift=shift), len(x))
    return len(x) * rows.mT @ rows


def layers_of(p: mk.MiniBlockFisher, f: Tensor) -> list[Tensor]:
    sizes = [layer.gradient().numel() for layer in p._layers]
    ends = torch.tensor(sizes).cumsum(0).tolist()
    return [f[end - n : end, end - n : end] for n, end in zip(sizes, ends, strict=True)]


def masked(p: mk.MiniBlockFisher, layer: int, f: Tensor) -> Tensor:
    """The blocks of a layer's matrix, from the formula: coordinates of a kernel, of a neuron, of a unit."""
    module = p._layers[layer].module
    rows, columns = p._layers[layer].gradient().shape
    coordinate = torch.arange(rows * columns)
    row, column = coordinate // columns, coordinate % columns
    if isinstance(module, nn.Conv2d):
        column = column // (module.kernel_size[0] * module.kernel_size[1])  # the bias is one further
        block = row * columns + column
    else:
        block = row
    return f * (block[:, None] == block)


def expected(p: mk.MiniBlockFisher, matrices: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
    return [
        torch.linalg.solve(masked(p, i, f) + DAMPING * torch.eye(len(f), dtype=F64), g.flatten()).view_as(g)
        for i, (f, g) in enumerate(zip(matrices, gradients, strict=True))
    ]


def gradients_of(p: mk.MiniBlockFisher) -> list[Tensor]:
    return [layer.gradient().clone() for layer in p._layers]


@pytest.mark.parametrize("kind", KINDS)
def test_the_dense_fisher_matrix_masked_and_averaged(kind):
    """Two batches, debiased: (0.3 F1 + F2) / 1.3 with a decay of 0.3."""
    net, x = build(kind)
    p = mk.MiniBlockFisher(net, DAMPING, kl_clip=None, factor_decay=0.3)
    matrices = []
    for shift in (0, 1):
        net.zero_grad()
        loss_of(net, x, shift=shift).backward()
        gradients = gradients_of(p)
        matrices.append(layers_of(p, fisher(net, p, x, shift)))
        p.step()
    average = [(0.3 * a + b) / 1.3 for a, b in zip(*matrices, strict=True)]
    for got, want in zip(gradients_of(p), expected(p, average, gradients), strict=True):
        close(got, want)
    assert p.diagnostics()["seen"] == 2


def test_one_block_for_all_neurons():
    net, x = build("linear")
    p = mk.MiniBlockFisher(net, DAMPING, kl_clip=None, linear="mean")
    loss_of(net, x).backward()
    gradients = gradients_of(p)
    matrices = layers_of(p, fisher(net, p, x))
    p.step()
    for layer, f, g in zip(p._layers, matrices, gradients, strict=True):
        rows, columns = g.shape
        mean = f.view(rows, columns, rows, columns).diagonal(dim1=0, dim2=2).mean(-1)
        close(layer.gradient(), g @ torch.linalg.inv(mean + DAMPING * torch.eye(columns, dtype=F64)))


@pytest.mark.parametrize("linear", ["neuron", "mean"])
def test_a_layer_called_twice_over_positions(linear):
    """The gradient of a sample is the sum over calls and positions; in parts of the batch, too."""
    torch.manual_seed(0)
    net = nn.Linear(3, 2).double()
    x = torch.randn(5, 4, 3, dtype=F64)
    p = mk.MiniBlockFisher(net, DAMPING, kl_clip=None, linear=linear)
    (torch.tanh(net(x)).square().sum() / 5 + torch.sin(net(2 * x[:, :1])).sum() / 5).backward()
    gradient = p._layers[0].gradient().clone()
    rows = []
    for one in x:
        copy = nn.Linear(3, 2).double()
        copy.load_state_dict(net.state_dict())
        (torch.tanh(copy(one)).square().sum() + torch.sin(copy(2 * one[:1])).sum()).backward()
        rows.append(torch.cat([copy.weight.grad, copy.bias.grad[:, None]], 1))
    j = torch.stack(rows)
    blocks = torch.einsum("noi,noj->oij", j, j) / 5
    if linear == "mean":
        blocks = blocks.mean(0, keepdim=True).expand(2, -1, -1)
    p.step()
    damped = blocks + DAMPING * torch.eye(4, dtype=F64)
    close(p._layers[0].gradient(), torch.linalg.solve(damped, gradient[..., None])[..., 0])


def test_samples_in_parts_are_the_same(monkeypatch):
    results = []
    for most in (1, 1 << 22):
        monkeypatch.setattr("mfac_kernels.preconditioners.mini_block._AT_A_TIME", most)
        net, x = build("convolutional")
        p = mk.MiniBlockFisher(net, DAMPING)
        loss_of(net, x).backward()
        p.step()
        results.append(gradients_of(p))
    for a, b in zip(*results, strict=True):
        close(a, b)


def test_passes_before_a_step_are_one_batch():
    results = []
    for parts in (1, 2):
        net, x = build("convolutional")
        x = torch.cat([x, x.flip(0)])
        p = mk.MiniBlockFisher(net, DAMPING, accumulation_steps=parts)
        labels = torch.arange(len(x)) * 7 % 3
        for xs, ys in zip(x.chunk(parts), labels.chunk(parts), strict=True):
            (nn.functional.cross_entropy(net(xs), ys) / parts).backward()
        p.step()
        results.append(gradients_of(p))
    for a, b in zip(*results, strict=True):
        close(a, b)


def test_labels_drawn_from_the_model():
    net, x = build("linear")
    p = mk.MiniBlockFisher(net, DAMPING, fisher_type="mc", kl_clip=None)
    with p.sampling():
        loss_of(net, x, shift=1).backward()
    loss_of(net, x).backward()
    gradients = gradients_of(p)
    want = expected(p, layers_of(p, fisher(net, p, x, 1)), gradients)
    p.step()
    for got, one in zip(gradients_of(p), want, strict=True):
        close(got, one)


def test_the_table_and_what_is_held():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5))
    p = mk.MiniBlockFisher(net)
    table = p.covered()
    assert [row.inputs for row in table.layers] == ["12 of 9 x 9, diagonal of 4", "4 of 2 x 2", "5 of 17 x 17"]
    state = p.blocks.state_dict()
    held = sum(t.nbytes for name in ("sums", "inverses") for parts in state[name] for t in parts)
    assert table.megabytes * 1e6 == pytest.approx(held)
    with pytest.raises(ValueError, match=r'model: 3 needs .* GB for 5 of 17 x 17, .*linear="mean"'):
        mk.MiniBlockFisher(net, max_layer_bytes=9000)


def test_what_has_no_mini_blocks():
    net = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2))
    with pytest.warns(UserWarning, match="MiniBlockFisher leaves the gradients .* embeddings have no mini-blocks"):
        p = mk.MiniBlockFisher(net)
    assert [layer.title for layer in p._layers] == ["1"]
    with pytest.raises(ValueError, match="linear: expected one of neuron, mean, got 'all'"):
        mk.MiniBlockFisher(net, linear="all")
