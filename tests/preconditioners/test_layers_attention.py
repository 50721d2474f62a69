"""nn.MultiheadAttention against the same attention written with four nn.Linear: the same factors, the same updates."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gathering_cases import EKFAC, F64, assert_same, factors, kfac, loss_of, seeded
from module_cases import assert_same_layers, stepped
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mfac_kernels as mk

WIDTH, HEADS, N = 6, 2, 4


class Plain(nn.Module):
    """Inputs (N, positions, width)."""

    def __init__(self, like: nn.MultiheadAttention) -> None:
        super().__init__()
        bias = like.in_proj_bias is not None
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(width, WIDTH, bias=bias, dtype=like.out_proj.weight.dtype)
            for width in (WIDTH, like.kdim, like.vdim, WIDTH)
        )
        weights = [like.q_proj_weight, like.k_proj_weight, like.v_proj_weight]
        if like.in_proj_weight is not None:
            weights = like.in_proj_weight.chunk(3)
        biases = like.in_proj_bias.chunk(3) if bias else [None] * 3
        with torch.no_grad():
            for own, weight, b in zip(
                (self.q_proj, self.k_proj, self.v_proj, self.out_proj),
                (*weights, like.out_proj.weight),
                (*biases, like.out_proj.bias),
                strict=True,
            ):
                own.weight.copy_(weight)
                if bias:
                    own.bias.copy_(b)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **masks: Tensor | None) -> tuple[Tensor]:
        q, k, v = (
            y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in (self.q_proj(q), self.k_proj(k), self.v_proj(v))
        )
        mask = masks.get("attn_mask")
        if (padding := masks.get("key_padding_mask")) is not None:
            padding = padding[:, None, None]
            mask = padding if mask is None else mask | padding
        y = F.scaled_dot_product_attention(q, k, v, None if mask is None else ~mask)
        return (self.out_proj(y.transpose(1, 2).flatten(2)),)


class Net(nn.Module):
    """An attention that is called ``calls`` times: on itself, on a memory, or on three inputs."""

    def __init__(self, attention: nn.Module, way: str = "self", calls: int = 1, **options: Any) -> None:
        super().__init__()
        self.attention, self.way, self.calls, self.options = attention, way, calls, options
        self.batch_first = getattr(attention, "batch_first", True)

    def forward(self, inputs: tuple[Tensor, ...], through: Callable[..., Any] = lambda f, *x: f(*x)) -> Tensor:
        x, *others = inputs if self.batch_first else [t.transpose(0, 1) for t in inputs]
        for _ in range(self.calls):
            others = [x, x] if self.way == "self" else others * (3 - len(others))
            x = torch.tanh(through(self.attend, x, *others))
        return x if self.batch_first else x.transpose(0, 1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.way == "memory":
            v = k
        return self.attention(q, k, v, **self.options)[0]


def attention(dtype: torch.dtype = F64, **options: Any) -> nn.MultiheadAttention:
    made = nn.MultiheadAttention(WIDTH, HEADS, dtype=dtype, **{"batch_first": True, **options})
    with torch.no_grad():
        for i, p in enumerate(made.parameters()):
            p.copy_(0.5 * seeded(*p.shape, seed=i))
    return made


def inputs(way: str, seed: int = 0, kdim: int = WIDTH, vdim: int = WIDTH) -> tuple[Tensor, ...]:
    x = (seeded(N, 5, WIDTH, seed=seed), seeded(N, 3, kdim, seed=seed + 50), seeded(N, 3, vdim, seed=seed + 90))
    return x[: {"self": 1, "memory": 2, "three": 3}[way]]


def pair(way: str = "self", calls: int = 1, dtype: torch.dtype = F64, **options: Any) -> tuple[Net, Net]:
    """The same, by nn.MultiheadAttention and by four nn.Linear."""
    own = attention(dtype, **options)
    return Net(own, way, calls, need_weights=False), Net(Plain(own), way, calls)


@pytest.mark.parametrize("options", [{}, EKFAC, {"group_size": 2}], ids=["plain", "EKFAC", "groups"])
@pytest.mark.parametrize(
    ("calls", "passes", "approximation"), [(1, 1, "expand"), (2, 3, "expand"), (1, 2, "reduce"), (2, 1, "reduce")]
)
@pytest.mark.parametrize("way", ["self", "memory", "three"])
def test_it_is_four_linear_layers(way, calls, passes, approximation, options):
    batches = [inputs(way, seed=i) for i in range(passes)]
    got, want = (stepped(net, batches, approximation=approximation, **options) for net in pair(way, calls))
    assert [layer.title for layer in got._layers] == [f"attention.{side}_proj" for side in ("q", "k", "v", "out")]
    assert got.skipped_layers == {}
    assert_same_layers(got, want)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dims", [{}, {"kdim": 3}, {"kdim": 4, "vdim": 2}], ids=str)
@pytest.mark.parametrize("way", ["self", "three"])
def test_weights_of_all_shapes(way, dims, bias, batch_first):
    if way == "self" and dims:
        pytest.skip("of one width")
    nets = pair(way, bias=bias, batch_first=batch_first, **dims)
    assert_same_layers(*(stepped(net, [inputs(way, **dims), inputs(way, 3, **dims)]) for net in nets))


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("masks", ["attn_mask", "key_padding_mask", "both"])
@pytest.mark.parametrize("way", ["self", "memory"])
def test_masks_of_attention(way, masks, need_weights):
    keys = 5 if way == "self" else 3
    options = {
        "attn_mask": torch.ones(5, keys, dtype=torch.bool).triu(1),
        "key_padding_mask": torch.arange(keys)[None] >= torch.tensor([keys, keys - 1, 1, keys])[:, None],
    }
    if masks != "both":
        options = {masks: options[masks]}
    got, want = pair(way)
    got.options, want.options = {"need_weights": need_weights, **options}, options
    assert_same_layers(*(stepped(net, [inputs(way)]) for net in (got, want)))


def test_valid_positions():
    mask = torch.arange(5)[None] < torch.tensor([5, 4, 1, 3])[:, None]
    found = []
    for net in pair():
        p = kfac(net)
        p.valid(mask)
        loss_of(net(inputs("self"))).backward()
        p.step()
        found.append(p)
    assert_same_layers(*found)


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_one_sequence_without_a_batch(approximation):
    own = attention()
    p, q = kfac(own, approximation=approximation), None
    x = seeded(5, WIDTH)
    loss_of(own(x, x, x)[0][None]).backward()
    p.step()
    plain = Plain(attention())
    q = kfac(plain, approximation=approximation)
    loss_of(plain(x[None], x[None], x[None])[0]).backward()
    q.step()
    assert_same_layers(p, q)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize(("calls", "passes"), [(1, 1), (2, 1), (1, 3)])
@pytest.mark.parametrize("way", ["self", "memory"])
def test_under_checkpoints(way, calls, passes, use_reentrant):
    def through(f: Callable[..., Tensor], *x: Tensor) -> Tensor:
        return checkpoint(f, *x, use_reentrant=use_reentrant)

    batches = [tuple(x.requires_grad_() for x in inputs(way, seed=i)) for i in range(passes)]
    found = []
    for net, how in zip(pair(way, calls), (through, lambda f, *x: f(*x)), strict=True):
        p = kfac(net, accumulation_steps=passes)
        for x in batches:
            (loss_of(net(x, how)) / passes).backward()
        p.step()
        found.append(p)
    assert_same_layers(*found)


@pytest.mark.parametrize("way", ["self", "three"])
def test_under_autocast(way):
    """Rows are those that the products are of, in bfloat16: the factors of both are sums of the same products."""
    found = []
    for net in pair(way, dtype=torch.float32):
        p = kfac(net)
        with torch.autocast("cpu", torch.bfloat16):
            y = net(tuple(x.float() for x in inputs(way)))
        (0.5 * y.float().square().sum() / N).backward()
        p.step()
        found.append(factors(p))
    # A gradient has come through some five products in bfloat16 that differ by an ulp, 2^-8, and is squared.
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=10 * 2**-8 * float(b.abs().max()))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("way", ["self", "memory", "three"])
def test_outputs_and_gradients_are_the_same_bits(way, training, need_weights, autocast):
    own = attention(torch.float32)
    net = Net(own, way, need_weights=need_weights).train(training)
    x = tuple(t.float() for t in inputs(way))

    def run() -> list[Tensor]:
        net.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = net(x)
        y.float().square().sum().backward()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            with torch.no_grad():
                without = net(x)
            with torch.inference_mode():
                return [y.detach(), without, net(x), *(q.grad.clone() for q in net.parameters())]

    before = run()
    p = kfac(net)
    assert all(map(torch.equal, run(), before))
    with warnings.catch_warnings():
        warnings.simplefilter("error" if training else "ignore")
        p.step()
    assert p.fisher.seen == training  # in evaluation mode nothing is gathered
    p.remove_hooks()
    assert type(own) is nn.MultiheadAttention and "_mfac_kernels_watch" not in vars(own)
    assert all(map(torch.equal, run(), before))


def test_under_another_mode():
    """As ``torch.set_default_device`` sets."""
    with torch.device("cpu"):
        assert_same_layers(*(stepped(net, [inputs("memory")]) for net in pair("memory")))


def test_records_of_the_three_projections_hold_one_copy():
    """Of the inputs in bfloat16."""
    own, x = attention(torch.float32), inputs("self")[0].float()
    p = kfac(own)
    held: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        held.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", torch.bfloat16):
        own(x, x, x)
    values = x.bfloat16().flatten().sort().values
    copies = [t for t in held if t.shape.numel() == x.numel() and torch.equal(t.flatten().sort().values, values)]
    of_records = [t for t in copies if t.dim() == 3]  # samples first; autograd's own is flat
    assert len(of_records) == 3 and len({t.data_ptr() for t in of_records}) == 1
    assert p.fisher.skipped == 0


def test_gathering_in_evaluation_mode():
    found = []
    for net in pair():
        net.eval()
        found.append(stepped(net, [inputs("self")], gather="always"))
    assert_same_layers(*found)


@pytest.mark.parametrize("batch_first", [True, False])
def test_a_whole_encoder_layer(batch_first):
    """Of torch: its attention is one of its modules, and all its parameters are covered."""
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 8, dropout=0.0, batch_first=batch_first).double()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        p = kfac(layer, batch_dim=0 if batch_first else 1)
    kept = [q.grad for q in layer.parameters()]
    x = seeded(N, 5, WIDTH)
    for _ in range(2):
        layer.zero_grad()
        y = layer(x if batch_first else x.transpose(0, 1))
        loss_of(y if batch_first else y.transpose(0, 1)).backward()
        kept = [q.grad.clone() for q in layer.parameters()]
        p.step()
    assert not any(torch.equal(a, q.grad) for a, q in zip(kept, layer.parameters(), strict=True))
    assert p.diagnostics()["layers_without_factors"] == 0


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_copies_are_plain_and_of_their_own(how):
    own, x = attention(), inputs("self")[0]
    p = kfac(own)
    assert isinstance(own, nn.MultiheadAttention) and type(own).__name__ == "MultiheadAttention"
    other = how(own)
    assert type(other) is nn.MultiheadAttention and "_mfac_kernels_watch" not in vars(other)
    assert torch.equal(other(x, x, x)[0], own(x, x, x)[0])
    if how is not copy.copy:
        loss_of(other(x, x, x)[0]).backward()
        assert p._gatherer.idle
        q = kfac(other)
        for net in (own, other):
            net.zero_grad()
            loss_of(net(x, x, x)[0]).backward()
        p.step()
        q.step()
        assert_same_layers(p, q)


def test_a_copy_of_model_and_preconditioner_goes_on():
    net, x = Net(attention()), inputs("self")
    p = stepped(net, [x])
    other, q = copy.deepcopy((net, p))
    for n, r in ((net, p), (other, q)):
        n.zero_grad()
        loss_of(n(x)).backward()
        r.step()
    assert_same_layers(p, q)


def test_dropped_preconditioners_let_go():
    own, x = attention(), inputs("self")[0]
    p = kfac(own)
    with pytest.warns(UserWarning, match="another one is made for q_proj"):
        q = kfac(own)
    del p
    loss_of(own(x, x, x)[0]).backward()
    q.step()
    assert q.fisher.seen == 1
    del q
    assert type(own) is nn.MultiheadAttention


class Derived(nn.MultiheadAttention):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x, x, x, need_weights=False)[0]


def test_a_derived_class_that_calls_its_base():
    own = Derived(WIDTH, HEADS, batch_first=True).double()
    own.load_state_dict(attention().state_dict())
    p, q = kfac(own), kfac(plain := Plain(own))
    x = inputs("self")[0]
    loss_of(own(x=x)).backward()
    loss_of(plain(x, x, x)[0]).backward()
    p.step()
    q.step()
    assert_same_layers(p, q)


def test_another_class_given_later():
    """As torch's parametrizations do: the watch stays, and is silent once it is removed."""
    own = attention()
    p = kfac(own)
    nn.utils.parametrizations.weight_norm(own.out_proj)
    kind = type(own)
    own.__class__ = type("Other", (kind,), {})
    p.remove_hooks()
    assert type(own).__name__ == "Other"
    x = inputs("self")[0]
    assert own(x, x, x)[0].shape == x.shape


