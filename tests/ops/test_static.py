"""The ops on a fixed set of gradients against their formulas in float64 torch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import mfac_kernels as mk
from mfac_kernels import ops
from mfac_kernels.reference import static as reference
from mfac_kernels.reference import window as dense

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
EPS = {dtype: torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps for dtype in DTYPES}
SIMT = mk.build_info()["simt"]  # interpreted: smaller sizes, every path
STAGED = 768  # float32 columns that the Gram kernel takes at a time; half of it in float64

dtypes = st.sampled_from(DTYPES)
rows = st.one_of(st.integers(0, 20), st.sampled_from([31, 32, 33, 64, 70]))
columns = st.one_of(
    st.integers(0, 70), st.sampled_from([127, 128, 129, STAGED - 1, STAGED, STAGED + 1, 2 * STAGED + 13])
)
seeds = st.integers(0, 2**31)


def random(shape: tuple[int, int], dtype: torch.dtype, seed: int, device: str = "cpu") -> Tensor:
    """Normal entries; often a view of the middle of a wider tensor."""
    left, right = seed % 3, seed % 5
    wide = torch.randn(shape[0], left + shape[1] + right, generator=torch.Generator().manual_seed(seed))
    return wide.to(device, dtype)[:, left : left + shape[1]]


def assert_within(got: Tensor, want: Tensor, bound: Tensor | float) -> None:
    assert got.shape == want.shape
    error = (got.cpu().double() - want).abs()
    assert bool((error <= bound).all()), f"{error.max():g} where {bound} is allowed"


def gram_bound(g: Tensor, double_precision: bool) -> Tensor:
    """A sum of products in working precision is at most 128 columns long, folded over lanes; sums of those in float64:
    c terms eps |G| |G|^T with c = 1 (each rounding is eps / 2)."""
    double = double_precision or g.dtype == torch.float64
    eps = EPS[torch.float64 if double else g.dtype]
    terms = 2 * g.shape[1] if double else min(g.shape[1], 128) + 8
    return eps * (terms + 4) * (g.double().abs() @ g.double().abs().mT)


def assert_gram(g: Tensor, double_precision: bool) -> None:
    got, g = ops.gram(g, double_precision=double_precision), g.cpu()
    assert got.dtype == torch.float64
    assert torch.equal(got, got.mT)
    assert_within(got, reference.gram(g), gram_bound(g, double_precision))


@given(m=rows, d=columns, dtype=dtypes, double_precision=st.booleans(), seed=seeds)
def test_gram(m, d, dtype, double_precision, seed, device, instruction_set):
    assert_gram(random((m, d), dtype, seed, device), double_precision)


# Several row blocks; several segments of columns; both.
@pytest.mark.parametrize("double_precision", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("m", "d"), [(129, 5), (140, 4_100), (64, 2_049)] if SIMT else [(257, 5), (530, 40), (3, 20_001), (260, 8_200)]
)
def test_gram_in_parts(m, d, dtype, double_precision, device, instruction_set):
    assert_gram(random((m, d), dtype, 1, device), double_precision)


@pytest.mark.parametrize(("double_precision", "tolerance"), [(False, 2e-8), (True, 200_000 * 2.0**-53)])
def test_gram_is_accurate(double_precision, tolerance, device, instruction_set):
    g = random((4 if SIMT else 16, 200_000), torch.float32, 0, device) + 0.1
    want = reference.gram(g.cpu())
    got = ops.gram(g, double_precision=double_precision).cpu()
    assert float((got - want).norm() / want.norm()) <= tolerance


@given(
    m=st.integers(0, 12),
    d=st.integers(0, 200),
    block=st.integers(1, 90),
    dtype=dtypes,
    double_precision=st.booleans(),
    seed=seeds,
)
def test_block_gram(m, d, block, dtype, double_precision, seed, device, instruction_set):
    g = random((m, d), dtype, seed, device)
    got = ops.block_gram(g, block, double_precision=double_precision)
    assert torch.equal(got, got.mT)
    if d:
        whole = ops.gram(g, double_precision=double_precision)
        assert torch.equal(ops.block_gram(g, d, double_precision=double_precision), whole[None])
    g = g.cpu()
    assert_within(got, reference.block_gram(g, block), gram_bound(g, double_precision))


def test_rows_far_apart(device):
    """Offsets beyond 2^31; the memory between the rows is never touched."""
    far = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=device).as_strided((2, 50), (2**31 + 5, 1))
    far.copy_(random((2, 50), torch.bfloat16, 0))
    near = far.contiguous()
    assert torch.equal(ops.gram(far), ops.gram(near))
    transform = reference.inverse_transform(near.cpu(), 1.0).to(device)
    assert torch.equal(ops.inverse_diagonal(far, transform, 1.0), ops.inverse_diagonal(near, transform, 1.0))
    assert torch.equal(ops.block_inverse(far, 20, 1.0, 2.0)[0], ops.block_inverse(near, 20, 1.0, 2.0)[0])


def diagonal_bound(g: Tensor, transform: Tensor, damping: float) -> Tensor:
    """y = T G: dot products of m terms, T rounded once; then y^2, 32 of them summed in working precision."""
    eps, y = EPS[g.dtype], (transform @ g.double()).abs()
    error = (len(g) + 2) * eps * (transform.abs() @ g.double().abs())
    bound: Tensor = ((2 * y * error + error**2 + 34 * eps * y**2).sum(0) + 4 * eps) / damping
    return bound


@given(m=rows, d=columns, damping=st.sampled_from([1e-2, 1.0, 30.0]), dtype=dtypes, seed=seeds)
def test_inverse_diagonal(m, d, damping, dtype, seed, device, instruction_set):
    g = random((m, d), dtype, seed)
    transform = reference.inverse_transform(g, damping)
    upper = torch.full((m, m), float("nan")).triu(1)  # which is not read
    got = ops.inverse_diagonal(random((m, d), dtype, seed, device), (transform + upper).to(device), damping)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    want = reference.inverse_diagonal(g, transform, damping)
    assert_within(got, want, diagonal_bound(g, transform, damping))


@pytest.mark.parametrize("dtype", DTYPES)
def test_inverse_diagonal_in_parts(dtype, device, instruction_set):
    """Several tiles of the transform's rows, of the columns, and the last ones ragged."""
    m, d, damping = 270, 150, 1.0
    g = random((m, d), dtype, 7)
    transform = reference.inverse_transform(g, damping)
    got = ops.inverse_diagonal(random((m, d), dtype, 7, device), transform.to(device), damping)
    assert_within(got, reference.inverse_diagonal(g, transform, damping), diagonal_bound(g, transform, damping))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("m", "d"), [(20, 30), (30, 20)])
