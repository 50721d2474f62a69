"""Preconditioners on a GPU: the numbers of the CPU, states that cross over, steps that never wait and can be captured.

On the CPU the comparisons still run, with itself.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import mfac_kernels as mk

F64 = torch.float64
KINDS = {
    "factored": {},
    "sua, groups": {"spatial": "sua", "group_size": 4},
    "reduce": {"approximation": "reduce", "group_size": (4, None)},
    "diagonals": {"input": {"8": "diagonal", "6": "diagonal"}, "output": {"*": "diagonal"}},
    "exact": {"damping_style": "exact"},
    "eigen_correction": {"damping_style": "exact", "eigen_correction": True},
    "two-level, residual": {"coarse_space": "krylov_residual"},
    "two-level, balanced": {"coarse_space": "krylov_nicolaides", "combination": "balanced", "fisher_batch": 0.5},
    "two-level, tselepidis": {"coarse_space": "tselepidis"},
    "mini-block": {},
    "mini-block, means": {"linear": "mean"},
    "K-BFGS": {},
    "M-FAC": None,
}
pytestmark = pytest.mark.filterwarnings("ignore:(KFAC|KBFGS) leaves")
Preconditioner = mk.KFAC | mk.MiniBlockFisher | mk.KBFGS | mk.MFAC


def network(device: str, dtype: torch.dtype = F64) -> nn.Module:
    """A layer of each kind; the same weights whatever the device."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, groups=2, bias=False),
        nn.ReLU(),
        nn.Flatten(2),
        nn.Conv1d(8, 6, 3, padding=1),
        nn.Flatten(),
        nn.Linear(54, 5),
    )
    return net.to(device, dtype)


def batch(device: str, seed: int, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(6, 3, 8, 8, generator=generator, dtype=F64)
    return x.to(device, dtype), torch.randint(5, (6,), generator=generator).to(device)


def preconditioner(net: nn.Module, kind: str) -> Preconditioner:
    options = KINDS[kind]
    if options is None:
        return mk.MFAC(net.parameters(), ngrads=4, damping=1e-2, dtype=next(net.parameters()).dtype)
    method = {"mini-block": mk.MiniBlockFisher, "K-BFGS": mk.KBFGS, "two-level": mk.TwoLevelKFAC}
    return method.get(kind.split(",")[0], mk.KFAC)(net, 1e-2, kl_clip=1e-2, **options)


def finish(net: nn.Module, p: Preconditioner, x: Tensor, y: Tensor) -> None:
    """The preconditioner's step, after the backward pass."""
    if isinstance(p, mk.KBFGS):
        p.step(lambda: F.cross_entropy(net(x), y).backward())
    else:
        p.step()


def step(net: nn.Module, p: Preconditioner, x: Tensor, y: Tensor) -> list[Tensor]:
    """The preconditioned gradients, which replace those of the last step where these lie."""
    for parameter in net.parameters():
        if parameter.grad is not None:
            parameter.grad.zero_()
    F.cross_entropy(net(x), y).backward()
    finish(net, p, x, y)
    return [parameter.grad for parameter in net.parameters()]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def assert_same(got: list[Tensor], want: list[Tensor], rtol: float = 1e-7) -> None:
    largest = max(float(b.abs().max()) for b in want)  # what is nothing but rounding stays so
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.cpu(), b.cpu(), rtol=rtol, atol=rtol * largest)


def test_steps_are_those_of_the_cpu(kind, device):
    here, there = network("cpu"), network(device)
    p, q = preconditioner(here, kind), preconditioner(there, kind)
    for seed in range(6):
        assert_same(step(there, q, *batch(device, seed)), step(here, p, *batch("cpu", seed)))
    assert p.diagnostics() == pytest.approx(q.diagnostics())


def test_states_cross_over(kind, device):
    here, there = network("cpu"), network(device)
    p, q = preconditioner(here, kind), preconditioner(there, kind)
    for seed in range(3):
        step(here, p, *batch("cpu", seed))
    there.load_state_dict(here.state_dict())
    q.load_state_dict(p.state_dict())
    assert_same(step(there, q, *batch(device, 3)), step(here, p, *batch("cpu", 3)))


# Eigenvalues are torch's, which waits for them.
on_gpu = pytest.mark.parametrize(
    "kind", [kind for kind, options in KINDS.items() if "damping_style" not in (options or {})]
)


class Warm(NamedTuple):
    step: Callable[[], list[Tensor]]
    change_inputs: Callable[[int], None]  # to those of a seed, where they lie


