"""Gradients as rows, wherever they live, streamed through the computing device by pages of columns."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mfac_kernels.ops.window import window_combine, window_dots

_PAGE_ELEMENTS = 1 << 26
_COPY_ELEMENTS = 1 << 23  # of a page that is copied where it could be a view


class Rows:
    """G (count, dim): the caller's tensor, never copied, and behind it the rows appended since.

    Columns are visited page by page, whole curvature blocks of ``block_size`` columns at a time; one block alone may be
    cut, unless ``whole_blocks``. Where the gradients
    are on the computing device a page is a view; elsewhere a page is all that is copied there at any time.
    """

    def __init__(
        self, grads: Tensor, device: torch.device, block_size: int, page_size: int | None, *, whole_blocks: bool = False
    ) -> None:
        self.dim, self.dtype, self.device = grads.shape[1], grads.dtype, device
        self.block_size = min(block_size, self.dim)
        self._grads = grads
        self._tail = grads.new_empty(0, self.dim)
        self._tail_rows = 0
        if page_size is None:
            local = grads.device == device
            page_size = self.dim if local else _PAGE_ELEMENTS // max(1, grads.shape[0])
        self._unit = 1 if self.block_size == self.dim and not whole_blocks else self.block_size
        self._page_size = self._whole(page_size)

    @property
    def count(self) -> int:
        return self._grads.shape[0] + self._tail_rows

    @property
    def block_count(self) -> int:
        return -(-self.dim // self.block_size)

    def append(self, row: Tensor) -> None:
        """Append a row (dim,), rounded to the gradients' dtype. Room for appended rows grows by doubling."""
        if self._tail_rows == self._tail.shape[0]:
            grown = self._tail.new_empty(max(1, 2 * self._tail_rows), self.dim)
            grown[: self._tail_rows] = self._tail
            self._tail = grown
        self._tail[self._tail_rows] = row
        self._tail_rows += 1

    def columns(self, index: Tensor) -> Tensor:
        """G[:, index] in float64 on the computing device: index (k,) -> (count, k)."""
        picked = [part[:, index.to(part.device)] for part in self._parts]
        return torch.cat(picked).to(self.device, torch.float64)

    def pages(self, keep: Tensor | None = None) -> Iterator[tuple[int, int, Tensor]]:
        """(first column, last column + 1, those columns of all rows on the computing device).

        Columns where ``keep`` (dim,) is false are zero: such pages are copies, and smaller for it.
        """
        size = self._page_size
        if keep is not None:
            size = min(size, self._whole(_COPY_ELEMENTS // max(1, self.count)))
        for a, b in self._ranges(size):
            parts = [self._load(part, a, b) for part in self._parts]
            page = parts[0] if len(parts) == 1 else torch.cat(parts)
            yield a, b, page if keep is None else page * keep[a:b]

    def compact_pages(self, keep: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(width, columns) page by page: the columns where ``keep`` (dim,) is true, moved together within their block.

        Blocks are ``width`` wide there, as the fullest one of the page is, and filled up with zeros.
        """
        size = self._whole(_COPY_ELEMENTS // max(1, self.count))
        for a, b in self._ranges(size):
            index = keep[a:b].nonzero()[:, 0]
            unit = min(self.block_size, b - a)
            blocks = index // unit
            counts = torch.bincount(blocks, minlength=-(-(b - a) // unit))
            width = max(1, int(counts.max()))
            rank = torch.arange(len(index), device=index.device) - (counts.cumsum(0) - counts)[blocks]
            parts = [self._load(part, a, b).index_select(1, index) for part in self._parts]
            page = torch.zeros(self.count, width * len(counts), dtype=self.dtype, device=self.device)
            page[:, blocks * width + rank] = torch.cat(parts)
            yield width, page

    def dots(self, x: Tensor) -> Tensor:
        """X G^T for each curvature block: x (k, dim) -> (blocks, k, count) float64."""
        parts = []
        for part in self._parts:
            pages = [
                window_dots(self._load(part, a, b), x[:, a:b], min(self.block_size, b - a)) for a, b in self._ranges()
            ]
            parts.append(torch.cat(pages) if self.block_count > 1 else torch.stack(pages).sum(0))
        return torch.cat(parts, dim=2)

    def subtract(self, x: Tensor, coefficients: Tensor, damping: float) -> Tensor:
        """(X - C G) / damping for each block, in x's dtype: x (k, dim), C (blocks, k, count) -> (k, dim)."""
        out = torch.empty_like(x)
        for a, b in self._ranges():
            size = min(self.block_size, b - a)
            first = a // self.block_size  # 0 in the case of one block, which a page may cut
            weights = coefficients[first : first + -(-(b - a) // size)]
            page, alpha, row = x[:, a:b], 1 / damping, 0
            for part in self._parts:
                rows = slice(row, row + part.shape[0])
                row = rows.stop
                page = window_combine(
                    self._load(part, a, b),
                    weights[:, :, rows].contiguous(),
                    beta=-1 / damping,
                    x=page,
                    alpha=alpha,
                    dtype=x.dtype if row == self.count else torch.float64,
                    block_size=size,
                )
                alpha = 1.0
            out[:, a:b] = page
        return out

    @property
    def _parts(self) -> list[Tensor]:
        if not self._tail_rows:
            return [self._grads]
        return [self._grads, self._tail[: self._tail_rows]]

    def _whole(self, columns: int) -> int:
        """The columns of a page, at least one block where blocks are not cut."""
        return max(1, columns // self._unit) * self._unit

    def _ranges(self, size: int | None = None) -> Iterator[tuple[int, int]]:
        size = self._page_size if size is None else size
        for start in range(0, self.dim, size):
            yield start, min(start + size, self.dim)

    def _load(self, part: Tensor, start: int, stop: int) -> Tensor:
        return part[:, start:stop].to(self.device, non_blocking=True)
