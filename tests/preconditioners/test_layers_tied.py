"""One weight as an embedding and as a head: the product with the partial traces of both uses' Fisher blocks."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gathering_cases import EKFAC, F64, FixedScaler, assert_same, kfac, seeded
from module_cases import assert_same_layers, blocks, stepped
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mfac_kernels as mk

INDICES, WIDTH, N = 7, 3, 4


class Net(nn.Module):
    """Tokens through an embedding, a body and a head of the same weight, called for ``chunks`` of the positions."""

    def __init__(self, bias: bool = False, chunks: int = 1, tied: bool = True, padding_idx: int | None = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(INDICES, WIDTH, padding_idx=padding_idx)
        self.body = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, INDICES, bias=bias)
        self.chunks = chunks
        self.double()
        with torch.no_grad():
            for i, p in enumerate(self.parameters()):
                p.copy_(0.8 * seeded(*p.shape, seed=i))
            self.head.weight.copy_(self.embed.weight)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor, through: Callable[..., Any] = lambda f, x: f(x)) -> Tensor:
        x = torch.tanh(self.body(through(self.embed, tokens)))
        return torch.cat([through(self.head, part) for part in x.chunk(self.chunks, 1)], 1)


def tokens(seed: int = 0, n: int = N, positions: int = 4) -> Tensor:
    return torch.randint(INDICES, (n, positions), generator=torch.Generator().manual_seed(seed))


def loss_of(output: Tensor) -> Tensor:
    """A mean over samples of sums over positions."""
    labels = torch.arange(output[..., 0].numel()) % INDICES
    return F.cross_entropy(output.flatten(0, -2), labels, reduction="sum") / len(output)


def uses(
    net: nn.Module,
    losses: Sequence[Callable[[], Tensor]],
    mask: Tensor | None = None,
    reduce: bool = False,
) -> list[tuple[Tensor, Tensor]]:
    """(A, B) of the weight as an embedding and as a head, in its orientation, dense, by the definition.

    Means over passes, one for each loss, of sums over the positions (of those in ``mask``) of all calls.
    """
    bias = getattr(net, "head", None) is not None and net.head.bias is not None
    found: dict[bool, list[tuple[Tensor, Tensor]]] = {True: [], False: []}
    for loss in losses:
        calls: list[tuple[nn.Module, Tensor, Tensor]] = []
        hooks = [
            m.register_forward_hook(lambda m, x, y, calls=calls: calls.append((m, x[0].detach(), y)))
            for m in net.modules()
            if getattr(m, "weight", None) is net.embed.weight
        ]
        value = loss()
        for hook in hooks:
            hook.remove()
        gradients = torch.autograd.grad(value, [y for _, _, y in calls])
        for embedding, pairs in found.items():
            a, b = (torch.zeros(size, size, dtype=F64) for size in (WIDTH + int(bias), INDICES))
            positions = 0
            for (module, x, _), c in zip(calls, gradients, strict=True):
                if isinstance(module, nn.Embedding) != embedding:
                    continue
                n = len(x)
                counts = torch.ones(c.shape[:-1], dtype=torch.bool) if mask is None else mask
                g = n * c
                if embedding:
                    rows = F.one_hot(x, INDICES).to(F64)
                    if module.padding_idx is not None:
                        rows[..., module.padding_idx] = 0
                    g = F.pad(g, (0, int(bias)))
                    rows, g = rows[counts], g[counts]
                    a, b = a + g.mT @ g, b + rows.mT @ rows / n
                elif reduce:
                    each = counts[..., None].to(F64)
                    rows = (F.pad(x, (0, int(bias)), value=1.0) * each).sum(1)
                    g = (g * each).sum(1) / each.sum(1)
                    a, b = a + rows.mT @ rows / n, b + g.mT @ g * c.shape[1]
                    positions += n * c.shape[1]
                    continue
                else:
                    rows, g = F.pad(x, (0, int(bias)), value=1.0)[counts], g[counts]
                    a, b = a + rows.mT @ rows / n, b + g.mT @ g
                positions += len(g)
            positions = max(1, positions)
            pairs.append((a / positions, b) if embedding else (a, b / positions))
    return [tuple(torch.stack(parts).mean(0) for parts in zip(*pairs, strict=True)) for pairs in found.values()]


def product(both: Sequence[tuple[Tensor, Tensor]], block: int = 1) -> Tensor:
    """B (x) A of the docstring, B in blocks."""
    keep = torch.block_diag(*[torch.ones(block, block, dtype=F64)] * -(-INDICES // block))[:INDICES, :INDICES]
    both = [(a, b * keep) for a, b in both]
    a, b = sum(a * b.trace() for a, b in both), sum(b * a.trace() for a, b in both)
    return torch.kron(b, a) / a.trace()


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("bias", [False, True])
def test_the_product_with_the_partial_traces_of_both_uses(bias, chunks, passes, approximation):
    net = Net(bias, chunks)
    batches = [tokens(i) for i in range(passes)]
    p = kfac(net, accumulation_steps=passes, approximation=approximation)
    assert [layer.title for layer in p._layers] == ["embed = head", "body"] and p.skipped_layers == {}
    for x in batches:
        (loss_of(net(x)) / passes).backward()
    p.step()
    both = uses(net, [lambda x=x: loss_of(net(x)) for x in batches], reduce=approximation == "reduce")
    assert_same(blocks(p)[:1], [product(both)])
    a, b = p.fisher.factors(0)
    torch.testing.assert_close(a.diagonal(dim1=1, dim2=2).mean(), b.mean(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("options", [{}, {"damping_style": "exact"}, EKFAC], ids=["plain", "exact", "EKFAC"])
@pytest.mark.parametrize(("form", "block"), [({"head": None}, 7), ({"embed": 7}, 7), ({"head": 3}, 3)])
def test_other_forms_of_the_side_of_the_indices(form, block, options):
    """Dense, or in blocks; the eigenvalue correction keeps the trace of the moments, whatever the basis."""
    net, batches = Net(bias=True), [tokens(), tokens(1)]
    p = stepped(net, batches, loss_of, output=form, **options)
    both = uses(net, [lambda x=x: loss_of(net(x)) for x in batches])
    want, size = product(both, block), 4 * INDICES
    assert_same([blocks(p)[0][:size, :size]], [want])
    if "eigen_correction" in options:
        stack, row = p.fisher._place[0]
        moments = p.fisher._inverses.moments[p.fisher._stacks.index(stack)][row]
        exact = stepped(Net(bias=True), batches, loss_of, **options)
        other, row = exact.fisher._place[0]
        diagonal = exact.fisher._inverses.moments[exact.fisher._stacks.index(other)][row]
        torch.testing.assert_close(moments.sum(), diagonal.sum(), rtol=1e-10, atol=0)


def test_a_head_in_parts_is_the_head():
    assert_same_layers(*(stepped(Net(True, chunks), [tokens(), tokens(1)], loss_of) for chunks in (1, 2)))


@pytest.mark.parametrize("calls", [("embedding", "head"), ("head", "embedding"), ("head", "both", "embedding")])
def test_passes_that_reach_one_use(calls):
    """Sums of the other are those of the passes that did: nothing of an earlier batch is left in them."""
    net, x, h = Net(bias=True), tokens(), seeded(N, 4, WIDTH)

    def loss(what: str) -> Tensor:
        if what == "both":
            return loss_of(net(x))
        return loss_of(net.head(h)) if what == "head" else loss_of_width(net.embed(x))

    p = kfac(net, accumulation_steps=len(calls))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the body is not called
        for scale in (3.0, 1.0):
            net.zero_grad()
            for what in calls:
                (scale * loss(what) / len(calls)).backward()
            p.step()
    both = uses(net, [lambda what=what: loss(what) for what in calls])
    assert_same(blocks(p)[:1], [product(both)])


@pytest.mark.parametrize("bias", [False, True])
def test_one_sample_and_position_has_the_partial_traces_of_the_dense_fisher_matrix(bias):
    """There each use's factors are exact, but for what is beside the diagonal of B."""
    net, apart, x = Net(bias), Net(bias, tied=False), tokens(3, 1, 1)
    p = kfac(net)
    loss_of(net(x)).backward()
    p.step()
    loss_of(apart(x)).backward()
    of_head = torch.cat([apart.head.weight.grad, *([apart.head.bias.grad[:, None]] if bias else [])], 1)
    of_embedding = F.pad(apart.embed.weight.grad, (0, int(bias)))
    fisher = sum(torch.einsum("vi,wj->viwj", g, g) for g in (of_head, of_embedding))
    (a,), b = p.fisher.factors(0)
    b = b.flatten()
    torch.testing.assert_close(a * b.sum(), torch.einsum("vivj->ij", fisher), rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(b * a.trace(), torch.einsum("vivi->v", fisher), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("options", [{}, {"damping_style": "exact"}, EKFAC], ids=["plain", "exact", "EKFAC"])
@pytest.mark.parametrize("use", ["embedding", "head"])
def test_one_use_is_that_layer(use, options):
    """Of an embedding, or of a head whose B is diagonal, though its weight is tied."""
    tied = Net(bias=use == "head")
    plain = nn.Sequential(copy.deepcopy(tied.embed if use == "embedding" else tied.head), nn.Tanh())

    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = tied.embed, tied.head

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.embed(x) if use == "embedding" else self.head(x))

    x = tokens() if use == "embedding" else seeded(N, 5, WIDTH)
    if use == "head":
        options = {"group_size": (None, 1), **options}
    got, want = (stepped(net, [x], loss_of_width, **options) for net in (One(), plain))
    (ours,), (theirs,) = blocks(got), blocks(want)
    update, expected = got._layers[0].gradient(), want._layers[0].gradient()
    if use == "embedding":  # the same, the other way round
        theirs = theirs.view(WIDTH, INDICES, WIDTH, INDICES).permute(1, 0, 3, 2).reshape(ours.shape)
        expected = expected.mT
    assert_same([ours], [theirs])
    torch.testing.assert_close(update, expected, rtol=1e-9, atol=1e-11)


def loss_of_width(output: Tensor) -> Tensor:
    return 0.5 * (output - 1).square().sum() / len(output)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("passes", [1, 3])
def test_under_checkpoints(passes, use_reentrant):

    def through(f: Callable[..., Tensor], x: Tensor) -> Tensor:
        if use_reentrant and not x.is_floating_point():  # that needs an input with a gradient
            return f(x)
        return checkpoint(f, x, use_reentrant=use_reentrant)

    found = []
    for ways in ((), (through,)):
        net = Net(bias=True, chunks=2)
        p = kfac(net, accumulation_steps=passes)
        for i in range(passes):
            (loss_of(net(tokens(i), *ways)) / passes).backward()
        p.step()
        found.append(p)
    assert_same_layers(*found)


def test_passes_through_one_forward_add_their_gradients():
    """As those of labels: inputs count once, gradients each time."""
    net = Net()
    p = kfac(net, fisher_type="mc")
    logits = net(tokens())
    labels = [torch.randint(INDICES, (N * 4,), generator=torch.Generator().manual_seed(i)) for i in range(3)]

    def loss(logits: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), y, reduction="sum") / N

    with p.sampling():
        for y in labels:
            loss(logits, y).backward(retain_graph=True)
    loss_of(logits).backward()
    p.step()
    each = [uses(net, [lambda y=y: loss(net(tokens()), y)]) for y in labels]
    (a_e, _), (_, b_h) = (tuple(sum(parts) for parts in zip(*use, strict=True)) for use in zip(*each, strict=True))
    (_, b_e), (a_h, _) = each[0]
    assert_same(blocks(p)[:1], [product([(a_e, b_e), (a_h, b_h)])])


