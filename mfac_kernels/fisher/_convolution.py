"""Factors of a convolution's inputs, by its module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from mfac_kernels import ops

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d

_OPS = {nn.Conv1d: ops.conv1d_factor_, nn.Conv2d: ops.conv2d_factor_, nn.Conv3d: ops.conv3d_factor_}


def factor_op(module: Convolution) -> Callable[..., Tensor | None]:
    """The op for the module's number of dimensions."""
    return next(op for kind, op in _OPS.items() if isinstance(module, kind))


def input_factor_(module: Convolution, factor: Tensor, x: Tensor, **how: Any) -> Tensor | None:
    """``factor_op`` of the inputs, with the module's geometry and padding; ``how``: the arguments beside these."""
    padding: Any = module.padding
    if module.padding_mode != "zeros":
        x = F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode)
        padding = 0
    geometry: dict[str, Any] = {"stride": module.stride, "padding": padding, "dilation": module.dilation}
    return factor_op(module)(factor, x, module.kernel_size, **geometry, groups=module.groups, **how)