@pytest.mark.parametrize("frozen", ["in_proj_weight", "in_proj_bias", "out_proj.weight"])
def test_frozen_projections(frozen):
    net = Net(attention())
    net.get_parameter(f"attention.{frozen}").requires_grad_(False)
    context = pytest.warns(UserWarning, match="not trained") if frozen.endswith("weight") else warnings.catch_warnings()
    with context:
        p = kfac(net)
    loss_of(net(inputs("self"))).backward()
    kept = {name: q.grad for name, q in net.named_parameters()}
    p.step()
    assert kept[f"attention.{frozen}"] is None
    titles = [layer.title.removeprefix("attention.") for layer in p._layers]
    expected = {"in_proj_weight": ["out_proj"], "out_proj.weight": ["q_proj", "k_proj", "v_proj"]}
    assert titles == expected.get(frozen, ["q_proj", "k_proj", "v_proj", "out_proj"])
    assert p.fisher.seen == 1


def test_key_and_value_biases_have_no_factors():
    own = attention(add_bias_kv=True)
    with pytest.warns(UserWarning, match="attention: MultiheadAttention has no Kronecker factors of bias_k, bias_v"):
        p = kfac(net := Net(own))
    loss_of(net(inputs("self"))).backward()
    kept = own.bias_k.grad.clone()
    p.step()
    assert torch.equal(own.bias_k.grad, kept)
    assert set(p.skipped_layers) == {"attention"}


