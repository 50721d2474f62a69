"""Positions that do not count, as padding and ignored targets, are no rows of the factors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gathering_cases import EKFAC, assert_same, kfac, seeded, state
from torch import Tensor, nn


class Tokens(nn.Module):
    """A layer of each kind that has positions, and one on the pooled output."""

    def __init__(self, convolution: nn.Module) -> None:
        super().__init__()
        self.embedding, self.linear, self.norm = nn.Embedding(7, 3, padding_idx=0), nn.Linear(3, 3), nn.LayerNorm(3)
        self.convolution, self.head = convolution, nn.Linear(3, 2)
        self.double()
        with torch.no_grad():
            for i, q in enumerate(self.parameters()):
                q.copy_(0.7 * seeded(*q.shape, seed=i))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(torch.tanh(self.linear(self.embedding(tokens))))
        return self.head(torch.tanh(self.convolution(x.mT)).mT)


def tokens_and_mask() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(6) < torch.tensor([6, 2, 4, 1, 3])[:, None]
    mask[0, 2] = False  # not only at the end
    return torch.randint(7, (5, 6), generator=generator), mask


CONVOLUTIONS = {
    "pointwise": lambda: nn.Conv1d(3, 3, 1),
    "three wide": lambda: nn.Conv1d(3, 3, 3, padding=1),
    "grouped": lambda: nn.Conv1d(3, 3, 3, padding=1, groups=3, bias=False),
}


@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("average", ["batch", "positions", "sum"])
@pytest.mark.parametrize("convolution", CONVOLUTIONS)
def test_a_mask_leaves_rows_out(convolution, average, calls):
    """Against explicit sums over the valid rows."""
    tokens, mask = tokens_and_mask()
    net = Tokens(CONVOLUTIONS[convolution]())
    p = kfac(net, masked=True, loss_average=average, accumulation_steps=calls)
    n, v = len(tokens), int(mask.sum())
    each = {"batch": 1 / n, "positions": 1 / v, "sum": 1.0}[average]
    captured: dict[str, tuple[Tensor, Tensor]] = {}
    hooks = [
        m.register_forward_hook(lambda m, x, y, name=name: captured.update({name: (x[0], y)}))
        for name, m in net.named_children()
    ]
    for _ in range(calls):
        p.valid(mask)
        output = net(tokens)
        loss = (0.5 * (output - 1).square().sum(-1) * mask).sum() * each
        (loss if average == "sum" else loss / calls).backward()
    p.step()
    for hook in hooks:
        hook.remove()
    net(tokens)
    captured.clear()
    hooks = [
        m.register_forward_hook(lambda m, x, y, name=name: captured.update({name: (x[0], y)}))
        for name, m in net.named_children()
    ]
    output = net(tokens)
    loss = (0.5 * (output - 1).square().sum(-1) * mask).sum() * each
    names = list(captured)
    gradients = dict(zip(names, torch.autograd.grad(loss, [captured[m][1] for m in names]), strict=True))
    samples = v if average == "positions" else n
    for i, layer in enumerate(p._layers):
        x, c = captured[layer.name][0], gradients[layer.name]
        if layer.name == "convolution":
            x, c = _patches(net.convolution, x), c.mT
        g = c * (1 if average == "sum" else samples)
        got_a, got_b = p.fisher.factors(i)
        if layer.name == "norm":
            got = got_a.diagonal(dim1=1, dim2=2).sum()
            parts = torch.stack([g * F.layer_norm(x, (3,)), g], -1) * mask[..., None, None]
            rows = parts.flatten(0, 1) if average == "positions" else parts.sum(1)
            assert_same([got], [(rows.square().sum() / samples).detach()])
            continue
        if layer.name == "embedding":
            counts = torch.bincount(tokens[mask], minlength=7).double()
            counts[0] = 0
            assert_same([got_a.flatten()], [counts / samples])
        groups = getattr(layer.module, "groups", 1)
        width = g.shape[-1] // groups
        for k in range(groups):
            part = g[..., k * width : (k + 1) * width][mask]
            assert_same([got_b[k]], [part.mT @ part / v])
            if layer.name != "embedding":
                own = x[..., k * (x.shape[-1] // groups) : (k + 1) * (x.shape[-1] // groups)][mask]
                own = F.pad(own, (0, 1), value=1.0) if layer.module.bias is not None else own
                assert_same([got_a[k]], [(own.mT @ own / samples).detach()])


def _patches(module: nn.Conv1d, x: Tensor) -> Tensor:
    size = module.kernel_size[0]
    return F.unfold(x[:, :, None], (1, size), padding=(0, module.padding[0])).mT


def run_with(mask: Tensor | None, x: Tensor, **options: Any) -> list[Tensor]:
    net = Tokens(nn.Conv1d(3, 3, 1))
    p = kfac(net, **options)
    for _ in range(2):
        net.zero_grad()
        if mask is not None:
            p.valid(mask)
        output = net(x)
        kept = torch.ones_like(output[..., 0]) if mask is None else mask
        each = kept.sum() if options.get("loss_average") == "positions" else len(x)
        ((0.5 * (output - 1).square().sum(-1) * kept).sum() / each).backward()
        p.step()
    return state(p)


@pytest.mark.parametrize("average", ["batch", "positions"])
@pytest.mark.parametrize(
    "options", [{}, {"approximation": "reduce"}, EKFAC, {**EKFAC, "approximation": "reduce"}], ids=str
)
def test_a_mask_that_is_full_is_none(options, average):
    tokens, _ = tokens_and_mask()
    full = torch.ones_like(tokens, dtype=torch.bool)
    assert_same(
        run_with(full, tokens, loss_average=average, **options), run_with(None, tokens, loss_average=average, **options)
    )


@pytest.mark.parametrize("average", ["batch", "positions"])
@pytest.mark.parametrize(
    "options", [{}, {"approximation": "reduce"}, EKFAC, {**EKFAC, "approximation": "reduce"}], ids=str
)
def test_padding_is_as_if_it_were_not_there(options, average):
    tokens, _ = tokens_and_mask()
    mask = torch.arange(9) < 6
    padded = F.pad(tokens, (0, 3), value=3)
    want = run_with(None, tokens, loss_average=average, **options)
    assert_same(run_with(mask.expand(5, 9), padded, loss_average=average, **options), want)


def test_a_mask_is_of_one_batch():
    tokens, mask = tokens_and_mask()
    net = Tokens(nn.Conv1d(3, 3, 1))
    p = kfac(net)
    p.valid(mask)
    net(tokens).sum().backward()
    p.step()
    assert p._gatherer.valid is None


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_mask_without_a_valid_position(device):
    """Known on the host, it is as if the layers had not been called; else the batch is refused and counted."""
    tokens, mask = tokens_and_mask()
    net = Tokens(nn.Conv1d(3, 3, 1))
    p = kfac(net, factor_decay=0.5)
    net(tokens).square().sum().backward()
    p.step()
    kept = state(p)
    p.valid(torch.zeros_like(mask))
    if device != "cpu":
        p._gatherer.valid.empty = None
    net(tokens).square().sum().backward()
    p.step()
    assert all(map(torch.equal, state(p), kept))
    assert (p.fisher.seen, p.fisher.skipped) == (1, int(device != "cpu"))


def test_masks_that_do_not_fit():
    tokens, mask = tokens_and_mask()
    net = Tokens(nn.Conv1d(3, 3, 3))
    p = kfac(net)
    for bad, error, message in (
        (mask.float(), TypeError, "valid: mask: expected a bool tensor, got torch.float32"),
        (mask[0], ValueError, r"valid: mask: expected shape \(samples, positions\), got \(6,\)"),
    ):
        with pytest.raises(error, match=message):
            p.valid(bad)
    p.valid(mask)
    with pytest.raises(ValueError, match=r"valid: mask: expected shape \(5, 4\), .* of convolution, got \(5, 6\)"):
        net(tokens)
    p.valid(mask[:, :4])
    with pytest.raises(ValueError, match=r"valid: mask: expected shape \(5, 6\), .* of embedding, got \(5, 4\)"):
        net(tokens)
    padded = Tokens(nn.Conv1d(3, 3, 3, padding=1))
    q = kfac(padded)
    q.valid(mask)
    with pytest.raises(ValueError, match=r"expected KFAC\(..., masked=True\), as of the convolution convolution"):
        padded(tokens)