@pytest.mark.parametrize("padding_idx", [None, 2])
def test_several_embeddings_and_a_head(padding_idx):
    class Several(Net):
        def __init__(self) -> None:
            super().__init__(padding_idx=padding_idx)
            self.other = nn.Embedding(INDICES, WIDTH, padding_idx=padding_idx)
            self.other.weight = self.embed.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.body(self.embed(x) + self.other(x.flip(1)))))

    net = Several()
    p = kfac(net)
    loss_of(net(tokens())).backward()
    p.step()
    assert p._layers[0].title == "embed = head = other"
    assert_same(blocks(p)[:1], [product(uses(net, [lambda: loss_of(net(tokens()))]))])


@pytest.mark.parametrize("passes", [1, 2])
def test_a_sum_and_a_mean_have_the_same_factors(passes):
    found = []
    for average in ("batch", "sum"):
        net = Net(bias=True, chunks=2)
        p = kfac(net, loss_average=average, accumulation_steps=passes)
        for i in range(passes):
            loss = loss_of(net(tokens(i)))
            (loss * N if average == "sum" else loss / passes).backward()
        p.step()
        found.append(blocks(p))
    assert_same(*found)


def test_positions_as_samples():
    x, found = tokens(), []
    for given, average in ((x, "positions"), (x.reshape(-1, 1), "batch")):
        net = Net(bias=True)
        p = kfac(net, loss_average=average)
        (loss_of(net(given)) / (4 if average == "positions" else 1)).backward()
        p.step()
        found.append(p)
    assert_same_layers(*found)


