"""The same Fisher blocks as curvlinops' K-FAC on whole networks: a transformer and a convolutional one.

Labels are drawn as it draws them, from a generator of the same seed. It knows Linear and Conv2d: attention is written
with Linear layers for it, and LayerNorm and the embedding have blocks here alone. Of a weight that is an embedding's
and a head's it sees the head, whose factors are those that the layer's are made of.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from gathering_cases import F64, assert_same, kfac, seeded
from module_cases import blocks
from torch import Tensor, nn

import mfac_kernels as mk

curvlinops = pytest.importorskip("curvlinops")

N, POSITIONS, WIDTH, HEADS, VOCABULARY, SEED = 4, 5, 6, 2, 7, 123
FISHER_TYPES = ["mc", "type-2", "empirical"]


class Attention(nn.Module):
    """As nn.MultiheadAttention, causal, by Linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(y.transpose(1, 2).flatten(2))


class TorchAttention(nn.MultiheadAttention):
    def __init__(self) -> None:
        super().__init__(WIDTH, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        return super().forward(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0]


class Block(nn.Module):
    def __init__(self, attention: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.norm1, self.attention, self.norm2 = nn.LayerNorm(WIDTH), attention(), nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Tokens (N, positions) -> logits (N, vocabulary, positions), as nn.CrossEntropyLoss takes them."""

    def __init__(self, attention: Callable[[], nn.Module] = Attention, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.Sequential(Block(attention), Block(attention))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY)
        if tied:
            self.head.weight = self.embed.weight
        self.double()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embed(tokens)))).mT


def transformers(tied: bool) -> tuple[Transformer, Transformer]:
    """One of torch's attention and one that curvlinops knows, with the same weights."""
    ours, theirs = Transformer(TorchAttention, tied), Transformer(Attention, tied)
    with torch.no_grad():
        for i, p in enumerate(theirs.parameters()):
            p.copy_(seeded(*p.shape, seed=i) * (0.5 if p.dim() > 1 else 0.2))
        state = theirs.state_dict()
        for i in range(2):
            stem = f"blocks.{i}.attention."
            for kind in ("weight", "bias"):
                parts = [state.pop(f"{stem}{side}_proj.{kind}") for side in "qkv"]
                state[f"{stem}in_proj_{kind}"] = torch.cat(parts)
        ours.load_state_dict(state)
    return ours, theirs


def cnn() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, stride=2),
        nn.Tanh(),
        nn.Conv2d(4, 5, 2, bias=False),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(20, VOCABULARY),
    ).double()


def gathered(net: nn.Module, x: Tensor, y: Tensor, fisher_type: str, **options: object) -> mk.KFAC:
    """Ours, of a mean over samples of sums over positions, or with ``loss_average="positions"`` over both."""
    p = kfac(net, fisher_type="empirical" if fisher_type == "empirical" else "mc", **options)
    logits = net(x)
    rows = logits.movedim(1, -1).flatten(0, -2)
    terms = len(rows) if options.get("loss_average") == "positions" else len(x)
    log_p = rows.log_softmax(1)
    with p.sampling():
        if fisher_type == "mc":
            labels = rows.detach().softmax(1).multinomial(1, generator=torch.Generator().manual_seed(SEED))
            (-log_p.gather(1, labels).sum() / terms).backward(retain_graph=True)
        elif fisher_type == "type-2":
            for k in range(rows.shape[1]):
                root = log_p[:, k].detach().exp().sqrt()
                (-(root * log_p[:, k]).sum() / terms).backward(retain_graph=True)
    (F.cross_entropy(rows, y.flatten(), reduction="sum") / terms).backward()
    p.step()
    return p


