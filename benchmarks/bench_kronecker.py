"""Kronecker factors against plain torch: linear and channel factors, factors of convolutions of every geometry.

Each result is verified before it is timed. Floor: half of a matrix product's flops, D (D + 1) for each row.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from ceilings import Bound
from torch import Tensor

import mfac_kernels as mk  # noqa: F401  (loads the ops)

BETA = 0.95
_ops = torch.ops.mfac_kernels


def assert_same(got: Tensor, want: Tensor) -> None:
    error = float((got - want).norm() / want.norm())
    assert error <= 1e-5, error


def race_factor(
    race: Callable[..., None],
    kernel: str,
    case: str,
    ours: Callable[[Tensor], object],
    plain: Callable[[], Tensor],
    rows: int,
    gate: float,
) -> None:
    """plain() returns the batch's sum, (D, D) or (groups, D, D); ours adds it to a factor with BETA and 1 - BETA."""
    want = plain()
    factor, other = torch.zeros_like(want), torch.zeros_like(want)
    ours(factor)
    assert_same(factor, want * (1 - BETA))
    size = want.shape[-1]
    race(
        kernel,
        case,
        lambda: ours(factor),
        {"torch": lambda: other.mul_(BETA).add_(plain(), alpha=1 - BETA)},
        gates={"torch": gate},
        bound=Bound(rows * size * (size + 1) * (want.numel() // size**2)),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("rows", "d"), [(65536, 64), (16384, 256), (4096, 768), (4096, 2048)])
def test_linear_factor(race, device, rows, d, dtype):
    x = torch.randn(rows, d, device=device).to(dtype)
    race_factor(
        race,
        "linear factor",
        f"rows={rows} D={d} {str(dtype)[6:]}",
        lambda factor: _ops.linear_factor_(factor, x, None, False, BETA, 1 - BETA, None),
        lambda: (x.mT @ x).float() if dtype == torch.float32 else x.float().mT @ x.float(),
        rows,
        3.2 if d >= 256 else 1.8,
    )


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize(("n", "c", "size"), [(128, 16, 32), (32, 64, 56), (32, 256, 28), (32, 512, 14), (32, 2048, 7)])
def test_channel_factor(race, device, n, c, size, channels_last):
    x = torch.randn(n, c, size, size, device=device)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)

    def plain() -> Tensor:
        rows = x.permute(0, 2, 3, 1).reshape(-1, c)
        return rows.mT @ rows

    race_factor(
        race,
        "channel factor",
        f"N={n} C={c} {size}x{size}{' channels_last' if channels_last else ''}",
        lambda factor: _ops.conv_factor_(
            factor, x, [1, 1], [1, 1], [0, 0], [0, 0], [1, 1], 1, False, False, False, BETA, 1 - BETA, None
        ),
        plain,
        n * size * size,
        3.2 if c >= 256 else 1.8,
    )


CONVOLUTIONS = {  # N, C, H = W, kernel, stride, padding, dilation, groups
    "stride 2": (32, 64, 56, 3, 2, 1, 1, 1),
    "stride 2, wide": (32, 256, 14, 3, 2, 1, 1, 1),
    "dilation 2": (32, 64, 28, 3, 1, 2, 2, 1),
    "5x5": (32, 32, 28, 5, 1, 2, 1, 1),
    "stem 7x7": (32, 3, 112, 7, 2, 3, 1, 1),
    "3x3, few channels": (128, 16, 32, 3, 1, 1, 1, 1),
    "3x3, stride 1": (32, 64, 32, 3, 1, 1, 1, 1),
    "3x3, late stage": (32, 256, 7, 3, 1, 1, 1, 1),
    "32 groups": (32, 256, 28, 3, 1, 1, 1, 32),
    "depthwise": (32, 256, 28, 3, 1, 1, 1, 256),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_conv_factor(race, device, name):
    n, c, size, kernel, stride, padding, dilation, groups = CONVOLUTIONS[name]
    x = torch.randn(n, c, size, size, device=device)

    def plain() -> Tensor:
        columns = F.unfold(x, kernel, dilation, padding, stride)
        rows = columns.permute(1, 0, 2).reshape(groups, columns.shape[1] // groups, -1)
        return (rows @ rows.mT) if groups > 1 else rows[0] @ rows[0].mT

    outputs = (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
    race_factor(
        race,
        f"conv factor, {name}",
        f"N={n} C={c} {size}x{size} k={kernel}",
        lambda factor: _ops.conv_factor_(
            factor,
            x,
            [kernel, kernel],
            [stride, stride],
            [padding, padding],
            [padding, padding],
            [dilation, dilation],
            groups,
            False,
            False,
            False,
            BETA,
            1 - BETA,
            None,
        ),
        plain,
        n * outputs**2,
        4.0,
    )
