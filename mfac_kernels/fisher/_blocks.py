"""The two forms that the inverse of a block-diagonal Fisher takes: b x b blocks (primal), or m x m ones (dual).

Both answer the same questions, for blocks of b columns of G (the last one ragged), n = ngrads:

    primal, b <= m    X_b = (damping I + G_b^T G_b / n)^-1
    dual,   b > m     F_b^-1 = (I - G_b^T K_b^-1 G_b) / damping,   K_b = n damping I + G_b G_b^T = L_b L_b^T
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from mfac_kernels.fisher._cholesky import append_row, bounded, cholesky, each_inverse_lower, inverse_lower, solve
from mfac_kernels.fisher._rows import Rows
from mfac_kernels.ops.static import block_gram, block_inverse, inverse_diagonal
from mfac_kernels.ops.window import window_combine


class PrimalBlocks:
    """X (blocks, b, b) in float32; in float64 for float64 gradients, and once one is appended."""

    def __init__(self, rows: Rows, damping: float, ngrads: int) -> None:
        self._rows, self._damping, self._ngrads = rows, damping, ngrads
        parts = [self._invert(page, a) for a, _, page in rows.pages()]
        self._inverse = parts[0] if len(parts) == 1 else torch.cat(parts)
        self._dtype = self._inverse.dtype

    def ihvp(self, x: Tensor) -> Tensor:
        """x (k, dim) -> (k, dim)."""
        padded = self._by_block(x.to(self._inverse.dtype))
        y = torch.bmm(padded, self._inverse)
        return y.transpose(0, 1).flatten(1)[:, : self._rows.dim].to(x.dtype)

    def diagonal(self) -> Tensor:
        return self._inverse.diagonal(dim1=1, dim2=2).reshape(-1)[: self._rows.dim].to(self._dtype, copy=True)

    def elements(self, i: Tensor, j: Tensor) -> Tensor:
        """Entries (i, j) of blocks that i and j share; meaningless where they do not."""
        b = self._rows.block_size
        return self._inverse[i // b, i % b, j % b].to(torch.float64)

    def group_submatrices(self, index: Tensor) -> Tensor:
        """Entries at index x index for each group (q, k); meaningless across blocks."""
        b = self._rows.block_size
        within = index % b
        return self._inverse[index[:, :, None] // b, within[:, :, None], within[:, None]].double()

    def free_part(self, values: Tensor, free: Tensor) -> Tensor:
        """-F_PP^-1 F_PQ v_Q on the free coordinates P, zero on the others Q: values (1, dim), zero on P -> (1, dim)."""
        b = self._rows.block_size
        dots = self._rows.dots(values)
        parts = []
        for a, stop, page in self._rows.pages(free):
            first, blocks = a // b, -(-(stop - a) // b)
            g = page.double()
            inverse, info = block_inverse(g, b, self._damping, float(self._ngrads))
            _raise_if_failed(info, first, self._damping)
            product = window_combine(g, dots[first : first + blocks], beta=-1 / self._ngrads, block_size=b)
            padded = torch.nn.functional.pad(product[0], (0, blocks * b - (stop - a))).view(blocks, b, 1)
            parts.append(torch.bmm(inverse, padded).view(-1)[: stop - a])
        return torch.cat(parts)[None]

    def append(self, g: Tensor) -> None:
        """Sherman-Morrison, the paper's recursion step in its b x b form: O(d b).

        In float64: from I / damping down to the inverse of a full Fisher all but the last digits cancel.
        """
        self._rows.append(g)
        self._inverse = self._inverse.double()
        row = self._by_block(g.to(self._inverse.dtype)[None])
        v = torch.bmm(row, self._inverse)
        q = self._ngrads + torch.bmm(row, v.mT)
        self._inverse = self._inverse - v.mT @ (v / q)

    def _by_block(self, x: Tensor) -> Tensor:
        """(k, dim) -> (blocks, k, b), zero-padded."""
        b, blocks = self._rows.block_size, self._rows.block_count
        padded = torch.nn.functional.pad(x, (0, blocks * b - x.shape[1]))
        return padded.reshape(len(x), blocks, b).transpose(0, 1)

    def _invert(self, page: Tensor, first_column: int) -> Tensor:
        b = self._rows.block_size
        inverse, info = block_inverse(page, b, self._damping, float(self._ngrads))
        if bool((info < 0).any()):
            raise ValueError("grads: expected finite values, got NaN or infinity")
        # Float32 may lose a nearly singular block that float64 keeps.
        for k in info.nonzero()[:, 0].tolist():
            columns = page[:, k * b : (k + 1) * b].contiguous().to(torch.float64)
            again, failed = block_inverse(columns, b, self._damping, float(self._ngrads))
            _raise_if_failed(failed, first_column // b + k, self._damping)
            inverse[k] = again[0]
        return inverse


class DualBlocks:
    """L (blocks, m, m) in float64, and optionally the paper's vectors V."""

    def __init__(self, rows: Rows, damping: float, ngrads: int) -> None:
        self._rows, self._damping, self._ngrads = rows, damping, ngrads
        self._lower = cholesky(gram_of(rows), damping * ngrads)
        self._vectors: Rows | None = None

    def ihvp(self, x: Tensor) -> Tensor:
        """x (k, dim) -> (k, dim)."""
        weights = solve(self._lower, self._rows.dots(x).mT).mT
        return self._rows.subtract(x, weights, self._damping)

    def diagonal(self) -> Tensor:
        b, parts, last = self._rows.block_size, [], -1
        transforms = each_inverse_lower(self._lower)
        for a, stop, page in self._rows.pages():
            entries = []
            for start in range(0, stop - a, b):
                if (a + start) // b > last:  # one block alone may be cut into pages
                    transform, last = next(transforms), last + 1
                entries.append(inverse_diagonal(page[:, start : start + b], transform, self._damping))
            parts.append(bounded(torch.cat(entries), page, self._damping, self._ngrads))
        return torch.cat(parts)

    def elements(self, i: Tensor, j: Tensor) -> Tensor:
        """Entries (i, j) of blocks that i and j share; meaningless where they do not."""
        return (i == j).double() / self._damping - (self._whitened(i) * self._whitened(j)).sum(0)

    def group_submatrices(self, index: Tensor) -> Tensor:
        """Entries at index x index for each group (q, k); meaningless across blocks."""
        q, k = index.shape
        w = self._whitened(index.reshape(-1))
        w = w.view(len(w), q, k).transpose(0, 1)
        product = w.mT @ w
        same = (index[:, :, None] == index[:, None]).double()
        inverse: Tensor = same / self._damping - product
        return inverse.tril() + inverse.tril(-1).mT  # the halves of a product may round differently

    def free_part(self, values: Tensor, free: Tensor) -> Tensor:
        """-F_PP^-1 F_PQ v_Q on the free coordinates P, anything on the others Q: values (1, dim), zero on P.

        By the push-through identity -G_P^T (n damping I + G_P G_P^T)^-1 G_Q v_Q: m x m, however many are fixed. If
        these are few, G_P G_P^T is what they leave of G G^T.
        """
        shift = self._damping * self._ngrads
        if 2 * int(free.sum()) > self._rows.dim:
            gram = self._lower @ self._lower.mT - gram_of(self._rows, ~free)
            gram.diagonal(dim1=1, dim2=2).sub_(shift)
        else:
            gram = gram_of(self._rows, free)
        lower = cholesky(gram, shift)
        weights = solve(lower, self._rows.dots(values).mT).mT
        return self._rows.subtract(torch.zeros_like(values), weights, 1.0)

    def append(self, g: Tensor) -> None:
        """One more row of L in O(m^2) a block, after one pass for its Gram row; of V by the paper's recursion step."""
        if self._vectors is not None:
            self._vectors.append(self.ihvp(g.to(self._vectors.dtype)[None])[0])
        self._rows.append(g)
        dots = self._rows.dots(g[None])[:, 0]
        self._lower = append_row(self._lower, dots, self._damping * self._ngrads)

    def vectors(self) -> tuple[Tensor, Tensor]:
        """(V (m, dim), q (blocks, m))."""
        return vectors_of(self._rows, self._lower, self._damping), _q(self._lower, self._damping)

    def keep_vectors(self) -> None:
        """Form V (m, dim) once; entries then cost O(m)."""
        v, _ = self.vectors()
        self._vectors = Rows(v, self._rows.device, self._rows.block_size, None)

    def _whitened(self, index: Tensor) -> Tensor:
        """W (m, k) with [F^-1]_ij = delta_ij / damping - W_i . W_j for i and j in one block."""
        blocks = index // self._rows.block_size
        if self._vectors is not None:
            q = _q(self._lower, self._damping)[blocks].mT
            whitened: Tensor = self._vectors.columns(index) / q.sqrt()
            return whitened
        order = blocks.argsort(stable=True)
        columns, start = self._rows.columns(index[order]), 0
        present, counts = torch.unique_consecutive(blocks[order], return_counts=True)
        for block, count in zip(present.tolist(), counts.tolist(), strict=True):
            mine = columns[:, start : start + count]
            mine.copy_(torch.linalg.solve_triangular(self._lower[block], mine, upper=False))
            start += count
        scaled: Tensor = torch.empty_like(columns)
        scaled[:, order] = columns / self._damping**0.5
        return scaled


