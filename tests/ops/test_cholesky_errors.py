"""What the batched Cholesky ops and their wrappers refuse, and in which words."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mfac_kernels import ops

B = torch.eye(3).repeat(2, 1, 1)
OUT = torch.zeros(2, 3, 3)
D = torch.ones(2, dtype=torch.float64)
ANY = "expected float32, float64, bfloat16 or float16, got"
DAMPED = [
    (([OUT, OUT], [B], [D]), r"out: expected 1 tensors, as blocks has, got 2"),
    (([OUT], [B], []), r"damping: expected 1 tensors, as blocks has, got 0"),
    (([OUT], [B[0, 0]], [D]), r"blocks\[0\]: expected shape \(..., n, n\), got \(3,\)"),
    (([OUT, OUT], [B, B[:, :2]], [D, D]), r"blocks\[1\]: expected shape \(..., n, n\), got \(2, 2, 3\)"),
    (([OUT], [B.int()], [D]), rf"blocks(\[0\])?: {ANY} Int"),
    (([OUT.bfloat16()], [B], [D]), r"out\[0\]: expected float32 or float64, got BFloat16"),
    (([OUT], [B.double()], [D]), r"out\[0\]: expected Double, as blocks\[0\] is, got Float"),
    (([OUT[:1]], [B], [D]), r"out\[0\]: expected shape \(2, 3, 3\), got \(1, 3, 3\)"),
    (([OUT[:1].expand(2, 3, 3)], [B], [D]), r"out\[0\]: expected distinct elements, got stride 0 in dimension 0"),
    (([OUT], [B], [D.float()]), r"damping\[0\]: expected Double, got Float"),
    (([OUT], [B], [D.repeat(2)]), r"damping\[0\]: expected 1 or 2 values, got 4"),
    (([OUT], [B], [D.repeat(2)[::2]]), r"damping\[0\]: expected a contiguous tensor"),
    (([OUT], [B], [D], torch.ones(2)), r"only: expected Int, got Float"),
    (([OUT], [B], [D], torch.ones(3).int()), r"only: expected shape \(2,\), got \(3,\)"),
]
ONE_BATCH = [
    ((B[0, 0], 0.1), r"blocks: expected shape \(..., n, n\), got \(3,\)"),
    ((B[:, :2], 0.1), r"blocks: expected shape \(..., n, n\), got \(2, 2, 3\)"),
    ((B.bool(), 0.1), rf"blocks: {ANY} Bool"),
]
BAD = [
    *(("cholesky_inverse_", *case) for case in DAMPED),
    *(("cholesky_factor_", *case) for case in DAMPED),
    *((f"cholesky_{what}_ex", *case) for what in ("inverse", "factor") for case in ONE_BATCH),
    ("cholesky_solve_", ([B, B], [B]), r"x: expected 1 tensors, as factors has, got 2"),
    ("cholesky_solve_", ([B], [B[:, :, :2]]), r"factors\[0\]: expected shape \(..., n, n\), got \(2, 3, 2\)"),
    ("cholesky_solve_", ([B], [B.half()]), r"factors\[0\]: expected float32 or float64, got Half"),
    ("cholesky_solve_", ([B.double()], [B]), r"x\[0\]: expected Float, got Double"),
    (
        "cholesky_solve_",
        ([B[:, :2]], [B]),
        r"x\[0\]: expected right-hand sides \(..., n, k\) of factors of shape \(2, 3, 3\), got \(2, 2, 3\)",
    ),
    ("cholesky_solve_", ([B[..., :1].expand(2, 3, 4)], [B]), r"x\[0\]: expected distinct elements, got stride 0"),
]


def moved(arguments: object, device: str) -> object:
    if isinstance(arguments, (list, tuple)):
        return type(arguments)(moved(a, device) for a in arguments)
    if not isinstance(arguments, Tensor):
        return arguments
    return torch.empty_strided(arguments.shape, arguments.stride(), dtype=arguments.dtype, device=device)


@pytest.mark.parametrize("fake", [False, True], ids=["real", "fake"])
@pytest.mark.parametrize(("name", "arguments", "message"), BAD, ids=lambda v: v if isinstance(v, str) else "")
def test_errors_name_argument_expected_and_got(name, arguments, message, fake):
    if fake:
        arguments = moved(arguments, "meta")
    before = OUT.clone(), B.clone()
    with pytest.raises(RuntimeError, match=f"^{name}: {message}"):
        getattr(torch.ops.mfac_kernels, name)(*arguments)
    assert torch.equal(OUT, before[0]) and torch.equal(B, before[1])


def test_out_may_not_be_a_part_of_blocks():
    memory = torch.eye(4).repeat(5, 1, 1)
    before = memory.clone()
    with pytest.raises(
        RuntimeError, match=r"^cholesky_inverse_: out\[0\]: expected the memory of blocks\[0\] or memory apart"
    ):
        ops.cholesky_inverse_ex(memory[:4], out=memory[1:])
    assert torch.equal(memory, before)


WRONG = [
    (
        lambda: ops.cholesky_inverse_ex(B[0, 0]),
        r"cholesky_inverse_ex: blocks: expected shape \(..., n, n\), got \(3,\)",
    ),
    (lambda: ops.cholesky_inverse(B.bool()), rf"cholesky_inverse_ex: blocks: {ANY} Bool"),
    (
        lambda: ops.cholesky_inverse_ex(B, D.repeat(2)),
        r"cholesky_inverse_ex: damping: expected a batch that broadcasts with \(2,\), got \(4,\)",
    ),
    (lambda: ops.cholesky_inverse_ex(B, 0.1, dtype=torch.int32), rf"cholesky_inverse_ex: dtype: {ANY} Int"),
    (
        lambda: ops.cholesky_inverse_ex(B, out=OUT[0]),
        r"cholesky_inverse_ex: out: expected shape \(2, 3, 3\), got \(3, 3\)",
    ),
    (
        lambda: ops.cholesky_factor_ex(B, out=OUT, dtype=torch.float64),
        r"cholesky_factor_ex: dtype: expected Float, as out is, got Double",
    ),
    (lambda: ops.grouped_cholesky_inverse_ex([B], [0.1, 0.2]), r"damping: expected 1, one per batch, got 2"),
    (
        lambda: ops.grouped_cholesky_inverse_ex([B, B[0, 0]], 0.1),
        r"batches\[1\]: expected shape \(..., n, n\), got \(3,\)",
    ),
    (lambda: ops.cholesky_solve(B, B[0, 0]), r"cholesky_solve: b: expected shape \(..., n, k\), got \(3,\)"),
    (
        lambda: ops.cholesky_solve(B, B.repeat(2, 1, 1)),
        r"cholesky_solve: b: expected a batch that broadcasts with \(2,\)",
    ),
    (lambda: ops.robust_cholesky_inverse([B], growth=1.0), r"growth: expected a finite number above 1, got 1"),
    (lambda: ops.robust_cholesky_inverse([B], bound=0.0), r"bound: expected a positive finite number, got 0"),
    (lambda: ops.diagonal_blocks(B, 0), r"diagonal_blocks: block_size: expected at least 1, got 0"),
    (
        lambda: ops.diagonal_blocks(B[:, :2], 2),
        r"diagonal_blocks: matrix: expected shape \(..., D, D\), got \(2, 2, 3\)",
    ),
    (lambda: ops.block_diagonal_matmul(B[0], B[0]), r"blocks\[0\]: expected shape \(g, s, s\), got \(3, 3\)"),
    (lambda: ops.block_diagonal_matmul(B, B[0]), r"x: expected 6 rows, as the blocks have, got shape \(3, 3\)"),
]


@pytest.mark.parametrize(("call", "message"), WRONG)
def test_wrappers_say_what_is_wrong(call, message):
    with pytest.raises(RuntimeError, match=message):
        call()


def test_damping_may_lie_in_out(device):
    """A float64 damping is not copied for its type."""
    blocks = torch.eye(4, dtype=torch.float64).repeat(50, 1, 1) * torch.arange(1, 51)[:, None, None]
    blocks = blocks.to(device)
    want = ops.cholesky_inverse(blocks, float(blocks[0, 0, 0]))
    assert torch.equal(ops.cholesky_inverse(blocks, blocks[0, 0, 0], out=blocks), want)


def test_one_block_with_many_dampings_is_no_part_of_out(device):
    blocks = torch.eye(4).repeat(5, 1, 1).to(device)
    with pytest.raises(RuntimeError, match="or memory apart from it, got a part of it"):
        ops.cholesky_inverse(blocks[0], torch.ones(5, device=device), out=blocks)
    assert torch.equal(blocks.cpu(), torch.eye(4).repeat(5, 1, 1))
