"""The ops of Kronecker factors as ops of torch, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from kronecker_cases import DTYPES, SIMT, factor_dtype, random
from torch import Tensor

from mfac_kernels import ops

ROWS, IMAGES = torch.ones(6, 5), torch.ones(2, 4, 5, 5)
GEOMETRY = ([3, 3], [1, 1], [1, 1], [1, 1], [1, 1])  # kernel_size, stride, padding before and after, dilation


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    kind = factor_dtype(dtype)
    x, images = random((6, 5), dtype, 0), random((2, 4, 5, 5), dtype, 1)
    refused = torch.zeros(1, dtype=torch.int32)
    for name, arguments in (
        ("linear_factor_", (torch.zeros(6, 6, dtype=kind), x, torch.ones(6, dtype=kind), True, 0.5, 2.0, refused)),
        ("linear_factor_", (torch.zeros(2, 3, 3, dtype=kind), x, None, False, 0.0, 1.0, None)),
        (
            "conv_factor_",
            (torch.zeros(37, 37, dtype=kind), images, *GEOMETRY, 1, True, False, False, 0.5, 1.0, refused),
        ),
        ("conv_factor_", (torch.zeros(2, 2, 2, dtype=kind), images, *GEOMETRY, 2, False, True, True, 0.5, 1.0, None)),
        ("embedding_factor_", (torch.zeros(5, dtype=kind), torch.arange(5), 0, 0.5, 1.0)),
        ("cross_factor", (x, random((6, 3), dtype, 2), None)),
    ):
        torch.library.opcheck(getattr(torch.ops.mfac_kernels, name).default, arguments)


def test_compiles_to_one_graph():
    def accumulate(x: Tensor, images: Tensor) -> tuple[Tensor, ...]:
        linear, conv = x.new_zeros(6, 6), x.new_zeros(37, 37)
        flag = ops.linear_factor_(linear, x, bias=True, check_finite=True)
        ops.conv2d_factor_(conv, images, 3, padding="same", bias=True, beta=0.5, check_finite=flag, algorithm="tiles")
        return linear, conv, flag, ops.cross_factor(x, x)

    x, images = random((6, 5), torch.float32, 0), random((2, 4, 5, 5), torch.float32, 1)
    compiled = torch.compile(accumulate, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(x, images), accumulate(x, images), strict=True):
        assert torch.equal(got, want)


FLOATS = "expected float32, float64, bfloat16 or float16, got"
END = (1, False, False, False, 1.0, 1.0, None)  # groups, bias, sua, reduce, beta, alpha, refused
BAD = [
    ("linear_factor_", (torch.zeros(5, 5), ROWS.int(), None, False, 1.0, 1.0, None), rf"x: {FLOATS} Int"),
    (
        "linear_factor_",
        (torch.zeros(5, 5), torch.ones(()), None, False, 1.0, 1.0, None),
        r"x: expected at least 1 dimension, got shape \(\)",
    ),
    (
        "linear_factor_",
        (torch.zeros(5, 5), ROWS, None, True, 1.0, 1.0, None),
        r"factor: expected shape \(6, 6\), got \(5, 5\)",
    ),
    (
        "linear_factor_",
        (torch.zeros(5, 5).double(), ROWS, None, False, 1.0, 1.0, None),
        "factor: expected Float, got Double",
    ),
    (
        "linear_factor_",
        (torch.zeros(2, 2, 2), ROWS, None, False, 1.0, 1.0, None),
        r"factor: expected shape \(3, 2, 2\), got \(2, 2, 2\)",
    ),
    (
        "linear_factor_",
        (torch.zeros(5, 5).mT, ROWS, None, False, 1.0, 1.0, None),
        "factor: expected a contiguous tensor",
    ),
    (
        "linear_factor_",
        (torch.zeros(5, 5), ROWS, torch.ones(5), False, 1.0, 1.0, None),
        r"weights: expected the leading shape of x, got \(5,\) for x of shape \(6, 5\)",
    ),
    (
        "linear_factor_",
        (torch.zeros(5, 5), ROWS, torch.ones(6).double(), False, 1.0, 1.0, None),
        "weights: expected Float, got Double",
    ),
    (
        "linear_factor_",
        (torch.zeros(5, 5), ROWS, None, False, float("nan"), 1.0, None),
        "beta: expected a finite number, got nan",
    ),
    (
        "linear_factor_",
        (torch.zeros(5, 5), ROWS, None, False, 1.0, 1.0, torch.zeros(1)),
        "refused: expected Int, got Float",
    ),
    (
        "conv_factor_",
        (torch.zeros(36, 36), IMAGES[0, 0], *GEOMETRY, *END),
        r"x: expected 3 to 5 dimensions, got shape \(5, 5\)",
    ),
    ("conv_factor_", (torch.zeros(36, 36), IMAGES, [3], *GEOMETRY[1:], *END), "kernel_size: expected 2 numbers, got 1"),
    (
        "conv_factor_",
        (torch.zeros(36, 36), IMAGES, [3, 3], [1, 0], *GEOMETRY[2:], *END),
        "stride: expected at least 1, got 0",
    ),
    (
        "conv_factor_",
        (torch.zeros(36, 36), IMAGES, [3, 9], *GEOMETRY[1:], *END),
        "kernel_size: expected a kernel that fits into the padded input, got one of extent 9 for 7 in dimension 3",
    ),
    (
        "conv_factor_",
        (torch.zeros(36, 36), IMAGES, *GEOMETRY, 3, *END[1:]),
        "groups: expected a divisor of 4 channels, got 3",
    ),
    (
        "conv_factor_",
        (torch.zeros(36, 36), IMAGES, *GEOMETRY, 2, *END[1:]),
        r"factor: expected shape \(2, 18, 18\), got \(36, 36\)",
    ),
    (
        "embedding_factor_",
        (torch.zeros(5, 1), torch.arange(5), None, 1.0, 1.0),
        r"counts: expected 1 dimension, got shape \(5, 1\)",
    ),
    ("embedding_factor_", (torch.zeros(5), ROWS, None, 1.0, 1.0), "indices: expected int32 or int64, got Float"),
    ("cross_factor", (ROWS, ROWS.long(), None), rf"y: {FLOATS} Long"),
    ("cross_factor", (ROWS, ROWS.double(), None), "y: expected Float, as x has, got Double"),
    ("cross_factor", (ROWS, ROWS[:1], None), "y: expected the leading shape of x, got"),
]


@pytest.mark.parametrize("fake", [False, True], ids=["real", "fake"])
@pytest.mark.parametrize(("name", "arguments", "message"), BAD, ids=lambda v: v if isinstance(v, str) else "")
def test_errors_name_argument_expected_and_got(name, arguments, message, fake):
    kept = arguments[0].clone()
    given = tuple(a.to("meta") if fake and isinstance(a, Tensor) else a for a in arguments)
    with pytest.raises(RuntimeError, match=f"{name}: {message}"):
        getattr(torch.ops.mfac_kernels, name)(*given)
    assert torch.equal(arguments[0], kept)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"spatial": "half"}, 'spatial: expected "full" or "sua", got "half"'),
        ({"approximation": "sum"}, 'approximation: expected "expand" or "reduce", got "sum"'),
        ({"padding": "half"}, 'padding: expected numbers, "same" or "valid", got "half"'),
        ({"padding": "same", "stride": 2}, "padding: expected numbers with a stride"),
        ({"dilation": (1, 1, 1)}, r"dilation: expected 1 or 2 numbers, got \(1, 1, 1\)"),
        ({"algorithm": "magic"}, "algorithm: expected"),
        ({"algorithm": "fft", "stride": 2}, "algorithm: expected"),
    ],
)
def test_errors_of_the_python_surface(arguments, message):
    with pytest.raises(RuntimeError, match=f"conv2d_factor_: {message}"):
        ops.conv2d_factor_(torch.zeros(36, 36), IMAGES, 3, **arguments)


def test_a_dilation_without_end():
    with pytest.raises(RuntimeError, match="kernel_size: expected a kernel that fits into the padded input"):
        ops.conv2d_factor_(torch.zeros(25, 25), torch.zeros(1, 1, 4, 4), 5, dilation=2**62, algorithm="tiles")


def test_an_index_out_of_range():
    counts = torch.zeros(5)
    message = "out of range" if SIMT else "expected 0 to 4, got 5"  # a device assertion has no values to show
    with pytest.raises(RuntimeError, match=f"embedding_factor_: indices: {message}"):
        ops.embedding_factor_(counts, torch.tensor([0, 5]))
    assert not counts.any()
