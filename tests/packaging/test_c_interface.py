"""mfac_kernels.h: a C library compiles and runs with it, and its functions do what the ops do."""

from __future__ import annotations

import ctypes
import math
import re
import shutil
from ctypes import c_double, c_int32, c_int64, c_void_p
from pathlib import Path

import pytest
import torch
from example_files import FOLDER, example
from torch import Tensor

import mfac_kernels as mk
from mfac_kernels import ops

pytestmark = pytest.mark.skipif(mk.build_info()["simt"], reason="the interpreted build has no CPU kernels")

HEADER = Path(mk.get_include(), "mfac_kernels.h")
TYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def c() -> ctypes.CDLL:
    return ctypes.CDLL(mk.get_library())


def at(tensor: Tensor | None) -> c_void_p:
    return c_void_p(0 if tensor is None else tensor.data_ptr())


def code(dtype: torch.dtype) -> c_int32:
    return c_int32(TYPES.index(dtype))


def rows(m: int, d: int, dtype: torch.dtype, stride: int) -> Tensor:
    return torch.randn(m, stride, generator=torch.Generator().manual_seed(m + d)).to(dtype)[:, :d]


def test_a_c_library(tmp_path):
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    c_interface = example("c_interface")
    library = c_interface.build(FOLDER / "c_interface.c", tmp_path)
    x = torch.randn(100, 7)
    want = torch.linalg.inv(x.double().mT @ x.double() / 100 + 0.5 * torch.eye(7))
    torch.testing.assert_close(c_interface.layer_inverse(library, x, 0.5), want.float(), rtol=1e-5, atol=1e-6)
    with pytest.raises(torch.linalg.LinAlgError, match="failed with 1"):
        c_interface.layer_inverse(library, x, -100.0)


def test_the_header_and_the_library_agree(c):
    """Every function that is declared is there, and the version is one."""
    text = HEADER.read_text(encoding="ascii")
    names = re.findall(r"^int32_t (mfac_\w+)\(", text, re.M)
    assert len(names) == 6
    assert all(hasattr(c, name) for name in names)
    assert c.mfac_c_version() == int(re.search(r"#define MFAC_KERNELS_C_VERSION (\d+)", text)[1])


@pytest.mark.parametrize("dtype", TYPES[:2])
@pytest.mark.parametrize("count, n", [(0, 3), (1, 1), (3, 5), (16, 8), (6, 40), (37, 17), (9, 128), (2, 130), (4, 0)])
def test_cholesky_inverse(c, count, n, dtype):
    """The op's bits; against float64, c n eps cond with c = 4; a block that fails touches no other."""
    x = torch.randn(count, n, 2 * n + 1, generator=torch.Generator().manual_seed(n)).to(dtype)
    blocks = x @ x.mT / (2 * n + 1)
    inverses, info = torch.full_like(blocks, 7), torch.full((count,), 7, dtype=torch.int32)
    bad = count // 2 if count > 1 and n else None
    if bad is not None:
        blocks[bad, n - 1, n - 1] = -3.0
    before = blocks.clone()
    args = code(dtype), c_int64(count), c_int64(n), at(blocks), c_double(0.1), at(inverses), at(info)
    assert c.mfac_cholesky_inverse(*args) == 0
    assert torch.equal(blocks, before)
    want, codes = ops.cholesky_inverse_ex(blocks.double(), 0.1)
    assert torch.equal(info, codes) and (bad is None or info[bad] == n)
    good = info == 0
    assert inverses[~good].isnan().all()
    assert torch.equal(inverses[good], ops.cholesky_inverse_ex(blocks, 0.1)[0][good])
    tolerance = 4 * max(n, 1) * torch.finfo(dtype).eps * 60  # cond < 60: the largest eigenvalue is below 6
    torch.testing.assert_close(inverses[good].double(), want[good], rtol=0, atol=10 * tolerance)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("m, d", [(1, 1), (5, 3), (40, 33), (0, 4), (300, 400)])
def test_linear_factor(c, m, d, dtype, weighted):
    """The bits of the op."""
    x, out = rows(m, d, dtype, d + 3), torch.float64 if dtype == torch.float64 else torch.float32
    weights = torch.rand(m, dtype=out) if weighted else None
    factor = torch.randn(d, d, dtype=out)
    factor = factor + factor.mT
    want = factor.clone()
    ops.linear_factor_(want, x, beta=0.5, alpha=0.25, weights=weights)
    args = code(dtype), c_int64(m), c_int64(d), at(x), c_int64(d + 3), at(weights), c_double(0.5), c_double(0.25)
    assert c.mfac_linear_factor(*args, at(factor)) == 0
    assert torch.equal(factor, want)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("m, d", [(1, 1), (5, 300), (40, 10_000), (3, 0)])
def test_gram_and_window(c, m, d, dtype):
    """The bits of the ops."""
    g, x, k = rows(m, d, dtype, d + 2), rows(3, d, dtype, d + 1), 3
    for in_double in (0, 1):
        out = torch.full((m, m), math.nan, dtype=torch.float64)
        assert c.mfac_gram(code(dtype), c_int64(m), c_int64(d), at(g), c_int64(d + 2), c_int32(in_double), at(out)) == 0
        assert torch.equal(out, ops.gram(g, double_precision=bool(in_double)))
    if d == 0:
        return
    dots = torch.full((k, m), math.nan, dtype=torch.float64)
    window = code(dtype), c_int64(m), c_int64(d), at(g), c_int64(d + 2), c_int64(k)
    assert c.mfac_window_dots(*window, at(x), c_int64(d + 1), at(dots)) == 0
    assert torch.equal(dots, ops.window_dots(g, x)[0])
    for added in (x, None):
        out = torch.full((k, d), math.nan, dtype=dtype)
        scale = c_double(0.5), at(added), c_int64(d + 1), c_double(2.0 if added is not None else 0.0)
        assert c.mfac_window_combine(*window, at(dots), *scale, at(out)) == 0
        alpha = 2.0 if added is not None else 0.0
        want = ops.window_combine(g, dots.unsqueeze(0), beta=0.5, x=added, alpha=alpha)
        assert torch.equal(out, want)


def test_bad_arguments_write_nothing(c):
    x, out = torch.ones(4, 4), torch.full((4, 4), 7.0, dtype=torch.float64)
    four, bad = c_int64(4), 1
    assert c.mfac_gram(c_int32(4), four, four, at(x), four, 0, at(out)) == bad  # a type that there is not
    assert c.mfac_gram(c_int32(0), c_int64(-1), four, at(x), four, 0, at(out)) == bad
    assert c.mfac_gram(c_int32(0), four, four, at(x), c_int64(3), 0, at(out)) == bad  # rows overlap
    assert c.mfac_gram(c_int32(0), four, four, at(None), four, 0, at(out)) == bad
    assert (
        c.mfac_linear_factor(c_int32(0), four, four, at(x), four, at(None), c_double(0), c_double(1), at(None)) == bad
    )
    args = at(x), c_double(0), at(out), at(None)
    assert c.mfac_cholesky_inverse(c_int32(0), c_int64(1), four, *args) == bad
    assert c.mfac_cholesky_inverse(code(torch.bfloat16), c_int64(1), four, *args) == bad
    assert (out == 7).all()
