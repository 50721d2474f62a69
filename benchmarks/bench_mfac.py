"""M-FAC against plain torch: the window step, its m x m core, products with vectors, the static kernels, an op call.

Each result is verified before it is timed. Floors: a window step reads the window twice; a Gram matrix is half of a
matrix product's flops. With `--device cuda` all but the op call; kernels that CUDA lacks are skipped.
"""

from __future__ import annotations

import op_samples
import pytest
import torch
from ceilings import Bound
from torch import Tensor

import mfac_kernels as mk
from mfac_kernels import ops

DAMPING = 1e-5
STEPS = [(256, 1_000_000), (512, 269_722), (1024, 269_722), (1024, 4_000_000)]  # (m, d); 269,722 is ResNet-20


def normal(*shape: int, device: str, seed: int = 0) -> Tensor:
    return torch.randn(*shape, device=device, generator=torch.Generator(device).manual_seed(seed))


def fits(m: int, d: int, device: str) -> None:
    """Windows of more than 2 GB are for GPUs."""
    if device == "cpu" and m * d > 500_000_000:
        pytest.skip("too large for a CPU")


def needs(op: str, device: str) -> None:
    if not op_samples.has_kernel(op, device):
        pytest.skip(f"{op} has no kernel on {device}")


def gram64(g: Tensor) -> Tensor:
    """G G^T in float64, exact enough for any check"""
    if op_samples.has_kernel("gram", g.device.type):
        return ops.gram(g)
    return sum(
        (part.double() @ part.double().mT for part in g.split(100_000, 1)), start=torch.zeros((), device=g.device)
    )


class TorchWindow:
    """The same in plain torch: float32 passes over the window, the float64 core factored anew at each step."""

    def __init__(self, grads: Tensor) -> None:
        self.window, self.m, self.slot = grads.clone(), len(grads), 0
        self.core = gram64(grads)
        self.core.diagonal().add_(self.m * DAMPING)

    def factor(self) -> Tensor:
        return torch.linalg.cholesky(self.core)

    def insert(self, g: Tensor) -> Tensor:
        self.window[self.slot] = g
        row = torch.mv(self.window, g).double()
        self.core[self.slot] = row
        self.core[:, self.slot] = row
        self.core[self.slot, self.slot] += self.m * DAMPING
        self.slot = (self.slot + 1) % self.m
        return row

    def update_ihvp(self, g: Tensor) -> Tensor:
        """Insert, then the product: three passes."""
        self.insert(g)
        return self.ihvp(g[None])[0]

    def fused_update_ihvp(self, g: Tensor) -> Tensor:
        """The row of S serves the product too: two passes."""
        weights = torch.cholesky_solve(self.insert(g)[:, None], self.factor())[:, 0]
        return (g - torch.mv(self.window.mT, weights.float())) / DAMPING

    def ihvp(self, x: Tensor) -> Tensor:
        if len(x) == 1:
            weights = torch.cholesky_solve(torch.mv(self.window, x[0]).double()[:, None], self.factor())[:, 0]
            return ((x[0] - torch.mv(self.window.mT, weights.float())) / DAMPING)[None]
        weights = torch.cholesky_solve(torch.mm(self.window, x.mT).double(), self.factor())
        return (x - torch.mm(weights.float().mT, self.window)) / DAMPING


def full_window(grads: Tensor, dtype: torch.dtype) -> mk.FisherWindow:
    """A window that holds the rows of grads, without the time of inserting them."""
    w = mk.FisherWindow(grads.shape[1], len(grads), DAMPING, dtype=dtype, device=grads.device)
    state = w.state_dict() | {"window": grads.to(dtype), "state": torch.tensor([len(grads), 0])}
    state["gram"] = gram64(state["window"])
    w.load_state_dict(state)
    w.damping = 2 * DAMPING  # assigning damping factors the core
    w.damping = DAMPING
    return w


def assert_same(got: Tensor, want: Tensor, tolerance: float) -> None:
    error = float((got - want).norm() / want.norm())
    assert error <= tolerance, error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("m", "d"), STEPS)
