"""The empirical Fisher of a fixed set of gradients, and queries to its inverse (M-FAC, static)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mfac_kernels.fisher import _checks
from mfac_kernels.fisher._blocks import DualBlocks, PrimalBlocks
from mfac_kernels.fisher._rows import Rows

_GROUP_ELEMENTS = 1 << 22  # in float64, of the columns of a page of groups


class StaticFisher:
    """F = damping I + (1/n) sum_i g_i g_i^T over given gradients: F^-1 x in O(d m), single entries in O(m^2) or O(m).

    Frantar, Kurtic, Alistarh, "M-FAC", NeurIPS 2021, section 3.1 (the static algorithm). The paper's recursion
    (v_i, q_i) is a triangular transform of the gradients: with K = n damping I + G G^T = L L^T,

        q_i = L_ii^2 / damping,    v_i = sqrt(q_i / damping) (L^-1 G)_i,

    so the precomputation is one Gram matrix and one Cholesky factorisation, and F^-1 x = (x - G^T K^-1 G x) / damping
    needs no V at all. The gradients are kept by reference: there is no second m x d array unless ``keep_vectors`` asks
    for one, and the gradients must not change afterwards (a change made in place, anywhere in their storage, is
    detected). Extra memory: 16 m^2 bytes a block, and one page of columns where gradients are streamed to another
    device.

    With ``block_size`` b the coordinates are cut into blocks of b (the last one ragged) with an independent Fisher
    each: F is then the masked, block-diagonal one. For b <= m each block is formed and inverted directly (b^2 elements
    a block in float32, float64 for float64 gradients or once one is appended); for b > m as above, block by block.

    Accuracy: products and entries are computed in float64 and rounded once, whatever the dtype of the gradients; the
    diagonal, and blocks with b <= m, in float32 (float64 for float64 gradients).

    Args:
        grads: (m, d), rows contiguous, float32, float64, bfloat16 or float16, finite. m may be 0 with ``ngrads`` given.
        damping: > 0, in units of a squared gradient entry.
        block_size: b, or None for one block.
        ngrads: n, what the sum is divided by; default m. It stays as it is when gradients are appended: to build
            a Fisher of n gradients one at a time, start from an empty (0, d) and ``ngrads=n``.
        device: where the arithmetic happens; default ``grads.device``. Gradients elsewhere stream through it in pages.
        page_size: columns a page; default all where ``grads`` is on ``device``, else about 2^26 elements.
        keep_vectors: keep V (m, d) in ``grads``' dtype (float32 at least): entries then cost O(m) each.

    Raises:
        TypeError, ValueError: an argument outside these ranges, or gradients that are not finite.
    """

    def __init__(
        self,
        grads: Tensor,
        damping: float = 1e-5,
        *,
        block_size: int | None = None,
        ngrads: int | None = None,
        device: torch.device | str | None = None,
        page_size: int | None = None,
        keep_vectors: bool = False,
    ) -> None:
        if not isinstance(grads, Tensor):
            raise TypeError(f"grads: expected a tensor of shape (m, d), got {type(grads).__name__}")
        _checks.floating("grads", grads.dtype)
        if grads.dim() != 2 or grads.shape[1] == 0 or (grads.shape[0] == 0 and ngrads is None):
            raise ValueError(f"grads: expected shape (m, d) with m >= 1 and d >= 1, got {tuple(grads.shape)}")
        if grads.shape[1] > 1 and grads.stride(1) != 1:
            raise ValueError(f"grads: expected contiguous rows, got stride {grads.stride(1)}")
        self.damping = _checks.positive_float("damping", damping)
        self.ngrads = _checks.positive_int("ngrads", grads.shape[0] if ngrads is None else ngrads)
        self.dim = grads.shape[1]
        size = self.dim if block_size is None else _checks.positive_int("block_size", block_size)
        if page_size is not None:
            _checks.positive_int("page_size", page_size)
        self._source = grads.detach()  # kept by reference: a change must not pass unseen
        self._version = _version(self._source)
        self._count = grads.shape[0]
        primal = min(size, self.dim) <= max(self.ngrads, grads.shape[0])
        self._rows = Rows(
            self._source,
            grads.device if device is None else torch.empty(0, device=device).device,
            size,
            page_size,
            whole_blocks=primal,
        )
        if primal and keep_vectors:
            raise ValueError(
                f"keep_vectors: expected blocks wider than the {self.ngrads} gradients (narrower ones hold their "
                f"entries themselves), got block_size {self._rows.block_size}"
            )
        form = PrimalBlocks if primal else DualBlocks
        self._blocks = form(self._rows, self.damping, self.ngrads)
        if keep_vectors and isinstance(self._blocks, DualBlocks):
            self._blocks.keep_vectors()

    @property
    def block_size(self) -> int:
        """Columns of a block; ``dim`` if there is one block."""
        return self._rows.block_size

    @property
    def device(self) -> torch.device:
        """Where the arithmetic happens."""
        return self._rows.device

    @property
    def count(self) -> int:
        """Gradients held: those given and those appended."""
        return self._count

    # -- products and entries -----------------------------------------------------------------------------------------

    def ihvp(self, x: Tensor) -> Tensor:
        """F^-1 x for ``x`` (dim,) or (k, dim), in ``x``'s shape and dtype.

        Raises:
            ValueError: another shape or device; on the CPU also non-finite values.
            RuntimeError: the gradients were changed in place.
        """
        rows = _checks.vectors("x", x, self.dim, self._rows.device, batch=True)
        _checks.finite("x", rows)
        self._check_unchanged()
        return self._blocks.ihvp(rows).reshape(x.shape)

    def diagonal(self) -> Tensor:
        """diag(F^-1) (dim,), float32 at least. O(d m^2) for wide blocks, nothing of size m x d is written."""
        self._check_unchanged()
        return self._blocks.diagonal()

    def element(self, i: int, j: int) -> Tensor:
        """[F^-1]_ij, a 0-dimensional float64 tensor."""
        pair = [_checks.index("i", i, self.dim), _checks.index("j", j, self.dim)]
        rows, cols = torch.tensor(pair, device=self._rows.device)[:, None]
        return self.elements(rows, cols)[0]

    def elements(self, rows: Tensor, cols: Tensor) -> Tensor:
        """[F^-1] at the pairs (rows[k], cols[k]): two index tensors (k,) -> (k,) float64.

        Raises:
            TypeError, ValueError, IndexError: not integers, unequal shapes, out of range.
        """
        i = _checks.indices("rows", rows, self.dim, self._rows.device)
        j = _checks.indices("cols", cols, self.dim, self._rows.device)
        if i.shape != j.shape:
            raise ValueError(f"cols: expected shape {tuple(i.shape)}, as rows has, got {tuple(j.shape)}")
        self._check_unchanged()
        same_block = i // self.block_size == j // self.block_size
        return torch.where(same_block, self._blocks.elements(i, j), 0.0)

    def submatrix(self, index: Tensor) -> Tensor:
        """[F^-1] at ``index`` x ``index``: (k,) -> (k, k) float64, zero across blocks. Raises as :meth:`elements`."""
        i = _checks.indices("index", index, self.dim, self._rows.device)
        return self.group_submatrices(i[None])[0]

    def group_submatrices(self, index: Tensor) -> Tensor:
        """[F^-1]_QQ of many groups Q of coordinates: ``index`` (q, k) -> (q, k, k) float64, zero across blocks.

        O(m^2) an index for wide blocks, in pages of groups; groups of neighbours are the fastest. Raises as
        :meth:`elements`.
        """
        if isinstance(index, Tensor) and index.dim() != 2:
            raise ValueError(f"index: expected shape (q, k), got {tuple(index.shape)}")
        flat = index.reshape(-1) if isinstance(index, Tensor) else index
        groups = _checks.indices("index", flat, self.dim, self._rows.device).reshape(index.shape)
        self._check_unchanged()
        q, k = groups.shape
        out = torch.empty(q, k, k, dtype=torch.float64, device=groups.device)
        size = max(1, _GROUP_ELEMENTS // max(1, k * max(k, self.count)))
        for start in range(0, q, size):
            page = groups[start : start + size]
            block = page // self.block_size
            same = block[:, :, None] == block[:, None]
            out[start : start + size] = torch.where(same, self._blocks.group_submatrices(page), 0.0)
        return out

    def constrained_minimum(self, values: Tensor, fixed: Tensor) -> Tensor:
        """The y (dim,) that minimises y^T F y with y = ``values`` (dim,) where ``fixed`` (dim,), bool, is true.

        With Q the fixed coordinates and P the free ones, F_PP is the Fisher of the gradients G_P, so that

            y_P = -F_PP^-1 F_PQ v_Q = -G_P^T (n damping I + G_P G_P^T)^-1 G_Q v_Q:

        exact, at the cost of constructing the Fisher once more in float64, at most, however many coordinates are fixed.
        Rounded to ``values``' dtype (float32 at least).

        Raises:
            TypeError, ValueError: other shapes, dtypes or devices; on the CPU also non-finite values.
            RuntimeError: the gradients were changed in place.
        """
        v = _checks.vectors("values", values, self.dim, self._rows.device, batch=False)
        _checks.finite("values", v)
        if not isinstance(fixed, Tensor) or fixed.dtype != torch.bool:
            raise TypeError(f"fixed: expected a bool tensor, got {getattr(fixed, 'dtype', type(fixed).__name__)}")
        if fixed.shape != (self.dim,) or fixed.device != v.device:
            raise ValueError(
                f"fixed: expected shape ({self.dim},) on {v.device}, got {tuple(fixed.shape)} on {fixed.device}"
            )
        self._check_unchanged()
        v = v.to(torch.promote_types(v.dtype, torch.float32))
        free = self._blocks.free_part(torch.where(fixed, v, 0), ~fixed)
        return torch.where(fixed, v, free)[0].to(v.dtype)

    def vectors(self) -> tuple[Tensor, Tensor]:
        """The paper's recursion in closed form: V (m, dim), float32 at least, and q (blocks, m) float64.

        F^-1 = I / damping - sum_i v_i v_i^T / q_i for each block. A new m x d array.

        Raises:
            ValueError: blocks are no wider than n; their inverses are held instead.
        """
        if not isinstance(self._blocks, DualBlocks):
            raise ValueError(
                f"vectors: expected blocks wider than the {self.ngrads} gradients, got block_size {self.block_size}"
            )
        self._check_unchanged()
        return self._blocks.vectors()

    def append(self, g: Tensor) -> None:
        """Add (1/n) g g^T to F for one more gradient ``g`` (dim,), n = ``ngrads``: the paper's recursion step, O(d m).

        Raises:
            ValueError: another shape or device, or not finite in the gradients' dtype; nothing changes.
        """
        row = _checks.vectors("g", g, self.dim, self._rows.device, batch=False)[0]
        row = row.to(self._rows.dtype)
        if not bool(row.isfinite().all()):
            raise ValueError(f"g: expected values that are finite in {row.dtype}, got NaN or infinity")
        self._check_unchanged()
        self._blocks.append(row)
        self._count += 1

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._version = _version(self._source)  # of a copy, which counts from its own beginning

    def _check_unchanged(self) -> None:
        if _version(self._source) != self._version:
            raise RuntimeError(
                "grads: expected the gradients given at construction, got ones that were changed in place since; "
                "construct a new StaticFisher"
            )


def _version(t: Tensor) -> int:
    """Counts changes in place; torch does not count those of tensors made in inference mode."""
    return 0 if t.is_inference() else t._version
