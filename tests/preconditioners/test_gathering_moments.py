"""The eigenvalue correction: moments that overflow are refused, those of embeddings are summed by index."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gathering_cases import EKFAC, F64, KINDS, Net, assert_same, batch, kfac, loss_of, seeded, state
from torch import Tensor, nn

import mfac_kernels as mk


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_moments_that_overflow_refuse_their_batch(kind, calls, k):
    """Finite activations and gradients, finite factors, squares of products that are not: nothing changes."""
    net = Net(kind, calls).float()
    p = kfac(net, accumulation_steps=k, **{**EKFAC, "factor_decay": 0.5})
    x = batch(kind).detach().float()

    def run(scale: float) -> None:
        net.zero_grad()
        for i in range(k):
            body = net.body(scale * x) if i == k - 1 else net.body(x)
            (scale * body).mean().backward() if scale != 1 else loss_of(net(x)).backward()
        p.step()

    run(1)
    run(1)
    kept = state(p)
    run(1e12)
    assert bool(net.body.weight.grad.isfinite().all())
    assert all(map(torch.equal, state(p), kept))
    assert (p.fisher.seen, p.fisher.skipped) == (2, 1)
    run(1)
    assert all(bool(q.grad.isfinite().all()) for q in net.parameters())
    assert p.fisher.seen == 3


def one_hot_moments(net: nn.Module, tokens: Tensor, g: Tensor, basis: Tensor) -> Tensor:
    """(outputs, inputs): (1 / N) sum over rows of (U_B^T g)_i^2 a_j, with a one-hot."""
    a = F.one_hot(tokens.flatten(), net.num_embeddings).double()
    if net.padding_idx is not None:
        a[:, net.padding_idx] = 0
    return (g.flatten(0, -2) @ basis).square().mT @ a / len(tokens)


@pytest.mark.parametrize("group_size", [None, 2])
@pytest.mark.parametrize("padding_idx", [None, 0])
@pytest.mark.parametrize("shape", [(6,), (6, 5), (1, 1), (3, 2, 4)])
def test_moments_of_an_embedding(shape, padding_idx, group_size):
    """By index, against one-hot rows."""
    net = nn.Embedding(7, 3, padding_idx=padding_idx).double()
    tokens = torch.randint(7, shape, generator=torch.Generator().manual_seed(1))
    p = kfac(net, group_size=(None, group_size), batch_size=shape[0], **EKFAC)
    target = seeded(*shape, 3)
    for _ in range(2):
        net.zero_grad()
        output = net(tokens)
        (0.5 * (output - target).square().sum() / len(tokens)).backward()
        p.step()
    basis = torch.block_diag(*p.fisher._inverses._outputs[0][0])[:3, :3]
    want = one_hot_moments(net, tokens, (output - target).detach(), basis)
    assert_same([p.fisher._inverses.moments[0][0, 0, :, 0]], [want])


def test_moments_of_an_embedding_called_twice_in_each_of_two_passes():
    tokens, found = torch.randint(7, (6, 4), generator=torch.Generator().manual_seed(1)), []
    for halves in (False, True):
        net = nn.Embedding(7, 3).double()
        with torch.no_grad():
            net.weight.copy_(seeded(7, 3))
        p = kfac(net, accumulation_steps=2, **EKFAC)
        for _ in range(2):
            for _ in range(2):
                output = torch.cat([net(part) for part in tokens.chunk(2, 1)], 1) if halves else net(tokens)
                (0.5 * output.square().sum() / 6 / 2).backward()
            p.step()
        found.append(state(p))
    assert_same(*found)


def test_moments_of_an_embedding_need_no_one_hot_rows():
    """Nothing of tokens x vocabulary is allocated: 2048 x 20,000."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(t, Tensor):
                    largest = max(largest, t.untyped_storage().nbytes())
            return out

    net = nn.Embedding(20_000, 4)
    tokens = torch.randint(20_000, (32, 64))
    p = mk.KFAC(net, kl_clip=None, **EKFAC)
    for _ in range(2):
        with Watch():
            net(tokens).square().sum().backward()
            p.step()
    assert largest <= 4 * 20_000 * 4


def test_moments_by_index_of_a_fisher():
    shape = mk.KroneckerShape(outputs=3, inputs=7, input_block=1)
    found = []
    index, g = torch.randint(7, (11,)), seeded(1, 11, 3)
    weights = seeded(11, 1).square()
    for by_index in (False, True):
        fisher = mk.KroneckerFisher([shape], style="exact", eigen_correction=True, dtype=F64, factor_decay=0.0)
        rows = index if by_index else F.one_hot(index, 7).double()[None]
        fisher.add_inputs(0, lambda total, beta: total.fill_(1.0))
        fisher.add_outputs(0, lambda total, beta: total.fill_(1.0))
        for _ in range(2):
            fisher.add_moments(0, rows, g, 0.5, weights)
        fisher.update()
        found.append(fisher._inverses.moments[0].clone())
    assert_same(found[1:], found[:1])
