"""Factors of a convolution's inputs, by its module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from mfac_kernels import ops

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
TransposedConvolution = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d

_OPS = {1: ops.conv1d_factor_, 2: ops.conv2d_factor_, 3: ops.conv3d_factor_}


def factor_op(module: Convolution | TransposedConvolution) -> Callable[..., Tensor | None]:
    """The op for the module's number of dimensions."""
    return _OPS[len(module.kernel_size)]


def input_factor_(module: Convolution | TransposedConvolution, factor: Tensor, x: Tensor, **how: Any) -> Tensor | None:
    """``factor_op`` of the inputs, with the module's geometry and padding; ``how``: the arguments beside these.

    Of a transposed convolution, for x in the place of its outputs.
    """
    padding: Any = module.padding
    if module.padding_mode != "zeros":
        x = F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode)
        padding = 0
    geometry: dict[str, Any] = {"stride": module.stride, "padding": padding, "dilation": module.dilation}
    return factor_op(module)(factor, x, module.kernel_size, **geometry, groups=module.groups, **how)
