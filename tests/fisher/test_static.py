"""StaticFisher: storage types, pages, layouts, and gradients that are nearly dependent."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor

import mfac_kernels as mk
from mfac_kernels.reference import window as reference

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
NARROW = [torch.float32, torch.bfloat16, torch.float16]
BLOCKS = [None, 40, 13, 5]  # one block, wide ones, narrow ones


def masked_fisher(grads: Tensor, damping: float, n: int, block_size: int | None) -> Tensor:
    fisher = reference.fisher(grads, damping, n)
    block = torch.arange(len(fisher)) // (block_size or len(fisher))
    return fisher * (block[:, None] == block)


def error(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want|, Frobenius."""
    return float((got.cpu().double() - want.cpu().double()).norm() / want.cpu().double().norm())


def everything(static: mk.StaticFisher, x: Tensor) -> list[Tensor]:
    """Every query there is."""
    index = torch.tensor([0, 3, 12, 13, 39, 40, static.dim - 1], device=x.device)
    return [
        static.ihvp(x),
        static.ihvp(x[0]),
        static.diagonal(),
        static.submatrix(index),
        static.elements(index, index.flip(0)),
        static.element(2, 3),
    ]


@pytest.mark.parametrize("block_size", BLOCKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_storage_type(dtype, block_size, gradients, device):
    """Against the dense inverse of the gradients as stored."""
    m, d, damping = 11, 67, 0.1
    g = gradients(m, d, norm=3.0).to(dtype)
    fisher = masked_fisher(g, damping, m, block_size)
    condition = float(torch.linalg.cond(fisher))
    assert condition < 500
    # One rounding of float32 sums, times the condition of F; blocks are inverted in float32: b eps cond.
    eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    tolerance = 2 * eps * condition * (block_size if block_size and block_size <= m else 1)
    dense = torch.linalg.inv(fisher)
    static = mk.StaticFisher(g.to(device), damping, block_size=block_size)
    x = gradients(3, d, seed=1).to(device)
    got = static.ihvp(x)
    assert got.dtype == torch.float64 and error(got, x.cpu() @ dense) <= tolerance
    for x_dtype in DTYPES:
        narrow = x.to(x_dtype)
        got = static.ihvp(narrow)
        assert got.dtype == x_dtype
        rounding = torch.finfo(x_dtype).eps
        assert error(got, narrow.cpu().double() @ dense) <= tolerance + rounding
    diagonal = static.diagonal()
    assert diagonal.dtype == torch.promote_types(dtype, torch.float32)
    assert error(diagonal, dense.diagonal()) <= tolerance
    every = torch.arange(d, device=device)
    assert static.submatrix(every).dtype == torch.float64
    assert error(static.submatrix(every), dense) <= tolerance
    pair = torch.stack([static.element(4, 4), static.element(-67, 1)])
    assert pair.dtype == torch.float64 and error(pair, dense[[4, 0], [4, 1]]) <= tolerance


@pytest.mark.parametrize("rho", [0.0, 0.99])
@pytest.mark.parametrize("dtype", NARROW)
def test_accuracy_of_narrow_gradients(dtype, rho, gradients, device):
    m, d, damping = 64, 20_000, 1e-5
    g = gradients(m, d, rho=rho, norm=10.0, dtype=dtype)
    static = mk.StaticFisher(g.to(device), damping)
    x = gradients(2, d, norm=1.0, seed=1)
    # Float64 until the one rounding of the result; |g|^2 / (m damping) amplifies the eps of the products.
    norms = g.double().norm(dim=1)
    amplified = 4 * torch.finfo(torch.float64).eps * float(norms.square().sum()) / (m * damping)
    assert error(static.ihvp(x.to(device)), reference.woodbury(g, damping, m, x)) <= 2**-23 + amplified
    # x = g_j is the hard case: all of x/damping but damping/|g|^2 of it cancels.
    want = reference.newest(g, damping, m, m - 1)
    amplified *= float(norms.square().sum()) / (m * damping)
    assert error(static.ihvp(g[-1].double().to(device)), want) <= amplified


@pytest.mark.parametrize("page_size", [1, 7, 13, 26, 50, 66, 67, 1000])
@pytest.mark.parametrize(
    ("block_size", "keep_vectors"),
    [*((b, False) for b in BLOCKS), *((b, True) for b in BLOCKS if b != 5)],  # 5 < m: no vectors
)
def test_pages_change_nothing(block_size, page_size, keep_vectors, gradients, device):
    m, d = 11, 67
    g = gradients(m + 2, d, norm=3.0).to(device)
    x = gradients(3, d, seed=1).to(device)
    options = {"block_size": block_size, "keep_vectors": keep_vectors}
    whole = mk.StaticFisher(g[:m], 0.1, **options)
    paged = mk.StaticFisher(g[:m], 0.1, page_size=page_size, **options)
    for row in [None, *g[m:]]:
        if row is not None:
            whole.append(row)
            paged.append(row)
        for got, want in zip(everything(paged, x), everything(whole, x), strict=True):
            assert got.shape == want.shape and got.dtype == want.dtype
            assert error(got, want) <= 1e-12  # sums of the same products, cut elsewhere
        if block_size != 5:
            for got, want in zip(paged.vectors(), whole.vectors(), strict=True):
                assert error(got, want) <= 1e-12


@pytest.mark.parametrize("elements", [1, 250, 400])
@pytest.mark.parametrize("page_size", [None, 26])
@pytest.mark.parametrize("block_size", [None, 13])
def test_groups_of_blocks_change_nothing(block_size, page_size, elements, gradients, device, monkeypatch):
    """Wide blocks are factored, and their factors inverted, a few at a time; two of them rounding leaves singular."""
    m, d = 11, 67
    g, x = gradients(m, d, norm=3.0).to(device), gradients(3, d, seed=1).to(device)
    g[:, 13:26], g[:, 52:65] = g[:1, 13:26], 100 * g[:1, 52:65]

    def query() -> list[Tensor]:
        return everything(mk.StaticFisher(g, 1e-16, block_size=block_size, page_size=page_size), x.double())

    want = query()
    monkeypatch.setattr("mfac_kernels.fisher._cholesky._GROUP_ELEMENTS", elements)
    for got, expected in zip(query(), want, strict=True):
        assert bool(got.isfinite().all()) and error(got, expected) <= 1e-12


@pytest.mark.parametrize("page_size", [1, 2, 5, 6, 100])
@pytest.mark.parametrize("block_size", [None, 6, 100])
def test_pages_do_not_cut_a_narrow_block(block_size, page_size, gradients, device):
    """One block, of fewer columns than there are gradients."""
    g, x = gradients(10, 6, norm=3.0).to(device), gradients(3, 6, seed=1).to(device)
    whole, paged = mk.StaticFisher(g, 0.1), mk.StaticFisher(g, 0.1, block_size=block_size, page_size=page_size)
    every = torch.arange(6, device=device)
    assert error(whole.submatrix(every), torch.linalg.inv(masked_fisher(g.cpu(), 0.1, 10, None))) <= 1e-10
    for _ in range(2):
        torch.testing.assert_close(paged.ihvp(x), whole.ihvp(x))
        torch.testing.assert_close(paged.submatrix(every), whole.submatrix(every))
        for static in (whole, paged):
            static.append(g[0])


@pytest.mark.parametrize("norm", [1.0, 10.0, 100.0])
def test_narrow_blocks_from_nothing(norm, gradients, device):
    """Every gradient appended, float32: as exact as all given, up to the conditioning that both have."""
    n, d, b, damping = 64, 64, 16, 1e-5
    g = gradients(n, d, norm=norm).float().to(device)
    x = gradients(2, d, seed=1).float().to(device)
    static = mk.StaticFisher(g[:0], damping, block_size=b, ngrads=n)
    for row in g:
        static.append(row)
    fisher = masked_fisher(g.double().cpu(), damping, n, b)
    want = torch.linalg.solve(fisher, x.double().cpu().mT).mT
    assert error(static.ihvp(x), want) <= 1e-5
    assert static.diagonal().dtype == torch.float32
    assert float(static.diagonal().min()) > 0


@pytest.mark.parametrize("block_size", BLOCKS)
def test_copies_answer(block_size, gradients):
    g, x = torch.empty(11, 67, dtype=torch.float64), gradients(3, 67, seed=1)
    for row, value in zip(g, gradients(11, 67), strict=True):
        row.copy_(value)  # a change in place that came before
    static = mk.StaticFisher(g, 0.1, block_size=block_size)
    for other in (copy.deepcopy(static), pickle.loads(pickle.dumps(static))):
        for got, want in zip(everything(other, x), everything(static, x), strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("block_size", BLOCKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_may_be_rows_of_a_larger_buffer_and_are_not_copied(dtype, block_size, gradients, device):
    m, d = 11, 67
    buffer = gradients(2 * m, d + 30, norm=3.0).to(dtype).to(device)
    g = buffer[::2, 9 : 9 + d]
    static = mk.StaticFisher(g, 0.1, block_size=block_size)
    assert static._rows._grads.data_ptr() == g.data_ptr()
    assert all(page.data_ptr() == g[:, a:].data_ptr() for a, _, page in static._rows.pages())
    dense = mk.StaticFisher(g.contiguous(), 0.1, block_size=block_size)
    x = gradients(2, d, seed=1).to(device)
    for got, want in zip(everything(static, x), everything(dense, x), strict=True):
        if device == "cpu":
            assert torch.equal(got, want)
        else:  # torch's products choose their kernels by the strides
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))
    static.append(buffer[1, 9 : 9 + d])
    assert static._rows._grads.data_ptr() == g.data_ptr()
    assert (static.count, static.ngrads) == (m + 1, m)


def test_appending_does_not_write_to_the_caller_s_gradients(gradients, device):
    buffer = gradients(6, 20).to(device)
    before = buffer.clone()
    static = mk.StaticFisher(buffer[:3], 0.1)
    for row in buffer[3:]:
        static.append(row * 2)
    assert torch.equal(buffer, before)


@pytest.mark.parametrize("block_size", [None, 3])
@pytest.mark.parametrize(
    "query",
    [
        lambda s: s.ihvp(torch.ones(9, dtype=torch.float64, device=s._rows.device)),
        lambda s: s.diagonal(),
        lambda s: s.element(0, 1),
        lambda s: s.elements(torch.tensor([0]), torch.tensor([1])),
        lambda s: s.submatrix(torch.tensor([0, 1])),
        lambda s: s.append(torch.ones(9, dtype=torch.float64, device=s._rows.device)),
    ],
    ids=["ihvp", "diagonal", "element", "elements", "submatrix", "append"],
)
def test_a_change_in_place_does_not_pass_unseen(query, block_size, gradients, device):
    g = gradients(4, 9).to(device)
    static = mk.StaticFisher(g, 0.1, block_size=block_size)
    query(static)
    g[2, 5] += 1
    with pytest.raises(RuntimeError, match=r"^grads: .*changed in place"):
        query(static)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("damping", [1e-8, 1e-12, 1e-16])
@pytest.mark.parametrize("block_size", [None, 13])
def test_dependent_gradients_stay_finite(block_size, damping, dtype, gradients, device):
    """Duplicates leave K singular to rounding, and its rounding is far above n damping."""
    g = gradients(3, 40, norm=10.0).to(dtype).repeat(3, 1).to(device)
    static = mk.StaticFisher(g, damping, block_size=block_size)
    x = gradients(2, 40, norm=1.0, seed=1).to(device)
    every = torch.arange(40, device=device)
    # K' >= n damping and |K' - K| <= 2 eps |G|^2, so |F^-1 x| <= |x| / damping (1 + 2 eps |G|^2 / (n damping)).
    eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    for _ in range(3):
        got = static.ihvp(x)
        bound = 1 + 2 * eps * 10 * float(g.double().square().sum()) / (9 * damping)
        assert float(got.norm()) <= bound * float(x.norm()) / damping
        assert bool(static.diagonal().isfinite().all())
        assert bool(static.submatrix(every).isfinite().all())
        static.append(g[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dependent_gradients_in_narrow_blocks(dtype, gradients, device):
    """A block that float32 loses is inverted in float64."""
    g = gradients(3, 40, norm=10.0).to(dtype).repeat(3, 1).to(device)
    static = mk.StaticFisher(g, 1e-7, block_size=8)
    fisher = masked_fisher(g.cpu(), 1e-7, 9, 8)
    dense = torch.linalg.inv(fisher)
    # eps cond of the float64 inverse, then one rounding to float32
    tolerance = 8 * torch.finfo(torch.float64).eps * float(torch.linalg.cond(fisher)) + 2**-23
    x = gradients(2, 40, seed=1).to(device)
    assert error(static.ihvp(x), x.cpu() @ dense) <= tolerance * (2 if dtype == torch.float64 else 50)
    assert error(static.diagonal(), dense.diagonal()) <= tolerance


@pytest.mark.parametrize("block_size", [13, 5])
def test_entries_across_blocks_are_zero(block_size, gradients, device):
    static = mk.StaticFisher(gradients(8, 40).to(device), 0.1, block_size=block_size)
    every = torch.arange(40, device=device)
    block = every // block_size
    matrix = static.submatrix(every)
    assert bool((matrix == matrix.mT).all())
    assert bool(((matrix != 0) == (block[:, None] == block)).all())
    assert float(static.element(0, 39)) == 0.0


def test_indices(gradients, device):
    static = mk.StaticFisher(gradients(8, 40).to(device), 0.1)
    full = static.submatrix(torch.arange(40, device=device))
    i = torch.tensor([-1, -40, 3, 3], device=device)
    j = torch.tensor([39, 0, -37, 5], device=device, dtype=torch.int32)
    assert error(static.elements(i, j), full[i, j.long()]) <= 1e-14
    assert error(static.submatrix(i), full[i][:, i]) <= 1e-14  # repeated and unordered
    assert abs(float(static.element(-1, 39)) - float(full[39, 39])) <= 1e-14 / 0.1
    empty = torch.empty(0, dtype=torch.int64, device=device)
    assert static.submatrix(empty).shape == (0, 0) and static.elements(empty, empty).shape == (0,)


@pytest.mark.parametrize("block_size", [None, 4])
@pytest.mark.parametrize(("m", "d"), [(1, 1), (1, 10), (10, 1), (3, 4)])
def test_smallest_sizes(m, d, block_size, gradients, device):
    g = gradients(m, d, norm=2.0)
    static = mk.StaticFisher(g.to(device), 0.25, block_size=block_size)
    dense = torch.linalg.inv(masked_fisher(g, 0.25, m, block_size))
    x = gradients(2, d, seed=1)
    assert error(static.ihvp(x.to(device)), x @ dense) <= 1e-12
    assert error(static.diagonal(), dense.diagonal()) <= 1e-12
    assert static.ihvp(x[:0].to(device)).shape == (0, d)
    assert static.block_size == min(d, block_size or d)


def test_many_small_blocks(gradients, device):
    m, d, b = 20, 1003, 4
    g = gradients(m, d, norm=10.0)
    static = mk.StaticFisher(g.to(device), 0.1, block_size=b)
    dense = torch.linalg.inv(masked_fisher(g, 0.1, m, b))
    x = gradients(2, d, seed=1)
    assert error(static.ihvp(x.to(device)), x @ dense) <= 1e-12
    assert error(static.diagonal(), dense.diagonal()) <= 1e-12


def test_any_layout_of_vectors(gradients, device):
    static = mk.StaticFisher(gradients(6, 20).to(device), 0.1)
    wide = gradients(6, 40, seed=1).to(device)
    for x in (wide[:, ::2], wide[::3, :20], wide.mT[:20].mT, wide[0, :20].expand(3, 20)):
        assert torch.equal(static.ihvp(x), static.ihvp(x.contiguous()))


def test_no_graph_is_left(device):
    g = torch.ones(3, 5, device=device, requires_grad=True)
    static = mk.StaticFisher(g * 2, 0.1, keep_vectors=True)
    static.append((g * 3)[0])
    results = [static.ihvp(g * 2), static.diagonal(), static.element(0, 1), *static.vectors()]
    assert not any(t.requires_grad for t in results)


def test_gradients_made_in_inference_mode(gradients, device):
    with torch.inference_mode():
        g = gradients(4, 9).to(device) * 1
        static = mk.StaticFisher(g, 0.1)
        x = torch.ones(9, dtype=torch.float64, device=device)
        got = static.ihvp(x)
    want = reference.ihvp(g.clone().cpu(), 0.1, 4, x.clone().cpu())
    assert error(got.clone(), want) <= 1e-12


@pytest.mark.parametrize("block_size", [None, 2])
def test_rows_further_apart_than_2_to_the_31(block_size, gradients, device):
    """The index arithmetic of more than 2^32 elements, of which three short rows are touched."""
    d, stride = 5000, 2**31 + 8191
    try:
        memory = torch.empty(2 * stride + d, dtype=torch.bfloat16, device=device)
    except RuntimeError as failure:
        pytest.skip(f"cannot reserve 8.6 GB of address space: {failure}")
    near = gradients(3, d, dtype=torch.bfloat16).to(device)
    far = memory.as_strided((3, d), (stride, 1)).copy_(near)
    x = gradients(2, d, seed=1, dtype=torch.float32).to(device)
    results = [everything(mk.StaticFisher(g, 0.1, block_size=block_size), x) for g in (far, near)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
