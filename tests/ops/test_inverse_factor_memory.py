"""Factors of inverses of single blocks, computed in the memory of the result: whatever that is, the same bits.

What is dense takes no second buffer; what is not takes one of n^2 / 2 elements, and the others are compared with it.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cholesky_cases import EPS, FLOATS, NAN, SIMT, indefinite, junk_above, spd
from torch import Tensor

from mfac_kernels import ops
from mfac_kernels.reference import cholesky as reference

# On both sides of 8 tiles of 8, 16 and 32 rows, and of what tiles divide
SIZES = [130] if SIMT else [56, 57, 63, 64, 65, 112, 113, 128, 129, 130, 224, 225, 255, 256, 257, 331]

uppers = pytest.mark.parametrize("upper", [True, False])


def framed(n: int, before: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """Memory full of 7, and a dense (n, n) of it that begins after ``before`` elements."""
    memory = torch.full((before + n * n + 5,), 7.0, dtype=dtype, device=device)
    return memory, memory[before : before + n * n].view(n, n)


@uppers
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n", SIZES)
def test_every_place_of_the_result(n, dtype, upper, device, instruction_set):
    """Apart from the block and its own memory, at any address, next to memory that stays."""
    block = spd((), n, cond=10.0, dtype=dtype)
    h = junk_above(block).to(device)
    want = torch.empty(n, n + 3, dtype=dtype, device=device)[:, :n]
    assert not ops.cholesky_inverse_factor_ex(h, upper=upper, out=want)[1].any()
    exact = reference.inverse_factor(block, upper=upper)
    assert float((want.cpu() - exact).norm() / exact.norm()) <= 4 * n * EPS[dtype] * 11  # c n eps cond, rounded
    for before in (0, 1, 16):
        memory, out = framed(n, before, dtype, device)
        ops.cholesky_inverse_factor_ex(h, upper=upper, out=out)
        assert torch.equal(out, want)
        ops.cholesky_inverse_factor_ex(out.copy_(h), upper=upper, out=out)
        assert torch.equal(out, want)
        assert bool((memory[:before] == 7).all()) and bool((memory[before + n * n :] == 7).all())


@pytest.mark.skipif(SIMT, reason="of the CPU's kernels")
@uppers
def test_of_its_transpose(upper, instruction_set):
    """Lists with gaps pass unexamined: each block is read before it is written."""
    n = 300
    block = spd((), n, dtype=torch.float32)
    want, _ = ops.cholesky_inverse_factor_ex(block, upper=upper)
    out = torch.full((3, n, n), NAN)[::2]
    ops.cholesky_inverse_factor_ex(out.copy_(junk_above(block).mT).mT, upper=upper, out=out)
    assert torch.equal(out, want.expand(2, n, n))


@uppers
@pytest.mark.parametrize("value", ["indefinite", "nan"])
def test_failure_in_place(value, upper, device, instruction_set):
    n = 130 if SIMT else 300
    memory, out = framed(n, 3, torch.float32, device)
    block = indefinite(n, 77, torch.float32)
    if value == "nan":
        block[n - 1, 5] = NAN
    out.copy_(block.flip(0, 1).mT if upper else block)
    _, info = ops.cholesky_inverse_factor_ex(out, upper=upper, out=out)
    assert int(info) == (78 if value == "indefinite" else -1)
    assert bool(out.isnan().all()) and bool((memory[:3] == 7).all()) and bool((memory[-5:] == 7).all())


@uppers
@pytest.mark.parametrize("n", [130] if SIMT else [513, 700])
def test_same_bits_in_place_for_any_number_of_threads(n, upper, device, threads):
    block = junk_above(spd((), n, dtype=torch.float32)).to(device)
    threads(1)
    want, _ = ops.cholesky_inverse_factor_ex(block, upper=upper)
    for count in (2, 3):
        threads(count)
        for out in (torch.empty_like(block), block.clone()):
            got, _ = ops.cholesky_inverse_factor_ex(block, upper=upper, out=out)
            assert torch.equal(got, want)
            got, _ = ops.cholesky_inverse_factor_ex(out.copy_(block), upper=upper, out=out)
            assert torch.equal(got, want)


PEAK = """
import torch
from mfac_kernels import ops
from peak_memory import watch
h = torch.eye(2048)
ops.cholesky_inverse_factor_ex(h[:300, :300].clone())
taken = watch()
ops.cholesky_inverse_factor_ex(h, 1.0, relative=True, dead=True, out=h)
print(taken())
"""


@pytest.mark.skipif(SIMT or sys.platform != "linux", reason="reads Linux's /proc, of the CPU's kernels")
def test_in_place_takes_a_few_rows():
    """GPTQ's call on 16 MB: at most 4 tiles a column, of 32 rows with AVX-512: 1 MB; and what threads take to start."""
    benchmarks = Path(pytest.importorskip("peak_memory").__file__).parent
    command = [sys.executable, "-c", PEAK]
    found = subprocess.run(command, cwd=benchmarks, capture_output=True, text=True, check=True)
    assert int(found.stdout) < 4 << 20
