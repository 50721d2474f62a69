"""The window passes and the m x m core against their formulas in float64 torch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import mfac_kernels as mk
from mfac_kernels import ops
from mfac_kernels.reference import window as reference

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
EPS = torch.finfo(torch.float64).eps
CHUNK = 8192  # kWindowChunk: sizes around it and its multiples are the ragged ends

dtypes = st.sampled_from(DTYPES)
rows = st.sampled_from([0, 1, 2, 3, 4, 5, 7, 8, 9, 12, 17])
dims = st.one_of(st.integers(1, 40), st.sampled_from([CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 13]))
seeds = st.integers(0, 2**31)


def random(shape: tuple[int, ...], dtype: torch.dtype, seed: int, pad: int = 0, device: str = "cpu") -> Tensor:
    """Normal entries; with pad, a view of every row of a wider buffer."""
    wide = torch.randn(*shape[:-1], shape[-1] + pad, generator=torch.Generator().manual_seed(seed))
    return wide.to(device, dtype)[..., : shape[-1]]


def assert_close(got: Tensor, want: Tensor, terms: int, scale: Tensor | float) -> None:
    """|got - want| <= 2 (terms + 2) eps scale: the bound of a sum of `terms` products in float64, in any order."""
    bound = 2 * (terms + 2) * EPS * scale + 1e-300
    assert got.shape == want.shape
    assert bool(((got.cpu().double() - want).abs() <= bound).all()), (got.cpu().double() - want).abs().max()


@given(
    m=rows, k=st.sampled_from([0, 1, 3, 4, 5, 8, 67]), d=dims, dtype=dtypes, x_dtype=dtypes, seed=seeds, data=st.data()
)
def test_dots(m, k, d, dtype, x_dtype, seed, data, instruction_set, device):
    block = data.draw(st.one_of(st.just(d), st.integers(max(1, d // 9), d + 3)))
    g = random((m, d), dtype, seed, pad=seed % 3, device=device)
    x = random((k, d), x_dtype, seed + 1, pad=seed % 2, device=device)
    got = ops.window_dots(g, x, block)
    g, x = g.cpu(), x.cpu()
    for b, start in enumerate(range(0, d, block)):
        gb, xb = g[:, start : start + block].double(), x[:, start : start + block].double()
        assert_close(got[b], xb @ gb.mT, d, xb.abs() @ gb.abs().mT)
    assert got.shape[0] == -(-d // block)


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_whole_range_of_a_type(dtype, k, instruction_set, device):
    """Denormals to the largest, each sign: every product is rounded once, and what is not finite is not lost."""
    info = torch.finfo(dtype)
    least = info.smallest_normal * info.eps
    values = torch.tensor([0.0, -0.0, least, -3 * least, info.smallest_normal, 1.5, info.max, info.min], dtype=dtype)
    g = values.to(torch.float64).clamp(-1e300, 1e300).to(dtype).diag().to(device)  # a row has one value
    x = torch.linspace(-1, 1.5, 8 * k).reshape(k, 8)
    want = x.double() * g.cpu().diagonal().double()
    assert torch.equal(ops.window_dots(g, x.to(device))[0].cpu(), want)
    coefficients = x.double().to(device)[None]
    assert torch.equal(ops.window_combine(g, coefficients, dtype=torch.float64).cpu(), want)
    for bad in (float("nan"), float("inf")):
        g[2, 3] = bad
        dots, combined = ops.window_dots(g, x.to(device))[0], ops.window_combine(g, coefficients, dtype=torch.float64)
        for got, at in ((dots, 2), (combined, 3)):
            finite = got.cpu().isfinite()
            assert not finite[:, at].any()
            assert finite[:, [i for i in range(8) if i != at]].all()


@given(
    m=rows,
    k=st.sampled_from([0, 1, 3, 4, 5, 67]),
    d=dims,
    dtype=dtypes,
    seed=seeds,
    with_x=st.booleans(),
    data=st.data(),
)
def test_combine(m, k, d, dtype, seed, with_x, data, instruction_set, device):
    block = data.draw(st.one_of(st.just(d), st.integers(max(1, d // 9), d + 3)))
    out_dtype = data.draw(dtypes)
    g = random((m, d), dtype, seed, pad=seed % 3, device=device)
    x = random((k, d), torch.float32, seed + 1, pad=1, device=device)
    c = random((-(-d // block), k, m), torch.float64, seed + 2, device=device)
    got = ops.window_combine(g, c, beta=-0.7, x=x if with_x else None, alpha=1.3, dtype=out_dtype, block_size=block)
    assert got.dtype == out_dtype and got.shape == (k, d)
    g, x, c = g.cpu(), x.cpu(), c.cpu()
    for b, start in enumerate(range(0, d, block)):
        gb, xb = g[:, start : start + block].double(), x[:, start : start + block].double() * with_x
        want = 1.3 * xb - 0.7 * (c[b] @ gb)
        scale = 1.3 * xb.abs() + 0.7 * (c[b].abs() @ gb.abs())
        # one more rounding to the output's type (by way of float32 for 16-bit ones), its smallest step included
        info = torch.finfo(out_dtype)
        rounding = 1.01 * (info.eps * want.abs() + info.tiny * info.eps)
        assert_close(got[:, start : start + block], want, m + 2, scale + rounding / (2 * (m + 4) * EPS))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_is_torch_s(dtype, instruction_set, device):
    """Every exponent, halves between neighbours, subnormals, overflow: the stored row is g.to(dtype) bit for bit."""
    exponents = torch.arange(-149, 128, dtype=torch.float64)
    mantissas = torch.tensor([1.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-9, 1 + 2**-11, 1 + 3 * 2**-11, 2 - 2**-23])
    values = (2.0 ** exponents[:, None] * mantissas).flatten()
    values = torch.cat([values, -values, torch.tensor([0.0, -0.0])]).float()
    values = values[values.to(dtype).isfinite()]
    window = torch.zeros(1, len(values), dtype=dtype, device=device)
    dots = ops.window_insert_(window, torch.zeros(2, dtype=torch.int64, device=device), values.to(device))
    assert torch.equal(window[0].cpu().view(torch.uint8), values.to(dtype).view(torch.uint8))
    assert bool(dots.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_widening_is_exact_for_every_16_bit_pattern(dtype, instruction_set, device):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)[None]
    one = torch.ones(1, 1, 1, dtype=torch.float64, device=device)
    got = ops.window_combine(every.to(device), one, dtype=torch.float64)
    finite = every.isfinite()
    assert torch.equal(got.cpu()[finite], every[finite].double())
    assert not got.cpu()[~finite].isfinite().any()  # infinities are NaN on a GPU


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e39])
def test_insert_refuses(dtype, bad, instruction_set, device):
    window = random((3, 50), dtype, 0, device=device)
    before, state = window.clone(), torch.tensor([4, 0], device=device)
    g = random((50,), torch.float64, 1, device=device)
    g[37] = bad
    overflows = bad == 1e39 and dtype == torch.float64
    dots = ops.window_insert_(window, state, g)
    assert bool(dots.isnan().all()) != overflows
    assert torch.equal(window, before) != overflows


@given(m=st.integers(1, 13), d=dims, dtype=dtypes, g_dtype=dtypes, seen=st.integers(0, 30), seed=seeds)
def test_insert(m, d, dtype, g_dtype, seen, seed, instruction_set, device):
    window = random((m, d), dtype, seed, device=device)
    window[min(seen, m) :] = 0
    g = random((d,), g_dtype, seed + 1, device=device)
    expected = window.clone()
    expected[seen % m] = g.to(dtype)
    dots = ops.window_insert_(window, torch.tensor([seen, 0], device=device), g)
    assert torch.equal(window, expected)
    w = expected.cpu().double()
    assert_close(dots, w @ w[seen % m], d, w.abs() @ w[seen % m].abs())


def empty_core(m: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Gram matrix, factor, state"""
    gram, factor = torch.zeros(2, m, m, dtype=torch.float64, device=device)
    return gram, factor, torch.zeros(2, dtype=torch.int64, device=device)