def by_curvlinops(
    net: nn.Module, x: Tensor, y: Tensor, fisher_type: str, approximation: str
) -> dict[str, tuple[Tensor, Tensor]]:
    """B and A by the names of modules, the bias last."""
    layers = [m for m in net.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    operator = curvlinops.KFACLinearOperator(
        net,
        nn.CrossEntropyLoss(),
        [q for layer in layers for q in layer.parameters()],
        [(x, y)],
        fisher_type=fisher_type,
        kfac_approx=approximation,
        seed=SEED,
        separate_weight_and_bias=False,
        check_deterministic=False,
    )
    operator.compute_kronecker_factors()
    a, b = operator._input_covariances, operator._gradient_covariances
    return {name: (b[name], a[name]) for name in operator._mapping}


@pytest.fixture
def tokens() -> tuple[Tensor, Tensor]:
    x, y = torch.randint(VOCABULARY, (2, N, POSITIONS), generator=torch.Generator().manual_seed(1))
    return x, y


@pytest.mark.parametrize("fisher_type", FISHER_TYPES)
@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_a_whole_transformer(tokens, approximation, fisher_type):
    ours, theirs = transformers(tied=False)
    # Theirs is of the mean over samples and positions. With samples of S positions each, it is S times as large.
    average, factor = ("positions", 1) if approximation == "expand" else ("batch", POSITIONS)
    p = gathered(ours, *tokens, fisher_type, loss_average=average, approximation=approximation)
    want = by_curvlinops(theirs, *tokens, fisher_type, approximation)
    found = dict(zip([layer.title for layer in p._layers], blocks(p), strict=True))
    assert len(want) == 13 and set(found) - set(want) == {
        "embed",
        "norm",
        *(f"blocks.{i}.norm{j}" for i in range(2) for j in (1, 2)),
    }
    assert_same([found[name] for name in want], [factor * torch.kron(*pair) for pair in want.values()])


@pytest.mark.parametrize("fisher_type", FISHER_TYPES)
def test_a_transformer_whose_embedding_is_its_head(tokens, fisher_type):
    """Apart from that weight the factors are curvlinops'; and its own are made of curvlinops' of the head's call."""
    ours, theirs = transformers(tied=True)
    p = gathered(ours, *tokens, fisher_type, loss_average="positions")
    want = by_curvlinops(theirs, *tokens, fisher_type, "expand")
    found = dict(zip([layer.title for layer in p._layers], blocks(p), strict=True))
    assert found.keys() - want.keys() >= {"embed = head"} and p.skipped_layers == {}
    others = [name for name in want if name != "head"]
    assert_same([found[name] for name in others], [torch.kron(*want[name]) for name in others])

    alone = Transformer(TorchAttention)  # an embedding of its own, with the same gradient
    alone.load_state_dict(ours.state_dict())
    q = gathered(alone, *tokens, fisher_type, loss_average="positions")
    (of_index, of_width) = q.fisher.factors([layer.title for layer in q._layers].index("embed"))
    calls = [
        (want["head"][1], want["head"][0].diagonal().diag()),
        (F.pad(of_width[0], (0, 1, 0, 1)), of_index.flatten().diag()),
    ]
    a, b = sum(a * b.trace() for a, b in calls), sum(b * a.trace() for a, b in calls)
    assert_same([found["embed = head"]], [torch.kron(b, a) / a.trace()])


@pytest.mark.parametrize("fisher_type", FISHER_TYPES)
@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_a_convolutional_network(approximation, fisher_type):
    net, x, y = cnn(), seeded(N, 3, 6, 6), torch.arange(N) % VOCABULARY
    p = gathered(net, x, y, fisher_type, approximation=approximation)
    p.remove_hooks()
    want = by_curvlinops(net, x, y, fisher_type, approximation)
    assert list(want) == [layer.title for layer in p._layers]
    assert_same(blocks(p), [torch.kron(*pair) for pair in want.values()])


def test_these_networks_compute_the_same(tokens):
    ours, theirs = transformers(tied=True)
    torch.testing.assert_close(ours(tokens[0]), theirs(tokens[0]), rtol=1e-12, atol=1e-13)
    assert ours(tokens[0]).dtype == F64