@pytest.mark.parametrize("options", [{}, {"approximation": "reduce"}, EKFAC], ids=["expand", "reduce", "EKFAC"])
def test_masked_positions(options):
    """The definition over the others; and what stands at a masked position is without effect."""
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0]], dtype=torch.bool)
    x, labels, found = tokens(), torch.arange(16).view(4, 4) % INDICES, []
    for given in (x, torch.where(mask, x, (x + 1) % INDICES)):
        net = Net(bias=True)
        p = kfac(net, **options)
        for _ in range(2):
            net.zero_grad()
            p.valid(mask)
            loss = F.cross_entropy(net(given)[mask], labels[mask], reduction="sum") / N
            loss.backward()
            p.step()
        found.append(p)
    assert_same_layers(*found)
    loss = F.cross_entropy
    both = uses(
        net,
        [lambda: loss(net(x)[mask], labels[mask], reduction="sum") / N],
        mask,
        reduce=options.get("approximation") == "reduce",
    )
    assert_same(blocks(p)[:1], [product(both)])


def test_the_eigenvalue_correction_has_the_moments_of_each_call():
    net, x = Net(), tokens()
    p = kfac(net, **EKFAC)
    for _ in range(2):
        net.zero_grad()
        loss_of(net(x)).backward()
        p.step()
    basis = p.fisher._inverses._inputs[p.fisher._stacks.index(p.fisher._place[0][0])][0, 0]
    calls: list[tuple[nn.Module, Tensor, Tensor]] = []
    for m in (net.embed, net.head):
        m.register_forward_hook(lambda m, x, y: calls.append((m, x[0].detach(), y)))
    loss = loss_of(net(x))
    want = torch.zeros(INDICES, WIDTH, dtype=F64)
    for (module, a, _), c in zip(calls, torch.autograd.grad(loss, [y for _, _, y in calls]), strict=True):
        g = (N * c).flatten(0, -2)
        if isinstance(module, nn.Embedding):
            left, right = F.one_hot(a.flatten(), INDICES).to(F64), g
        else:
            left, right = g, a.flatten(0, -2)
        want += left.square().mT @ (right @ basis).square() / N
    stack, row = p.fisher._place[0]
    moments = p.fisher._inverses.moments[p.fisher._stacks.index(stack)][row, 0, :, 0]
    torch.testing.assert_close(moments, want, rtol=1e-9, atol=1e-14)