def test_all_forms_agree(m, d, dtype, gradients, device, instruction_set):
    """Dense, recursion, transform and block inverse of the same Fisher matrix."""
    g = gradients(m, d, dtype=dtype)
    damping = 0.1
    inverse = torch.linalg.inv(dense.fisher(g, damping, m))
    v, q = reference.recursion(g, damping)
    torch.testing.assert_close(reference.recursion_elements(v, q, damping), inverse, rtol=1e-10, atol=1e-10)
    x = torch.arange(d, dtype=torch.float64)
    torch.testing.assert_close(reference.recursion_ihvp(v, q, damping, x), inverse @ x, rtol=1e-10, atol=1e-10)
    on_device = g.to(device)
    lower = torch.linalg.cholesky(ops.gram(on_device).cpu() / damping + m * torch.eye(m))
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(lower.diagonal() ** 2, q, rtol=tolerance, atol=0)
    got = ops.inverse_diagonal(on_device, reference.inverse_transform(g, damping).to(device), damping)
    torch.testing.assert_close(got.cpu().double(), inverse.diagonal(), rtol=10 * tolerance, atol=0)
    got, info = ops.block_inverse(on_device, d, damping, m)
    assert not info.any()
    torch.testing.assert_close(got[0].cpu().double(), inverse, rtol=10 * tolerance, atol=10 * tolerance)
    for (vb, qb), want in zip(
        reference.block_recursion(g, 7, damping), reference.block_inverse(g, 7, damping, m), strict=True
    ):
        torch.testing.assert_close(reference.recursion_elements(vb, qb, damping), want, rtol=1e-10, atol=1e-10)


