"""The ops of the compressed form as ops of torch and as Python functions, and what they refuse."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kronecker_cases import DTYPES, factor_dtype, random
from lags_cases import RESNET, WAYS
from torch import Tensor

from mfac_kernels import ops


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fft", WAYS)
def test_opcheck(dtype, fft, device):
    conv = replace(RESNET, channels=4, groups=2, bias=True)
    state = conv.state(factor_dtype(dtype)).to(device)
    flag = torch.zeros(1, dtype=torch.int32, device=device)
    for refused in (None, flag):
        arguments = (state, conv.input(dtype).to(device), *conv.form, 2, True, fft, 0.5, 2.0, refused)
        torch.library.opcheck(torch.ops.mfac_kernels.conv_lags_.default, arguments)
    factor = torch.zeros(2, 19, 19, dtype=state.dtype, device=device)
    torch.library.opcheck(torch.ops.mfac_kernels.conv_expand_.default, (factor, state, *conv.form, 2, True, 0.5, 2.0))


@pytest.mark.filterwarnings("error:Dynamo detected")  # what a graph cannot see: a cache
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_one_graph(dynamic, device):
    def step(factor: Tensor, state: Tensor, x: Tensor) -> None:
        ops.conv2d_lags_(state, x, 3, padding=1, beta=0.9, alpha=0.1)
        ops.conv2d_expand_(factor, state, 3, padding=1)

    x = random((2, 4, 6, 6), torch.float32, 0).to(device)
    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    factors = [torch.zeros(36, 36, device=device) for _ in range(2)]
    states = [torch.zeros(1, 29 * 16, device=device) for _ in range(2)]
    step(factors[0], states[0], x)
    compiled(factors[1], states[1], x)
    assert torch.equal(*factors) and torch.equal(*states)


STATE, X, FACTOR = torch.zeros(1, 29 * 16), torch.zeros(2, 4, 5, 5), torch.zeros(36, 36)
FORM = {"kernel_size": [3, 3], "padding_before": [1, 1], "padding_after": [1, 1], "dilation": [1, 1]}
LAGS = {"state": STATE, "x": X, **FORM, "groups": 1, "bias": False, "fft": False, "beta": 1.0, "alpha": 1.0}
EXPAND = {"factor": FACTOR, "state": STATE, **FORM, "groups": 1, "bias": False, "beta": 0.0, "alpha": 1.0}
FLOATS = "expected float32, float64, bfloat16 or float16, got"
BAD = [
    ("conv_lags_", {"x": X[0]}, r"kernel_size: expected 1 numbers, got 2"),
    ("conv_lags_", {"x": X.int()}, rf"x: {FLOATS} Int"),
    ("conv_lags_", {"kernel_size": [3, 3, 3]}, "kernel_size: expected 1 or 2 numbers, got 3"),
    ("conv_lags_", {"kernel_size": [3, 0]}, "kernel_size: expected at least 1, got 0"),
    ("conv_lags_", {"padding_before": [1, -1]}, "padding_before: expected at least 0, got -1"),
    ("conv_lags_", {"padding_after": [1]}, "padding_after: expected 2 numbers, got 1"),
    ("conv_lags_", {"dilation": [0, 1]}, "dilation: expected at least 1, got 0"),
    ("conv_lags_", {"dilation": [4, 1]}, "kernel_size: expected a kernel that fits into the padded input, got one of"),
    ("conv_lags_", {"groups": 3}, "groups: expected a divisor of 4 channels, got 3"),
    ("conv_lags_", {"groups": 2}, r"state: expected shape \(2, 116\), got \(1, 464\)"),
    ("conv_lags_", {"bias": True}, r"state: expected shape \(1, 501\), got \(1, 464\)"),
    ("conv_lags_", {"state": STATE.double()}, "state: expected Float, got Double"),
    ("conv_lags_", {"state": torch.zeros(116, 2).mT, "groups": 2}, "state: expected a contiguous tensor"),
    ("conv_lags_", {"beta": float("nan")}, "beta: expected a finite number, got nan"),
    ("conv_lags_", {"alpha": float("inf")}, "alpha: expected a finite number, got inf"),
    ("conv_lags_", {"refused": torch.zeros(1)}, "refused: expected Int, got Float"),
    (
        "conv_expand_",
        {"state": STATE[:, :463]},
        r"state: expected the sums of a kernel of 9 offsets, got shape \(1, 463\)",
    ),
    ("conv_expand_", {"state": STATE[0]}, r"state: expected 2 dimensions, got shape \(464,\)"),
    ("conv_expand_", {"state": STATE.half()}, "state: expected Float or Double, got Half"),
    ("conv_expand_", {"groups": 0}, "groups: expected at least 1, got 0"),
    ("conv_expand_", {"factor": FACTOR[1:]}, r"factor: expected shape \(36, 36\), got \(35, 36\)"),
    ("conv_expand_", {"factor": FACTOR.double()}, "factor: expected Float, got Double"),
    ("conv_expand_", {"beta": float("inf")}, "beta: expected a finite number, got inf"),
]


@pytest.mark.parametrize("fake", [False, True], ids=["real", "fake"])
@pytest.mark.parametrize(("name", "changed", "message"), BAD)
def test_errors_name_argument_expected_and_got(name, changed, message, fake):
    arguments = (LAGS | {"refused": None} if name == "conv_lags_" else EXPAND) | changed
    if fake:
        arguments = {key: a.to("meta") if isinstance(a, Tensor) else a for key, a in arguments.items()}
    with pytest.raises(RuntimeError, match=f"{name}: {message}"):
        getattr(torch.ops.mfac_kernels, name)(**arguments)