def gram_of(rows: Rows, keep: Tensor | None = None) -> Tensor:
    """G_b G_b^T for each block, over the columns ``keep`` -> (blocks, m, m) float64.

    ValueError if the gradients are not finite.

    In float64 whatever the gradients' dtype: an error of K is amplified by |g|^2 / (n damping) in every product that
    follows.
    """
    if keep is None:
        pages: Iterator[tuple[int, Tensor]] = ((min(rows.block_size, b - a), g) for a, b, g in rows.pages())
    else:
        pages = rows.compact_pages(keep)
    grams = [block_gram(page, width, double_precision=True) for width, page in pages]
    gram = torch.cat(grams) if rows.block_count > 1 and len(grams) > 1 else sum(grams[1:], grams[0])
    if not bool(gram.diagonal(dim1=1, dim2=2).isfinite().all()):  # |g_i . g_j| is at most what stands there
        raise ValueError("grads: expected finite values, got NaN or infinity")
    return gram


def vectors_of(rows: Rows, lower: Tensor, damping: float) -> Tensor:
    """The paper's V (m, dim): v_i = sqrt(q_i / damping) (L^-1 G)_i for each block, in float32 at least."""
    dtype = torch.promote_types(rows.dtype, torch.float32)
    scale = (_q(lower, damping) / damping).sqrt()[:, :, None]
    transform = (scale * inverse_lower(lower)).to(dtype)
    out = torch.empty(rows.count, rows.dim, dtype=dtype, device=rows.device)
    for a, stop, page in rows.pages():
        for start in range(a, stop, rows.block_size):
            end = min(start + rows.block_size, stop)
            block = transform[start // rows.block_size]
            torch.mm(block, page[:, start - a : end - a].to(dtype), out=out[:, start:end])
    return out


def _raise_if_failed(info: Tensor, first: int, damping: float) -> None:
    """LinAlgError if a block has failed, ``first`` being the number of the first one."""
    for k in info.nonzero()[:1, 0].tolist():
        raise LinAlgError(
            f"block {first + k}: not positive definite at damping {damping:g}: "
            f"its leading minor of order {int(info[k])} is not positive"
        )


def _q(lower: Tensor, damping: float) -> Tensor:
    """The paper's q_i = n + g_i^T v_i = L_ii^2 / damping -> (blocks, m)."""
    return lower.diagonal(dim1=1, dim2=2).square() / damping