def assert_blocks(g: Tensor, block: int, damping: float, count: float) -> None:
    """Relative error c (b + m) eps cond(F_b) with c = 2: m eps from the product, b eps from the factor, times cond."""
    got, info = ops.block_inverse(g, block, damping, count)
    want = reference.block_inverse(g.cpu(), block, damping, count)
    assert got.shape == (len(want), block, block) and info.tolist() == [0] * len(want)
    assert got.dtype == (torch.float64 if g.dtype == torch.float64 else torch.float32)
    assert torch.equal(got, got.mT)
    for x, exact in zip(got.cpu().double(), want, strict=True):
        n = len(exact)
        bound = 2 * (n + len(g)) * EPS[g.dtype] * float(torch.linalg.cond(exact))
        assert float((x[:n, :n] - exact).norm()) <= bound * float(exact.norm())
        assert not x[n:].any()


@given(
    m=rows,
    d=st.integers(0, 150),
    block=st.integers(1, 100),
    damping=st.sampled_from([0.05, 1.0]),
    dtype=dtypes,
    seed=seeds,
)
def test_block_inverse(m, d, block, damping, dtype, seed, device, instruction_set):
    assert_blocks(random((m, d), dtype, seed, device), block, damping, max(1, m))


# One to many tiles and steps, more rows than are packed at a time, many small blocks.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("m", "d", "block"),
    [(40, 300, 100), (60, 128, 128), (9, 400, 1), (20, 200, 11), (2, 400, 40)]
    if SIMT
    else [(40, 1030, 257), (700, 600, 530), (300, 128, 128), (9, 1300, 1), (20, 700, 11), (2, 4100, 40)],
)
def test_block_inverse_sizes(m, d, block, dtype, device, instruction_set):
    assert_blocks(random((m, d), dtype, 3, device), block, 0.5, m)


@pytest.mark.parametrize("n", [48, 100] if SIMT else [48, 160, 400])
def test_block_inverse_is_stable(n, gradients, device, instruction_set):
    """As accurate as LAPACK's Cholesky inverse on the same ill-conditioned blocks, cond about 1e5."""
    g = gradients(2 * n, n, rho=0.9, norm=30.0, dtype=torch.float32)
    damping = 1e-3
    exact = reference.block_inverse(g, n, damping, 2 * n)[0]
    got, info = ops.block_inverse(g.to(device), n, damping, 2 * n)
    shifted = (g.mT @ g / (2 * n)) + damping * torch.eye(n)
    lapack = torch.cholesky_inverse(torch.linalg.cholesky(shifted))
    assert not info.any()
    assert float((got[0].cpu() - exact).norm()) <= 3 * float((lapack - exact).norm())


