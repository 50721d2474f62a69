"""The compressed form of a stride-1 convolution's factor, in float64, and the factor it stands for.

Images (N, C, H, W). For kernel offsets o, o' the block of the factor is

    A[o, o'][c, c'] = sum_{n, p} x[n, c, p] x[n, c', p + l],    l = dilation (o' - o),

over the pixels p in a rectangle: along an axis with o <= o', p in [before(o), size - |l| - after(o')), where
before(o) = max(0, dilation o - padding) and after(o') = max(0, dilation (kernel - 1 - o') - padding after). Blocks of
the same lag and rectangle are equal: each is kept once, in a slot. Slots are ordered by lag (y, x), y >= 0, the half
plane from (0, 0) on; then by margins along y, then along x, in the order of o.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

Margins = tuple[int, int]
"""Pixels left out at the two ends of an axis."""


def margins(kernel: int, padding: tuple[int, int], dilation: int, lag: int) -> list[Margins]:
    """Of the pairs (o, o + lag), lag >= 0."""
    return [
        (max(0, dilation * o - padding[0]), max(0, dilation * (kernel - 1 - o - lag) - padding[1]))
        for o in range(kernel - lag)
    ]


def slots(
    kernel_size: Sequence[int], padding: Sequence[tuple[int, int]], dilation: Sequence[int]
) -> Iterator[tuple[tuple[int, int], Margins, Margins]]:
    """The lag, in offsets, and the margins along y and x of each slot. padding: (before, after) of each axis."""
    for ly in range(kernel_size[0]):
        for lx in range(1 - kernel_size[1] if ly else 0, kernel_size[1]):
            for y in dict.fromkeys(margins(kernel_size[0], padding[0], dilation[0], ly)):
                for x in dict.fromkeys(margins(kernel_size[1], padding[1], dilation[1], abs(lx))):
                    yield (ly, lx), y, x


def _along(size: int, lag: int, ends: Margins) -> tuple[slice, slice]:
    """Pixels p and p + lag of one axis, lag in pixels."""
    low = slice(ends[0], max(ends[0], size - abs(lag) - ends[1]))
    high = slice(low.start + abs(lag), low.stop + abs(lag))
    return (low, high) if lag >= 0 else (high, low)


def lags(
    x: Tensor,
    kernel_size: Sequence[int],
    *,
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
    groups: int = 1,
    bias: bool = False,
) -> Tensor:
    """(groups, size): the slots, row-major (C, C); with a bias the sums under each offset, (K, C), and their number."""
    n, c, h, w = x.shape
    images = x.double().reshape(n, groups, c // groups, h, w)
    parts = []
    for (ly, lx), y, z in slots(kernel_size, padding, dilation):
        (rows, rows2), (columns, columns2) = _along(h, ly * dilation[0], y), _along(w, lx * dilation[1], z)
        parts.append(
            torch.einsum("ngchw,ngdhw->gcd", images[..., rows, columns], images[..., rows2, columns2]).flatten(1)
        )
    if bias:
        for y in margins(kernel_size[0], padding[0], dilation[0], 0):
            for z in margins(kernel_size[1], padding[1], dilation[1], 0):
                parts.append(images[..., _along(h, 0, y)[0], _along(w, 0, z)[0]].sum((0, 3, 4)))
        outputs = [
            size + sum(p) - d * (k - 1) for size, p, d, k in zip((h, w), padding, dilation, kernel_size, strict=True)
        ]
        parts.append(images.new_full((groups, 1), n * outputs[0] * outputs[1]))
    return torch.cat(parts, 1)


def expand(
    state: Tensor,
    channels: int,
    kernel_size: Sequence[int],
    *,
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
    bias: bool = False,
) -> Tensor:
    """state (groups, size) of `channels` channels a group -> (groups, D, D), columns (channel, offset, bias)."""
    groups, c = len(state), channels
    index = {slot: i for i, slot in enumerate(slots(kernel_size, padding, dilation))}
    offsets = [(i, j) for i in range(kernel_size[0]) for j in range(kernel_size[1])]
    y = [margins(kernel_size[0], padding[0], dilation[0], lag) for lag in range(kernel_size[0])]
    x = [margins(kernel_size[1], padding[1], dilation[1], lag) for lag in range(kernel_size[1])]
    sums = state[:, : len(index) * c * c].reshape(groups, len(index), c, c)
    factor = state.new_zeros(groups, c, len(offsets), c, len(offsets))
    for i, (oy, ox) in enumerate(offsets):
        for j, (oy2, ox2) in enumerate(offsets[i:], i):
            lag = (oy2 - oy, ox2 - ox)
            block = sums[:, index[lag, y[lag[0]][oy], x[abs(lag[1])][min(ox, ox2)]]]
            factor[:, :, i, :, j] = block
            factor[:, :, j, :, i] = block.mT
    d = c * len(offsets)
    dense = factor.reshape(groups, d, d)
    if not bias:
        return dense
    last = state[:, len(index) * c * c :]
    column = last[:, :-1].reshape(groups, len(offsets), c).mT.reshape(groups, d, 1)
    return torch.cat([torch.cat([dense, column], 2), torch.cat([column.mT, last[:, -1:, None]], 2)], 1)