@pytest.fixture
def warm(kind: str, device: str) -> Warm:
    """A step on a GPU, in float32, after some that have set up what is set up once."""
    if device != "cuda":
        pytest.skip("for a GPU")
    net = network(device, torch.float32)
    p = preconditioner(net, kind)
    inputs = batch(device, 0, torch.float32)
    for _ in range(5):  # fills the window of M-FAC
        step(net, p, *inputs)

    def change_inputs(seed: int) -> None:
        for held, fresh in zip(inputs, batch("cpu", seed, torch.float32), strict=True):
            held.copy_(fresh)

    return Warm(lambda: step(net, p, *inputs), change_inputs)


@on_gpu
def test_a_step_never_waits(warm):
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        warm.step()
    finally:
        torch.cuda.set_sync_debug_mode(before)


@on_gpu
def test_a_step_is_captured(warm):
    """A replay is a step: finite, and another one each time, for what it averages over, or the window, has moved on."""
    on_a_side = torch.cuda.Stream()
    on_a_side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(on_a_side):
        for _ in range(3):
            warm.step()
    torch.cuda.current_stream().wait_stream(on_a_side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gradients = warm.step()
    results = []
    for seed in (1, 2):
        warm.change_inputs(seed)
        graph.replay()
        results.append([g.clone() for g in gradients])
    for first, second in zip(*results, strict=True):
        assert bool(second.isfinite().all())
        assert not torch.equal(first, second)


class NothingIsRead(TorchDispatchMode):
    """Raises where a value of a tensor is asked for, or one is made from numbers: on a GPU both wait for it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "equal", "nonzero", "masked_select", "lift_fresh"), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", [kind for kind, options in KINDS.items() if options is not None])
def test_a_step_reads_nothing_back(kind):
    """On the CPU: what a GPU would have to wait for. Without an inversion, which on the CPU does look at its codes."""
    net = network("cpu")
    p = preconditioner(net, kind)
    p.inv_update_steps = 100
    for seed in range(3):
        net.zero_grad()
        x, y = batch("cpu", seed)
        F.cross_entropy(net(x), y).backward()
        with NothingIsRead() if seed else nullcontext():
            finish(net, p, x, y)


def test_gradients_that_share_memory(kind, device):
    """Those of a sum: every element of a parameter's gradient is one number."""
    results = []
    for shares in (False, True):
        net = network(device)
        p = preconditioner(net, kind)
        step(net, p, *batch(device, 0))
        for parameter in net.parameters():
            one = torch.ones((), dtype=F64, device=device).expand(parameter.shape)
            parameter.grad = one if shares else one.contiguous()
        finish(net, p, *batch(device, 0))
        results.append([parameter.grad for parameter in net.parameters()])
    assert_same(*results, rtol=0)


class Modules(nn.Module):
    """An embedding and a head of one weight, attention, a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 4, padding_idx=0), nn.Linear(4, 7)
        self.head.weight = self.embed.weight
        self.attention, self.up = nn.MultiheadAttention(4, 2, batch_first=True), nn.ConvTranspose1d(4, 4, 2, stride=2)

    def forward(self, tokens: Tensor) -> Tensor:
        y = self.embed(tokens)
        y = self.attention(y, y, y, need_weights=False)[0]
        return self.head(self.up(y.mT).mT).mean(1)


MODULES = {kind: KINDS[kind] for kind in ("factored", "reduce", "eigen_correction", "two-level, residual")}


def modules(device: str) -> nn.Module:
    torch.manual_seed(0)
    return Modules().to(device, F64)


def token_batch(device: str, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randint(7, shape, generator=generator) for shape in ((6, 5), (6,)))
    return x.to(device), y.to(device)


@pytest.mark.parametrize("kind", MODULES)
def test_steps_of_other_modules_are_those_of_the_cpu(kind, device):
    here, there = modules("cpu"), modules(device)
    p, q = preconditioner(here, kind), preconditioner(there, kind)
    for seed in range(4):
        assert_same(step(there, q, *token_batch(device, seed)), step(here, p, *token_batch("cpu", seed)))


@pytest.mark.parametrize("kind", MODULES)
def test_gathering_from_other_modules_reads_nothing_back(kind):
    """In passes and steps; torch's own embedding and loss look at their indices on the CPU, in the forward pass."""
    net = modules("cpu")
    p = preconditioner(net, kind)
    p.inv_update_steps = 100
    for seed in range(3):
        net.zero_grad()
        x, y = token_batch("cpu", seed)
        loss = F.cross_entropy(net(x), y)
        with NothingIsRead() if seed else nullcontext():
            loss.backward()
            p.step()