@pytest.mark.parametrize("n", [1, 5, 33] if SIMT else [1, 5, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_failed_blocks(n, dtype, device, instruction_set):
    """Blocks that fail, each between good ones: every order of the leading minor, and what is not finite."""
    failing = list(range(n))
    good = torch.eye(n, dtype=dtype) * 2
    parts = []
    for k in failing:  # diag(4, ..., 4, 0, 4, ...) - I
        bad = good.clone()
        bad[k] = 0
        parts += [good, bad]
    g = torch.cat([*parts, good], 1).to(device)
    got, info = ops.block_inverse(g, n, -1.0, 1.0)
    assert info.tolist() == [code for k in failing for code in (0, k + 1)] + [0]
    assert bool(got[1::2].isnan().all())
    torch.testing.assert_close(got[::2].cpu(), (torch.eye(n, dtype=dtype) / 3).expand(n + 1, n, n))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("n", [1, 7, 70])
def test_non_finite_blocks(n, value, device, instruction_set):
    g = random((10, 5 * n), torch.float32, 0, device).clone()
    clean, _ = ops.block_inverse(g, n, 1.0, 10.0)
    g[3, n + n // 2], g[9, 4 * n - 1] = value, value
    got, info = ops.block_inverse(g, n, 1.0, 10.0)
    assert info.tolist() == [0, -1, 0, -1, 0]
    assert bool(got[[1, 3]].isnan().all())
    assert torch.equal(got[[0, 2, 4]], clean[[0, 2, 4]])
    assert ops.block_inverse(g, n, float("nan"), 10.0)[1].tolist() == [-1] * 5


def test_a_result_that_no_memory_holds(device):
    with pytest.raises(RuntimeError, match="not enough memory for the result"):
        ops.block_inverse(torch.ones(1, 1, device=device), 1 << 31, 1.0, 1.0)


def test_overflow_is_not_finite(device, instruction_set):
    g = torch.full((2, 6), 3e19, device=device)
    assert ops.block_inverse(g, 3, 1.0, 1.0)[1].tolist() == [-1, -1]
    assert ops.block_inverse(g.double(), 3, 1e35, 1.0)[1].tolist() == [0, 0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_any_number_of_threads(dtype, same_bits, device, instruction_set):
    g = random((70, 2_500) if SIMT else (270, 9_000), dtype, 0, device)
    few = g[:30]
    transform = reference.inverse_transform(few.cpu(), 1.0).to(device)

    def results() -> list[Tensor]:
        return [
            ops.gram(g),
            ops.gram(g, double_precision=True),
            ops.block_gram(few, 700),
            ops.inverse_diagonal(few, transform, 1.0),
            *ops.block_inverse(few, 65, 1.0, 30.0),
        ]

    same_bits(results)


def samples(dtype: torch.dtype, device: str) -> list[tuple[str, tuple[object, ...]]]:
    g = random((6, 20), dtype, 4, device)
    transform = reference.inverse_transform(g.cpu(), 0.1).to(device)
    return [
        ("gram", (g, False)),
        ("gram", (g[:, :0], True)),
        ("block_gram", (g, 7, True)),
        ("inverse_diagonal", (g, transform, 0.1)),
        ("block_inverse", (g, 7, 0.1, 6.0)),
        ("block_inverse", (g[:, :0], 7, 0.1, 6.0)),
    ]


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype, device):
    for name, arguments in samples(dtype, device):
        torch.library.opcheck(getattr(torch.ops.mfac_kernels, name).default, arguments)


def test_compiles_to_one_graph(device):
    def diagonals(g: Tensor, transform: Tensor) -> tuple[Tensor, ...]:
        inverse, info = ops.block_inverse(g, 8, 0.1, 6.0)
        return ops.inverse_diagonal(g, transform, 0.1), inverse.diagonal(dim1=1, dim2=2), info, ops.gram(g)

    g = random((6, 20), torch.float32, 0, device).contiguous()
    transform = reference.inverse_transform(g.cpu(), 0.1).to(device)
    compiled = torch.compile(diagonals, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(g, transform), diagonals(g, transform), strict=True):
        assert torch.equal(got, want)


G = torch.zeros(3, 5)
T = torch.zeros(3, 3, dtype=torch.float64)
FLOATS = "expected float32, float64, bfloat16 or float16, got"
BAD = [
    ("gram", (G[0], False), r"g: expected 2 dimensions, got shape \(5,\)"),
    ("gram", (G.mT, False), r"g: expected contiguous rows, got stride 5"),
    ("gram", (G.int(), False), rf"g: {FLOATS} Int"),
    ("block_gram", (G, 0, False), r"block_size: expected at least 1, got 0"),
    ("block_gram", (G[None], 1, False), r"g: expected 2 dimensions, got shape \(1, 3, 5\)"),
    ("inverse_diagonal", (G, T[:2], 1.0), r"transform: expected shape \(3, 3\), got \(2, 3\)"),
    ("inverse_diagonal", (G, T.float(), 1.0), r"transform: expected Double, got Float"),
    ("inverse_diagonal", (G, T.mT[:, [0, 1, 2]].mT, 1.0), r"transform: expected a contiguous tensor"),
    ("inverse_diagonal", (G, T, 0.0), r"damping: expected a positive finite number, got 0"),
    ("inverse_diagonal", (G, T, float("inf")), r"damping: expected a positive finite number, got inf"),
    ("block_inverse", (G.long(), 2, 1.0, 1.0), rf"g: {FLOATS} Long"),
    ("block_inverse", (G, -3, 1.0, 1.0), r"block_size: expected at least 1, got -3"),
    ("block_inverse", (G, 2, 1.0, 0.0), r"count: expected a positive finite number, got 0"),
    ("block_inverse", (G, 2, 1.0, float("nan")), r"count: expected a positive finite number, got nan"),
]


@pytest.mark.parametrize("fake", [False, True], ids=["real", "fake"])
@pytest.mark.parametrize(("name", "arguments", "message"), BAD, ids=lambda v: v if isinstance(v, str) else "")
def test_errors_name_argument_expected_and_got(name, arguments, message, fake):
    if fake:
        arguments = tuple(a.to("meta") if isinstance(a, Tensor) else a for a in arguments)
    with pytest.raises(RuntimeError, match=f"{name}: {message}"):
        getattr(torch.ops.mfac_kernels, name)(*arguments)
