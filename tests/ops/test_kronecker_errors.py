"""The ops of Kronecker factors as ops of torch, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from kronecker_cases import DTYPES, SIMT, factor_dtype, random
from torch import Tensor
from torch.utils._pytree import tree_map_only

from mfac_kernels import ops

ROWS, IMAGES = torch.ones(6, 5), torch.ones(2, 4, 5, 5)
GEOMETRY = ([3, 3], [1, 1], [1, 1], [1, 1], [1, 1])  # kernel_size, stride, padding before and after, dilation


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    kind = factor_dtype(dtype)
    x, images = random((6, 5), dtype, 0), random((2, 4, 5, 5), dtype, 1)
    refused, flags = torch.zeros(1, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    each, one = torch.ones(2, dtype=torch.float64), torch.ones((), dtype=torch.float64)
    for name, arguments in (
        ("linear_factor_", (torch.zeros(6, 6, dtype=kind), x, torch.ones(6, dtype=kind), True, 0.5, 2.0, refused)),
        ("linear_factor_", (torch.zeros(2, 3, 3, dtype=kind), x, None, False, 0.0, 1.0, None)),
        (
            "linear_factor_",
            (
                torch.zeros(2, 5, 5, dtype=kind),
                x,
                None,
                False,
                1.0,
                1.0,
                flags,
                False,
                torch.tensor([0, 4, 6]),
                each,
                one,
            ),
        ),
        (
            "grouped_linear_factor_",
            (
                [torch.zeros(5, 5, dtype=kind), torch.zeros(4, 4, dtype=kind)],
                [x, x[:, :3]],
                [None, torch.ones(6, dtype=kind)],
                [False, True],
                *(0.5, 2.0, flags, False, each, one),
            ),
        ),
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
        linear, conv, ragged = x.new_zeros(6, 6), x.new_zeros(37, 37), x.new_zeros(2, 5, 5)
        flag = ops.linear_factor_(linear, x, bias=True, check_finite=True)
        ops.linear_factor_(ragged, x, offsets=offsets, beta=offsets[0] / 2)
        ops.grouped_linear_factor_([linear, ragged[0]], [x, x], bias=[True, False], alpha=offsets[1] / 2)
        ops.conv2d_factor_(conv, images, 3, padding="same", bias=True, beta=0.5, check_finite=flag, algorithm="tiles")
        return linear, conv, ragged, flag, ops.cross_factor(x, x)

    offsets, x, images = (
        torch.tensor([1, 4, 6]),
        random((6, 5), torch.float32, 0),
        random((2, 4, 5, 5), torch.float32, 1),
    )
    compiled = torch.compile(accumulate, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(x, images), accumulate(x, images), strict=True):
        assert torch.equal(got, want)


FLOATS = "expected float32, float64, bfloat16 or float16, got"
END = (1, False, False, False, 1.0, 1.0, None)  # groups, bias, sua, reduce, beta, alpha, refused
GROUPS = (None, False, 1.0, 1.0, None, False)  # weights, bias, beta, alpha, refused, allow_tf32
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
    *(
        ("linear_factor_", (torch.zeros(*shape), x, *GROUPS, offsets, None, None), message)
        for shape, x, offsets, message in (
            ((1, 5, 5), ROWS, torch.ones(2), "offsets: expected int32 or int64, got Float"),
            ((1, 5, 5), ROWS, torch.zeros(1, 2).int(), r"offsets: expected shape \(groups \+ 1,\), got \(1, 2\)"),
            ((1, 5, 5), ROWS[None], torch.tensor([0, 1]), "x: expected 2 dimensions, as there are offsets, got shape"),
            ((5, 5), ROWS, torch.tensor([0, 6]), r"factor: expected shape \(1, 5, 5\), got \(5, 5\)"),
            ((3, 2, 2), ROWS, torch.tensor([0, 6]), r"factor: expected shape \(1, 5, 5\), got \(3, 2, 2\)"),
        )
    ),
    *(
        ("linear_factor_", (torch.zeros(4, 5, 5), ROWS, *GROUPS, torch.tensor([0, 3, 4, 5, 6]), *scales), message)
        for scales, message in (
            ((torch.ones(2), None), "beta: expected Double, got Float"),
            ((None, torch.ones(3).double()), "alpha: expected 1 or 4 values, got 3"),
            ((torch.ones(2, 2).double().mT, None), "beta: expected a contiguous tensor"),
        )
    ),
    (
        "linear_factor_",
        (torch.zeros(2, 5, 5), ROWS, *GROUPS[:4], torch.zeros(1).int(), False, torch.tensor([0, 3, 6])),
        r"refused: expected shape \(2,\), got \(1,\)",
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


# factors, x, weights, bias; then beta, alpha, refused
BAD_PAIRS = [
    (([torch.ones(5, 5)], [ROWS, ROWS], [None], [False]), "x: expected 1, as factors has, got 2"),
    (([torch.ones(5, 5)], [ROWS], [], [False]), "weights: expected 1, as factors has, got 0"),
    (([torch.ones(5, 5)], [ROWS], [None], [False, True]), "bias: expected 1, as factors has, got 2"),
    (([torch.ones(5, 5)] * 2, [ROWS, ROWS.int()], [None] * 2, [False] * 2), rf"x\[1\]: {FLOATS} Int"),
    (
        ([torch.ones(5, 5), torch.ones(5, 5)], [ROWS, ROWS], [None] * 2, [False, True]),
        r"factors\[1\]: expected shape \(6, 6\), got \(5, 5\)",
    ),
    (([torch.ones(5, 5)], [ROWS], [torch.ones(6).double()], [False]), r"weights\[0\]: expected Float, got Double"),
]


@pytest.mark.parametrize("fake", [False, True], ids=["real", "fake"])
@pytest.mark.parametrize(("arguments", "message"), BAD_PAIRS)
def test_errors_name_the_pair(arguments, message, fake):
    given = tree_map_only(Tensor, lambda t: t.to("meta"), arguments) if fake else arguments
    with pytest.raises(RuntimeError, match=f"grouped_linear_factor_: {message}"):
        torch.ops.mfac_kernels.grouped_linear_factor_(*given, 1.0, 1.0, None)
    assert all(bool((factor == 1).all()) for factor in arguments[0])


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
    with pytest.raises(RuntimeError, match="dilation: expected at most 2147483647, got 4611686018427387904"):
        ops.conv2d_factor_(torch.zeros(25, 25), torch.zeros(1, 1, 4, 4), 5, dilation=2**62, algorithm="tiles")


def test_an_index_out_of_range():
    counts = torch.zeros(5)
    message = "out of range" if SIMT else "expected 0 to 4, got 5"  # a device assertion has no values to show
    with pytest.raises(RuntimeError, match=f"embedding_factor_: indices: {message}"):
        ops.embedding_factor_(counts, torch.tensor([0, 5]))
    assert not counts.any()