def test_include_and_skip_by_name():
    net = nn.ModuleDict({"one": attention(), "two": attention()})
    p = kfac(net, include=["one*", "two"], skip_layers=["one"])
    assert [layer.title for layer in p._layers] == ["one.out_proj", "two.q_proj", "two.k_proj", "two.v_proj"]


def test_compiled():
    def train(compiled: bool) -> mk.KFAC:
        torch._dynamo.reset()
        net = Net(attention(), need_weights=False)
        p = kfac(net)
        model = torch.compile(net, backend="eager") if compiled else net
        for seed in range(2):
            net.zero_grad()
            loss_of(model(inputs("self", seed))).backward()
            p.step()
        return p

    assert_same_layers(train(True), train(False))
    torch._dynamo.reset()


def test_errors_inside_leave_nothing_behind():
    own, x = attention(), inputs("self")[0]
    p = kfac(own)
    with pytest.raises((RuntimeError, AssertionError)):
        own(x, x[:, :, :3], x)
    loss_of(own(x, x, x)[0]).backward()
    p.step()
    assert_same(factors(p)[:1], [torch.einsum("nsi,nsj->ij", y, y)[None] / N for y in [F.pad(x, (0, 1), value=1.0)]])


def test_corrected_steps():
    results = []
    for net in pair("memory"):
        p = mk.TwoLevelKFAC(net, 1e-2, kl_clip=None, coarse_space="krylov_residual")
        loss_of(net(inputs("memory"))).backward()
        p.step()
        results.append([layer.gradient() for layer in p._layers])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