def test_window_step(race, device, m, d, dtype):
    fits(m, d, device)
    grads = normal(m, d, device=device)
    plain, ours = TorchWindow(grads), full_window(grads, dtype)
    g = normal(d, device=device, seed=1)
    # The textbook form cancels in float32, so what is timed here is verified by the row form, n G^T K^-1 e.
    got, unit = ours.update_ihvp(g), torch.zeros(m, dtype=torch.float64, device=device)
    unit[0] = 1
    core = gram64(ours.window) + m * DAMPING * torch.eye(m, dtype=torch.float64, device=device)
    weights = m * torch.linalg.solve(core, unit)
    assert_same(got, torch.mv(ours.window.mT.float(), weights.float()), 1e-4)
    gate = 1.4 if dtype == torch.float32 else 2.3
    race(
        "window step (insert and its IHVP)",
        f"m={m} d={d} {str(dtype)[6:]}",
        lambda: ours.update_ihvp(g),
        {"torch float32": lambda: plain.update_ihvp(g), "fused by hand": lambda: plain.fused_update_ihvp(g)},
        gates={"torch float32": gate},
        bound=Bound(read=2 * m * d * ours.window.element_size()),
    )


@pytest.mark.parametrize("m", [256, 512, 1024, 2048])
def test_core(race, device, m):
    rows = normal(3 * m, 2 * m, device=device).double()
    dots = rows @ rows.mT
    gram, factor = torch.zeros(2, m, m, dtype=torch.float64, device=device)
    state, shift = torch.zeros(2, dtype=torch.int64, device=device), m * DAMPING
    # The stream of gradients repeats after 3 m: by_slot[t, s] is what the t-th meets in slot s.
    times = torch.arange(3 * m, device=device)[:, None]
    held_at = times - (times - torch.arange(m, device=device)) % m
    by_slot = dots[times, held_at % (3 * m)]
    step = 0

    def insert() -> Tensor:
        nonlocal step
        step += 1
        return ops.core_insert_(gram, factor, state, by_slot[(step - 1) % (3 * m)], shift, False)

    for _ in range(m + m // 2):
        newest = insert()
    slots = torch.arange(step - m, step, device=device)
    held = torch.empty_like(rows[:m])
    held[slots % m] = rows[slots % (3 * m)]
    shifted = held @ held.mT + shift * torch.eye(m, device=device)
    unit = torch.zeros(m, 1, dtype=torch.float64, device=device)
    unit[(step - 1) % m] = 1

    def refactor() -> Tensor:
        return torch.cholesky_solve(unit, torch.linalg.cholesky(shifted))

    assert_same(newest, refactor()[:, 0], 1e-9)
    race(
        "m x m core (replace one gradient, K^-1 e)",
        f"m={m}",
        insert,
        {"float64 refactorisation": refactor},
        gates={"float64 refactorisation": 60.0} if m == 1024 else {},
        bound=Bound(read=12 * m * m),
    )


@pytest.mark.parametrize("k", [1, 4, 16])
@pytest.mark.parametrize(("m", "d"), STEPS)
def test_ihvp(race, device, m, d, k):
    fits(m, d, device)
    grads = normal(m, d, device=device)
    plain, ours = TorchWindow(grads), full_window(grads, torch.float32)
    x = normal(k, d, device=device, seed=1)
    assert_same(ours.ihvp(x), plain.ihvp(x), 2e-2)
    lower = plain.factor()
    plain.factor = lambda: lower  # type: ignore[method-assign]  # products alone
    race(
        "IHVP of vectors",
        f"m={m} d={d} k={k}",
        lambda: ours.ihvp(x),
        {"torch.mm": lambda: plain.ihvp(x)},
        gates={"torch.mm": 2.5} if k == 4 else {},
        bound=Bound(4 * m * d * k, read=8 * m * d),
    )


def test_one_call(race):
    g, x = torch.randn(2, 8), torch.randn(1, 8)
    assert_same(ops.window_dots(g, x)[0], (x @ g.mT).double(), 1e-6)
    race(
        "one op call",
        "2 x 8",
        lambda: ops.window_dots(g, x),
        {"torch.mm": lambda: torch.mm(x, g.mT)},
        calls=1000,
    )


@pytest.mark.parametrize(("m", "d"), [(32, 400_000), (64, 400_000), (256, 100_000), (512, 100_000), (1024, 50_000)])
def test_gram(race, device, m, d):
    needs("gram", device)
    g = normal(m, d, device=device)
    want = g @ g.mT
    assert_same(ops.gram(g), want.double(), 1e-5)  # torch's own float32 sums: sqrt(d) eps
    race(
        "Gram matrix G G^T",
        f"m={m} d={d}",
        lambda: ops.gram(g),
        {"torch.mm": lambda: torch.mm(g, g.mT)},
        gates={"torch.mm": 2.0 if m <= 64 else 3.2},
        bound=Bound(m * (m + 1) * d),
    )


def recursion(g: Tensor, n: int, damping: float) -> tuple[Tensor, Tensor]:
    """The paper's v_i and q_i, one gradient after another, for blocks g (blocks, m, b) at once."""
    v, q = torch.empty_like(g), g.new_empty(g.shape[:2])
    for i in range(g.shape[1]):
        row = g[:, i]
        weights = (v[:, :i] @ row[:, :, None])[:, :, 0] / q[:, :i]
        v[:, i] = row / damping - (weights[:, None] @ v[:, :i])[:, 0]
        q[:, i] = n + (row * v[:, i]).sum(1)
    return v, q


@pytest.mark.parametrize(("m", "d"), [(64, 400_000), (256, 100_000), (512, 50_000)])
def test_static_diagonal(race, device, m, d):
    needs("inverse_diagonal", device)
    damping = 1e-3
    g = normal(m, d, device=device)
    core = gram64(g)
    core.diagonal().add_(m * damping)

    def ours() -> Tensor:
        lower = torch.linalg.cholesky(core)
        transform = torch.linalg.solve_triangular(lower, torch.eye(m, dtype=torch.float64, device=device), upper=False)
        return ops.inverse_diagonal(g, transform.contiguous(), damping)

    def solve() -> Tensor:
        lower = torch.linalg.cholesky(core).float()
        return (1 - torch.linalg.solve_triangular(lower, g, upper=False).square().sum(0)) / damping

    def by_recursion() -> Tensor:
        v, q = recursion(g[None], m, damping)
        return 1 / damping - (v[0].square() / q[0, :, None]).sum(0)

    want = solve()
    assert_same(ours(), want, 1e-3)
    assert_same(by_recursion(), want, 1e-1)  # float32: the recursion cancels
    race(
        "static diagonal",
        f"m={m} d={d}",
        ours,
        {"Cholesky + trsm": solve, "recursion": by_recursion},
        gates={"Cholesky + trsm": 6.0, "recursion": 19.0},
        bound=Bound(m * (m + 1) * d),
    )


@pytest.mark.parametrize(
    ("m", "b", "d"), [(64, 32, 131_072), (128, 64, 65_536), (256, 128, 65_536), (512, 256, 32_768)]
)
def test_block_fisher(race, device, m, b, d):
    needs("block_inverse", device)
    damping = 1e-3
    g = normal(m, d, device=device)

    def plain() -> Tensor:
        blocks = g.view(m, d // b, b).transpose(0, 1)
        fisher = torch.bmm(blocks.mT, blocks) / m
        fisher.diagonal(dim1=1, dim2=2).add_(damping)
        return torch.cholesky_inverse(torch.linalg.cholesky(fisher))

    def by_recursion() -> Tensor:
        v, q = recursion(g.view(m, d // b, b).transpose(0, 1), m, damping)
        inverse = -torch.bmm(v.mT, v / q[:, :, None])
        inverse.diagonal(dim1=1, dim2=2).add_(1 / damping)
        return inverse

    want = plain()
    assert_same(ops.block_inverse(g, b, damping, float(m))[0], want, 1e-3)
    assert_same(by_recursion(), want, 1e-1)
    race(
        "block Fisher, b <= m",
        f"m={m} b={b} d={d}",
        lambda: ops.block_inverse(g, b, damping, float(m)),
        {"bmm + Cholesky": plain, "recursion": by_recursion},
        gates={"bmm + Cholesky": 6.0, "recursion": 90.0},
        bound=Bound(d * (m * (b + 1) + b * b)),
    )
