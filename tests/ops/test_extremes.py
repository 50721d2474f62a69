"""What is refused at the ends of ranges: counts below zero, numbers whose products overflow, memory that is shared."""

from __future__ import annotations

import pytest
import torch
from kronecker_cases import SIMT

from mfac_kernels import ops

F64 = torch.float64


@pytest.mark.parametrize("name", ["core_insert_", "core_solve", "core_refactor_", "window_insert_"])
def test_a_count_below_zero(name, device):
    if device != "cpu":
        pytest.skip("on a device nobody looks: the kernel's assertion ends the program")
    state, eye, row = torch.tensor([-1, 0]), torch.eye(3, dtype=F64), torch.ones(3, dtype=F64)
    calls = {
        "core_insert_": lambda: ops.core_insert_(eye, eye, state, row, 1.0, False),
        "core_solve": lambda: ops.core_solve(eye, state, row[None], 1.0, False),
        "core_refactor_": lambda: ops.core_refactor_(eye, eye, state, 1.0, False),
        "window_insert_": lambda: ops.window_insert_(eye, state, row),
    }
    message = "state: expected a count of gradients"  # a device assertion knows neither the op nor the count
    with pytest.raises(RuntimeError, match=message if SIMT else f"{name}: {message}, got -1"):
        calls[name]()
    assert state.tolist() == [-1, 0] and torch.equal(eye, torch.eye(3, dtype=F64))


@pytest.mark.parametrize("argument", ["stride", "padding", "dilation"])
@pytest.mark.parametrize("value", [2**31, 2**62])
def test_numbers_of_a_geometry_that_are_too_large(argument, value):
    with pytest.raises(RuntimeError, match=rf"conv_factor_: {argument}\w*: expected at most 2147483647, got"):
        ops.conv2d_factor_(torch.zeros(8, 8), torch.ones(1, 2, 4, 4), 2, **{argument: value})


def test_too_many_offsets_for_the_compressed_form():
    with pytest.raises(RuntimeError, match=r"conv2d_lags_size: kernel_size: expected at most 4096 offsets"):
        ops.conv2d_lags_size(2, 100)


def test_results_need_memory_of_their_own():
    blocks = torch.eye(3)[None]
    for call in (ops.cholesky_inverse_ex, ops.cholesky_factor_ex, ops.cholesky_inverse_factor_ex):
        with pytest.raises(RuntimeError, match=r"out: expected memory of its own for each element"):
            call(blocks, 0.1, out=torch.zeros(1, 3, 1).expand(1, 3, 3))
        with pytest.raises(RuntimeError, match=r"out: expected none where a gradient|not differentiable: expected"):
            call(blocks, 0.1, out=torch.zeros(1, 3, 3, requires_grad=True))


def test_block_diagonals_without_blocks_and_of_another_dtype():
    x = torch.ones(3, 3)
    for call, arguments in ((ops.block_diagonal_matmul, ([], x)), (ops.matmul_block_diagonal, (x, []))):
        with pytest.raises(RuntimeError, match=r"blocks: expected at least one batch, got none"):
            call(*arguments)
    with pytest.raises(RuntimeError, match=r"matmul_block_diagonal: blocks\[0\]: expected shape \(g, s, s\)"):
        ops.matmul_block_diagonal(x, torch.ones(3))
    with pytest.raises(RuntimeError, match=r"x: expected the dtype of the blocks, torch.float64, got torch.float32"):
        ops.block_diagonal_matmul(torch.eye(3, dtype=F64)[None], x)


def test_a_bound_whose_ratio_overflows():
    blocks = torch.tensor([[[1.0, 2.0], [2.0, 1.0]]])
    (inverse,), (attempts,), _ = ops.robust_cholesky_inverse([blocks], 0.0, bound=1e300)
    assert bool(inverse.isfinite().all()) and int(attempts) > 0
    with pytest.raises(RuntimeError, match="batches: expected a list of tensors, got one tensor"):
        ops.robust_cholesky_inverse(blocks, 0.0)
