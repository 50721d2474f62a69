"""Layers, correlated inputs for them, their rows x_t as a layer's Hessian has them, and what it is held to.

Bound. A sum of T products in precision eps is off by at most T eps sum |x_i x_j| (Higham, Accuracy and Stability of
Numerical Algorithms, section 3.1), which is at most T eps sqrt(H_ii H_jj).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mfac_kernels.pruning import LayerHessian
from mfac_kernels.reference.kronecker import patches

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
EPS = {dtype: torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps for dtype in DTYPES}


class Conv1D(nn.Module):
    """As that of the transformers library: a linear layer whose weight is stored (inputs, outputs)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(nx, nf)), nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight)
        return rows.view(*x.shape[:-1], self.weight.shape[1])


Conv1D.__module__, Conv1D.__qualname__ = "transformers.pytorch_utils", "Conv1D"


LAYERS = {
    "linear": (lambda: nn.Linear(12, 7), (3, 12)),
    "sequence": (lambda: nn.Linear(12, 7, bias=False), (2, 5, 12)),
    "one": (lambda: nn.Linear(1, 1), (4, 1)),
    "row": (lambda: nn.Linear(12, 7), (12,)),
    "transposed": (lambda: Conv1D(7, 12), (2, 5, 12)),
    "conv1d": (lambda: nn.Conv1d(3, 6, 4, stride=2, padding=1), (2, 3, 11)),
    "conv2d": (lambda: nn.Conv2d(3, 6, 3, padding=1), (2, 3, 6, 5)),
    "image": (lambda: nn.Conv2d(3, 6, 3), (3, 6, 5)),
    "same": (lambda: nn.Conv2d(3, 6, (3, 2), padding="same", dilation=(1, 2)), (2, 3, 6, 5)),
    "reflect": (lambda: nn.Conv2d(3, 6, 3, padding=(2, 1), padding_mode="reflect"), (2, 3, 6, 5)),
    "grouped": (lambda: nn.Conv2d(6, 8, 3, stride=2, groups=2), (2, 6, 7, 5)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, padding=1), (2, 4, 6, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 4, (1, 2, 3), padding=1), (2, 2, 3, 4, 5)),
}


def layer(kind: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    module = LAYERS[kind][0]()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        module.weight.copy_(torch.randn(module.weight.shape, generator=generator) / 3)
    return module.to(dtype)


def inputs(kind: str, dtype: torch.dtype = torch.float64, count: int | None = None, seed: int = 0) -> Tensor:
    """A batch, of ``count`` samples if given; neighbours in its last dimension are correlated."""
    shape = LAYERS[kind][1]
    shape = shape if count is None else (count, *shape[1:])
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (x + 0.8 * x.roll(1, -1) + 0.3).to(dtype)


def rows(module: nn.Module, x: Tensor) -> Tensor:
    """(groups, tokens, columns) in float64."""
    x = x.double()
    if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return x.reshape(1, -1, x.shape[-1])
    x = x if x.dim() == module.weight.dim() else x[None]
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    none = [(0, 0)] * len(module.kernel_size)
    columns = patches(x, module.kernel_size, module.stride, none, module.dilation)
    n, channels, offsets, positions = columns.shape
    columns = columns.reshape(n, module.groups, channels // module.groups * offsets, positions)
    return columns.permute(1, 0, 3, 2).flatten(1, 2)


def weight_rows(module: nn.Module) -> Tensor:
    """A copy of the weight as (groups, rows, columns), in float64."""
    weight = module.weight.detach().double().clone()
    if isinstance(module, Conv1D):
        return weight.T[None]
    return weight.flatten(1).unflatten(0, (getattr(module, "groups", 1), -1))


def assert_hessian(got: Tensor, want: Tensor, tokens: int, dtype: torch.dtype) -> None:
    """From so many tokens in ``dtype``; exactly symmetric."""
    got = got.cpu()
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert got.shape == want.shape and torch.equal(got, got.mT)
    size = want.diagonal(dim1=-2, dim2=-1).sqrt()
    assert bool(((got.double() - want).abs() <= tokens * EPS[dtype] * size[..., :, None] * size[..., None, :]).all())


def same_hessians(a: LayerHessian, b: LayerHessian) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)