def fill(
    m: int, count: int, d: int, shift: float, per_gradient: bool, seed: int, device: str = "cpu"
) -> tuple[Tensor, ...]:
    """A core after `count` inserts of random gradients; the gradients in slot order, on the CPU, come first."""
    g = torch.zeros(m, d, dtype=torch.float64)
    gram, factor, state = empty_core(m, device)
    newest = torch.zeros(m, dtype=torch.float64, device=device)
    for t in range(count):
        row = random((d,), torch.float64, seed + t)
        g[t % m] = row
        newest = ops.core_insert_(gram, factor, state, (g @ row).to(device), shift, per_gradient)
    return g, gram, factor, state, newest


@given(
    m=st.integers(1, 40),
    rounds=st.floats(0, 2.5),
    shift=st.sampled_from([1e-3, 1.0]),
    per_gradient=st.booleans(),
    seed=seeds,
)
def test_core(m, rounds, shift, per_gradient, seed, instruction_set, device):
    count = int(rounds * m)
    g, gram, factor, state, newest = fill(m, count, 2 * m + 3, shift, per_gradient, seed, device)
    held = min(count, m)
    full_shift = shift * max(1, held) if per_gradient else shift
    k = reference.core(g, full_shift)
    assert state.tolist() == [count, 0]
    age = (torch.arange(m) - count) % m  # the newest slot has the largest
    older = (age[:, None] >= age) & (torch.arange(m) < held)
    assert_close(gram.cpu() * older, (g @ g.mT) * older, g.shape[1], g.abs() @ g.abs().mT)
    condition = float(torch.linalg.cond(k))
    inverse = torch.linalg.inv(k)
    # backward stable solves: relative error c m eps cond(K)
    tolerance = 20 * (m + 1) * EPS * condition
    if count:
        want = inverse[(count - 1) % m]
        assert float((newest.cpu() - want).norm()) <= tolerance * float(want.norm())
    b = random((3, m), torch.float64, seed)
    x = ops.core_solve(factor, state, b.to(device), shift, per_gradient).cpu()
    assert float((x - b @ inverse).norm()) <= tolerance * float((b @ inverse).norm() + 1e-300)
    again = torch.full_like(factor, float("nan"))
    ops.core_refactor_(gram, again, state, shift, per_gradient)
    y = ops.core_solve(again, state, b.to(device), shift, per_gradient).cpu()
    assert float((y - b @ inverse).norm()) <= tolerance * float((b @ inverse).norm() + 1e-300)


