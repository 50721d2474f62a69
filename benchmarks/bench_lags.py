"""The compressed form of a 3x3 stride-1 convolution's factor against unfold and a matrix product.

Gates: 20x for 64 to 256 channels, 12x for 512, on a CPU whose torch.mm reaches 40% of its peak. Each case is timed by
both ways; that `"auto"` is the faster one is the last column's matter.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mfac_kernels import ops

LAYERS = [  # samples, channels, size: ResNet-50's stages at batch 32, ResNet-20's at 128
    (32, 64, 56),
    (32, 128, 28),
    (32, 256, 14),
    (32, 512, 7),
    (32, 64, 32),
    (32, 256, 32),
    (32, 512, 16),
    (128, 16, 32),
    (128, 64, 8),
]


def plain(x: Tensor) -> Tensor:
    patches = F.unfold(x, 3, padding=1).transpose(1, 2).reshape(-1, 9 * x.shape[1])
    return patches.mT @ patches


@pytest.mark.parametrize(("n", "c", "size"), LAYERS)
def test_conv_lags(race, device, n, c, size):
    x = torch.randn(n, c, size, size, device=device, generator=torch.Generator(device).manual_seed(0))
    state = torch.zeros(ops.conv2d_lags_size(c, 3, padding=1), device=device)
    factor, want = torch.empty(9 * c, 9 * c, device=device), plain(x)

    def ours(algorithm: str) -> None:
        ops.conv2d_lags_(state, x, 3, padding=1, beta=0.0, algorithm=algorithm)

    algorithms = ("lags", "fft") if device == "cpu" else ("lags",)
    for algorithm in algorithms:
        ours(algorithm)
        ops.conv2d_expand_(factor, state, 3, padding=1)
        assert float((factor - want).norm() / want.norm()) <= 2e-6
    gate = 12.0 if c == 512 else 20.0 if c >= 64 else None
    race(
        "conv_lags_",
        f"N={n} C={c} {size}x{size}",
        lambda: ours("auto"),
        {"unfold + mm": lambda: plain(x)} | {algorithm: partial(ours, algorithm) for algorithm in algorithms},
        gates={"unfold + mm": gate} if gate else None,
    )