def test_the_update_is_the_dense_solve():
    net, x = Net(bias=True), tokens()
    p = kfac(net, damping_style="exact")
    loss_of(net(x)).backward()
    g = p._layers[0].gradient().flatten()
    p.step()
    want = torch.linalg.solve(blocks(p)[0] + 1e-2 * torch.eye(len(g), dtype=F64), g)
    torch.testing.assert_close(p._layers[0].gradient().flatten(), want, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("scale", [2.0**-4, 2.0**8])
def test_a_scaled_loss(scale):
    """Factors are homogeneous in the gradient, also through the root that both are divided by."""

    found = []
    for scaler in (None, FixedScaler(scale)):
        net = Net(bias=True)
        p = kfac(net, scaler=scaler)
        loss = loss_of(net(tokens()))
        (loss if scaler is None else loss * scale).backward()
        if scaler is not None:
            for q in net.parameters():
                q.grad /= scale
        p.step()
        found.append(p)
    assert_same_layers(*found)


@pytest.mark.parametrize("options", [{}, EKFAC], ids=["plain", "EKFAC"])
@pytest.mark.parametrize("where", ["input", "gradient", "overflow"])
def test_batches_that_are_not_finite_change_nothing(where, options):
    net = Net(bias=True).float()
    p = kfac(net, factor_decay=0.5, **options)
    loss_of(net(tokens())).backward()
    p.step()
    kept = [f.clone() for f in p.fisher.factors(0)]
    net.zero_grad()
    weights = {"input": float("inf"), "gradient": 1.0, "overflow": 1e15}[where]
    y = net.head(weights * torch.tanh(net.body(net.embed(tokens()))))
    (y * {"input": 1.0, "gradient": float("nan"), "overflow": 1e15}[where]).sum().backward()
    p.step()
    assert p.fisher.skipped == 1
    assert all(map(torch.equal, kept, p.fisher.factors(0)))
    net.zero_grad()
    loss_of(net(tokens(1))).backward()
    p.step()
    assert p.fisher.seen == 2 and all(bool(f.isfinite().all()) for f in p.fisher.factors(0))


@pytest.mark.parametrize("options", [{}, EKFAC], ids=["plain", "EKFAC"])
def test_state_between_micro_batches(options):
    found = []
    for resumed in (False, True):
        net = Net(bias=True)
        p = kfac(net, accumulation_steps=2, **options)
        for i in range(4):
            if i in (0, 2):
                net.zero_grad()
            (loss_of(net(tokens(i))) / 2).backward()
            if i in (1, 3):
                p.step()
            if resumed and i == 2:
                state = copy.deepcopy(p.state_dict())
                p.remove_hooks()
                p = kfac(net, accumulation_steps=2, **options)
                p.load_state_dict(state)
        found.append(p)
    for a, b in zip(*(p.fisher.factors(0) for p in found), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(found[0]._layers[0].gradient(), found[1]._layers[0].gradient())


@pytest.mark.parametrize("padding_idx", [None, 2])
@pytest.mark.parametrize("bias", [False, True])
def test_its_exact_fisher_matrix(bias, padding_idx):
    """For two-level K-FAC: the rows of J are the gradients of the samples."""
    net, x = Net(bias, padding_idx=padding_idx), tokens()
    p = mk.TwoLevelKFAC(net, 1e-2, kl_clip=None)
    loss_of(net(x)).backward()
    jacobian = p._batch.jacobian(None, F64, torch.device("cpu"))
    blocks = [seeded(*layer.gradient().shape, seed=i) for i, layer in enumerate(p._layers)]
    dots = jacobian.jvp(blocks)
    sums = jacobian.vjp(torch.arange(1.0, N + 1, dtype=F64))
    want = torch.zeros_like(sums[0])
    for i in range(N):
        net.zero_grad()
        labels = torch.arange(16).view(4, 4)[i] % INDICES
        F.cross_entropy(net(x[i : i + 1])[0], labels, reduction="sum").backward()
        each = [layer.gradient() for layer in p._layers]
        torch.testing.assert_close(dots[i] * N, sum((g * b).sum() for g, b in zip(each, blocks, strict=True)))
        want += (i + 1) * each[0] / N
    torch.testing.assert_close(sums[0], want)


def test_frozen_and_later_unfrozen():
    net = Net(bias=True)
    net.embed.weight.requires_grad_(False)
    with pytest.warns(UserWarning, match="head: its weight is not trained"):
        p = kfac(net)
    assert [layer.title for layer in p._layers] == ["body"]
    net.embed.weight.requires_grad_(True)
    loss_of(net(tokens())).backward()
    with pytest.raises(RuntimeError, match="weight was frozen at construction"):
        p.step()


class Predictions(nn.Module):
    """As BERT's: it holds the bias of its decoder too."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Linear(WIDTH, INDICES)
        self.bias = nn.Parameter(torch.zeros(INDICES))
        self.decoder.bias = self.bias


def test_a_module_that_holds_what_it_gave_to_one_within():
    net = nn.ModuleDict({"embed": nn.Embedding(INDICES, WIDTH), "predictions": Predictions()}).double()
    net["predictions"].decoder.weight = net["embed"].weight
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        p = kfac(net)
    assert [layer.title for layer in p._layers] == ["embed = predictions.decoder"] and p.fisher.shapes[0].bias


def linear_and_linear() -> nn.ModuleList:
    net = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)])
    net[1].weight = net[0].weight
    return net


def other_padding() -> nn.ModuleList:
    net = nn.ModuleList([nn.Embedding(5, 3, padding_idx=0), nn.Embedding(5, 3), nn.Linear(3, 2)])
    net[1].weight = net[0].weight
    return net


def other_bias() -> nn.ModuleList:
    net = nn.ModuleList([nn.Linear(3, 5), nn.Embedding(5, 3), nn.Linear(3, 2), nn.Linear(3, 5)])
    net[1].weight = net[3].weight = net[0].weight
    return net


def sparse() -> nn.ModuleList:
    net = nn.ModuleList([nn.Linear(3, 5), nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2)])
    net[0].weight = net[1].weight
    return net


def bias_of_another() -> nn.ModuleList:
    net = nn.ModuleList([nn.Linear(3, 5), nn.Embedding(5, 3), nn.Linear(3, 2), nn.Linear(4, 5)])
    net[1].weight, net[3].bias = net[0].weight, net[0].bias
    return net


@pytest.mark.parametrize("make", [linear_and_linear, other_padding, other_bias, sparse, bias_of_another])
def test_what_is_no_such_layer_is_left_alone(make):
    with pytest.warns(UserWarning, match="0: shares parameters with 1"):
        p = kfac(make())
    assert [layer.title for layer in p._layers] == ["2"]
    assert all("shares parameters with" in why for why in p.skipped_layers.values())


@pytest.mark.parametrize("name", ["embed", "head"])
def test_a_use_that_is_not_wanted(name):
    with pytest.warns(UserWarning, match="shares parameters with"):
        p = kfac(Net(), skip_layers=[name])
    assert [layer.title for layer in p._layers] == ["body"] and set(p.skipped_layers) == {"embed", "head"}