def core_of(g: Tensor, count: int, shift: float, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Gram matrix, factor (its inverse in the other half) and state of a full window after `count` inserts."""
    m = len(g)
    slots = torch.arange(count, count + m) % m  # by age
    lower = torch.linalg.cholesky(reference.core(g[slots], shift))
    inverse = torch.linalg.solve_triangular(lower, torch.eye(m, dtype=g.dtype), upper=False)
    factor = g.new_empty(m, m)
    factor[slots[:, None], slots] = lower.mT + inverse.tril(-1)
    return (g @ g.mT).to(device), factor.to(device), torch.tensor([count, 0], device=device)


@pytest.mark.parametrize("m", [33, 300, 1100])  # more rows than warps, than parts of a column, than threads
def test_core_of_many_gradients(m, instruction_set, device):
    count, shift = 3 * m + 7, 1.0
    g, row, b = (random(shape, torch.float64, m) for shape in ((m, 50), (50,), (2, m)))
    gram, factor, state = core_of(g, count, shift, device)
    g[count % m] = row
    newest = ops.core_insert_(gram, factor, state, (g @ row).to(device), shift, False)
    x = ops.core_solve(factor, state, b.to(device), shift, False).cpu()
    k = reference.core(g, shift)
    inverse = torch.linalg.inv(k)
    tolerance = 20 * (m + 1) * EPS * float(torch.linalg.cond(k))
    want = inverse[count % m]
    assert float((newest.cpu() - want).norm()) <= tolerance * float(want.norm())
    assert float((x - b @ inverse).norm()) <= tolerance * float((b @ inverse).norm())


@pytest.mark.parametrize("shift", [1.0, 1e-8])
@pytest.mark.parametrize("kind", ["copies", "few directions", "one direction", "scales"])
def test_core_of_dependent_gradients_drifts_no_further_than_rounding(kind, shift, instruction_set, device):
    """L L^T = K entry by entry, relative to the diagonal: a rotation and an append round each row of L to a few eps of
    its norm, a row meets at most m of them, and its rounding goes with it."""
    m, d, count = 40, 60, 160
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(3, d, dtype=torch.float64, generator=generator) * torch.tensor([[1.0], [0.1], [0.01]])
    g, (gram, factor, state) = torch.zeros(m, d, dtype=torch.float64), empty_core(m, device)
    for t in range(count):
        row = {
            "copies": base[0] if t % 2 else torch.randn(d, dtype=torch.float64, generator=generator),
            "few directions": torch.randn(3, dtype=torch.float64, generator=generator) @ base,
            "one direction": base[0] * 10.0 ** (t % 5 - 2),
            "scales": torch.randn(d, dtype=torch.float64, generator=generator) * 10.0 ** (t % 13 - 6),
        }[kind]
        g[t % m] = row
        ops.core_insert_(gram, factor, state, (g @ row).to(device), shift, False)
    slots = torch.arange(count, count + m) % m
    k, lower = reference.core(g[slots], shift), factor.cpu()[slots[:, None], slots].triu().mT
    scale = k.diagonal().sqrt()
    assert float(((lower @ lower.mT - k) / (scale[:, None] * scale)).abs().max()) <= 8 * m * EPS


def test_core_never_fails_on_dependent_gradients(instruction_set, device):
    m, d, shift = 9, 30, 1e-14  # condition 1e21: what float64 holds of K is singular
    gram, factor, state = empty_core(m, device)
    row = torch.full((d,), 1e3, dtype=torch.float64)
    for _ in range(3 * m):
        held = min(int(state[0]) + 1, m)
        dots = torch.where(torch.arange(m) < held, row @ row, torch.zeros((), dtype=torch.float64))
        newest = ops.core_insert_(gram, factor, state, dots.to(device), shift, False)
        assert bool(newest.isfinite().all()) and float(newest.abs().max()) <= 1 / shift


def test_core_refuses_non_finite_dots(device):
    _, gram, factor, state, _ = fill(5, 8, 12, 0.1, False, 0, device)
    before = [t.clone() for t in (gram, factor)]
    dots = torch.full((5,), float("nan"), dtype=torch.float64, device=device)
    assert not ops.core_insert_(gram, factor, state, dots, 0.1, False).any()
    assert torch.equal(gram, before[0]) and torch.equal(factor, before[1])
    assert state.tolist() == [8, 1]


def test_same_bits_for_any_number_of_threads(instruction_set):
    g, x = random((37, 30_011), torch.float32, 0), random((5, 30_011), torch.float32, 1)
    coefficients = random((1, 5, 37), torch.float64, 2)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3, 7, 1):
            torch.set_num_threads(n)
            window, state = g.clone(), torch.tensor([37, 0])
            results.append(
                (
                    ops.window_dots(g, x),
                    ops.window_combine(g, coefficients, x=x, alpha=2.0),
                    ops.window_insert_(window, state, x[0]),
                )
            )
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def samples(dtype: torch.dtype, device: str = "cpu") -> list[tuple[str, tuple[object, ...]]]:
    g, gram, factor, state, newest = fill(4, 6, 10, 0.1, False, 0, device)
    g = g.to(device, dtype)
    return [
        ("window_insert_", (g.clone(), state, g[0] * 2)),
        ("window_dots", (g, g[:2], 4)),
        ("window_combine", (g, newest.reshape(1, 1, 4), 10, 2.0, None, 0.0, dtype)),
        ("window_combine", (g, newest.reshape(1, 1, 4), 10, 2.0, g[:1], 0.5, torch.float32)),
        ("core_insert_", (gram, factor, state, newest, 0.1, False)),
        ("core_solve", (factor, state, newest[None], 0.1, True)),
        ("core_refactor_", (gram, factor, state, 0.1, False)),
    ]


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype, device):
    for name, arguments in samples(dtype, device):
        torch.library.opcheck(getattr(torch.ops.mfac_kernels, name).default, arguments)


def test_compiles_to_one_graph(device):
    def step(window, gram, factor, state, g):
        dots = ops.window_insert_(window, state, g)
        c = ops.core_insert_(gram, factor, state, dots, 0.1, False)
        y = ops.window_combine(window, c[None, None], beta=float(len(window)))
        w = ops.core_solve(factor, state, ops.window_dots(window, y)[0], 0.1, False)
        return ops.window_combine(window, w[None], beta=-10.0, x=y, alpha=10.0)

    g, gram, factor, state, _ = fill(4, 6, 10, 0.1, False, 0, device)
    g = g.to(device)
    plain = [t.clone() for t in (g, gram, factor, state)]
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    x = random((10,), torch.float64, 7, device=device)
    assert torch.equal(compiled(g, gram, factor, state, x), step(*plain, x))
    assert all(torch.equal(a, b) for a, b in zip((g, gram, factor, state), plain, strict=True))


G = torch.zeros(3, 5)
F = torch.zeros(3, 3, dtype=torch.float64)
STATE = torch.zeros(2, dtype=torch.int64)
C = torch.zeros(1, 2, 3, dtype=torch.float64)
BAD = [
    ("window_insert_", (G[0], STATE, G[0]), r"window: expected 2 dimensions, got shape \(5,\)"),
    ("window_insert_", (G.mT, STATE, G[:, 0]), r"window: expected contiguous rows, got stride 5"),
    ("window_insert_", (G[:0], STATE, G[0]), r"window: expected at least one row and one column"),
    ("window_insert_", (G, STATE.int(), G[0]), r"state: expected Long, got Int"),
    ("window_insert_", (G, STATE[:1], G[0]), r"state: expected shape \(2,\), got \(1,\)"),
    ("window_insert_", (G, STATE, G[0, :4]), r"g: expected shape \(5,\), got \(4,\)"),
    ("window_insert_", (G.int(), STATE, G[0]), r"window: expected float32, float64, bfloat16 or float16"),
    ("window_insert_", (G, STATE, G[0].long()), r"g: expected float32, float64, bfloat16 or float16"),
    ("window_dots", (G, G[:, :4], 5), r"x: expected 5 columns, as window has, got 4"),
    ("window_dots", (G, G, 0), r"block_size: expected at least 1, got 0"),
    ("window_combine", (G, C[0], 5, 1.0, None, 0.0, torch.float32), r"coefficients: expected 3 dimensions"),
    ("window_combine", (G, C.float(), 5, 1.0, None, 0.0, torch.float32), r"coefficients: expected Double, got Float"),
    ("window_combine", (G, C, 4, 1.0, None, 0.0, torch.float32), r"expected shape \(2, 2, 3\), got \(1, 2, 3\)"),
    ("window_combine", (G, C, 5, 1.0, G, 1.0, torch.float32), r"x: expected shape \(2, 5\), got \(3, 5\)"),
    ("core_insert_", (F, F[:2], STATE, F[0], 1.0, False), r"factor: expected shape \(2, 2\), got \(2, 3\)"),
    ("core_insert_", (F[:2, :2], F, STATE, F[0], 1.0, False), r"gram: expected shape \(3, 3\), got \(2, 2\)"),
    ("core_insert_", (F, F, STATE, F[0, :2], 1.0, False), r"dots: expected shape \(3,\), got \(2,\)"),
    ("core_insert_", (F, F, STATE, F[0], 0.0, False), r"shift: expected a positive finite number, got 0"),
    ("core_solve", (F, STATE, F[0], 1.0, False), r"b: expected 2 dimensions, got shape \(3,\)"),
    ("core_solve", (F, STATE, F, float("nan"), False), r"shift: expected a positive finite number, got nan"),
    ("core_refactor_", (F.mT[:, :2], F, STATE, 1.0, False), r"gram: expected shape \(3, 3\), got \(3, 2\)"),
]


@pytest.mark.parametrize("fake", [False, True], ids=["real", "fake"])
@pytest.mark.parametrize(("name", "arguments", "message"), BAD, ids=lambda v: v if isinstance(v, str) else "")
def test_errors_name_argument_expected_and_got(name, arguments, message, fake, device):
    place = "meta" if fake else device
    arguments = tuple(a.to(place) if isinstance(a, Tensor) else a for a in arguments)
    with pytest.raises(RuntimeError, match=f"{name}: .*{message}" if ":" in message else message):
        getattr(torch.ops.mfac_kernels, name)(*arguments)


def test_instruction_sets_are_all_there():
    assert mk.cpu_capability() in ("default", "avx2", "avx512")


def test_blocks_as_large_as_a_number_can_be(device):
    x = torch.randn(3, 5).to(device)
    largest = 2**63 - 1
    assert torch.equal(ops.window_dots(x, x, largest), ops.window_dots(x, x))
    assert torch.equal(ops.block_gram(x, largest)[0], ops.gram(x))
