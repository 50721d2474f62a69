"""The empirical Fisher of a sliding window of gradients, and products with its inverse (M-FAC, dynamic)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from mfac_kernels import ops
from mfac_kernels.fisher import _checks
from mfac_kernels.fisher._cholesky import bounded, cholesky, inverse_lower
from mfac_kernels.fisher._state import check_entries, check_like, copy_into


class FisherWindow:
    """F = damping I + (1/n) sum_i g_i g_i^T over the last ``ngrads`` gradients, and F^-1 x in O(d m).

    Frantar, Kurtic, Alistarh, "M-FAC", NeurIPS 2021, section 3.2 (the dynamic algorithm), with an O(m^2) core in place
    of the paper's O(m^3) one.

    The window holds gradients rounded to ``dtype``; everything is then exact (float64 arithmetic) for *those*
    gradients. A bfloat16 window halves the memory and the time of a step; its F is that of the rounded gradients.

    Args:
        dim: d, the number of coordinates, >= 1.
        ngrads: m, the number of gradients kept, >= 1.
        damping: > 0, in units of a squared gradient entry. Assigning to it later costs O(m^3).
        dtype: storage of the window: float32, float64, bfloat16 or float16. Memory: m d elements and 16 m^2 bytes.
        device: where the window lives and the arithmetic happens.
        normalize: what n is. ``"ngrads"``: m, from the first gradient on (the paper's). ``"seen"``: the gradients held,
            min(seen, m), so that early steps are not m times too long; costs O(m^3) a step until the window is full.

    Raises:
        TypeError, ValueError: an argument outside these ranges.
    """

    def __init__(
        self,
        dim: int,
        ngrads: int = 1024,
        damping: float = 1e-5,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        normalize: Literal["ngrads", "seen"] = "ngrads",
    ) -> None:
        self.dim = _checks.positive_int("dim", dim)
        self.ngrads = _checks.positive_int("ngrads", ngrads)
        self._damping = _checks.positive_float("damping", damping)
        if normalize not in ("ngrads", "seen"):
            raise ValueError(f"normalize: expected 'ngrads' or 'seen', got {normalize!r}")
        self.normalize = normalize
        m = self.ngrads
        self.window = torch.zeros(m, dim, dtype=_checks.floating("dtype", dtype), device=device)
        self.gram = self.window.new_zeros(m, m, dtype=torch.float64)
        self.factor = torch.zeros_like(self.gram)
        self.state = self.window.new_zeros(2, dtype=torch.int64)
        # At least as many as are held, known without asking the device: rows past it are empty and are not read.
        self._most_seen = 0
        self._raised_refusals = 0

    # -- the window ---------------------------------------------------------------------------------------------------

    @property
    def dtype(self) -> torch.dtype:
        return self.window.dtype

    @property
    def device(self) -> torch.device:
        return self.window.device

    @property
    def seen(self) -> int:
        """Gradients accepted since the start. Synchronises with the device."""
        return int(self.state[0])

    @property
    def refused(self) -> int:
        """Gradients refused because they were not finite. Synchronises with the device."""
        return int(self.state[1])

    @property
    def damping(self) -> float:
        return self._damping

    @damping.setter
    def damping(self, value: float) -> None:
        damping = _checks.positive_float("damping", value)
        if damping != self._damping:
            self._damping = damping
            ops.core_refactor_(self.gram, self.factor, self.state, *self._shift)

    def update(self, g: Tensor) -> None:
        """Insert gradient ``g`` (dim,) in place of the oldest.

        Raises:
            ValueError: ``g`` has another shape or device, or (CPU) is not finite in the window's dtype; nothing
                changes. On other devices such a gradient is refused without a synchronisation: :meth:`check` tells.
        """
        self._insert(g)

    def update_ihvp(self, g: Tensor) -> Tensor:
        """Insert ``g`` (dim,) and return F^-1 g (dim,) in ``g``'s dtype: two passes over the window in all.

        The result is F^-1 of the gradient *as stored*, n G^T K^-1 e_newest: no cancellation, whatever the damping.
        Raises as :meth:`update`.
        """
        _, coefficients = self._insert(g)
        return self._combine_newest(coefficients, g.dtype)

    def try_update_ihvp(self, g: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`update_ihvp` that refuses a non-finite ``g`` quietly: returns (F^-1 g, or zeros; accepted).

        ``accepted`` () is a bool tensor on the window's device; nothing synchronises there. Refusals are counted in
        :attr:`refused`.
        """
        accepted, coefficients = self._insert(g, quietly=True)  # which are zero if it was refused
        return self._combine_newest(coefficients, g.dtype), accepted

    def check(self) -> None:
        """Raise ValueError if a gradient has been refused since the last call. Synchronises with the device."""
        refused = self.refused
        new, self._raised_refusals = refused - self._raised_refusals, refused
        if new:
            raise ValueError(f"g: {new} gradients were not finite in {self.dtype} and were refused")

    # -- products with the inverse ------------------------------------------------------------------------------------

    def ihvp(self, x: Tensor) -> Tensor:
        """F^-1 x for ``x`` (dim,) or (k, dim), in ``x``'s shape and dtype: two passes over the window.

        Raises:
            ValueError: another shape or device; on the CPU also non-finite values.
        """
        rows = _checks.vectors("x", x, self.dim, self.device, batch=True)
        _checks.finite("x", rows)
        held = self._held
        weights = self._solve(ops.window_dots(self.window[:held], rows)[0])[:, :held]
        y = ops.window_combine(
            self.window[:held],
            weights.contiguous()[None],
            beta=-1 / self.damping,
            x=rows,
            alpha=1 / self.damping,
            dtype=x.dtype,
        )
        return y.reshape(x.shape)

    def diagonal(self) -> Tensor:
        """diag(F^-1) (dim,), float32 at least, in O(d m^2). Synchronises with the device."""
        held = min(self.seen, self.ngrads)
        n = self.ngrads if self.normalize == "ngrads" else max(1, held)
        lower = cholesky(self._gram(held)[None], self.damping * n)
        grads = self.window[:held]
        return bounded(ops.inverse_diagonal(grads, inverse_lower(lower)[0], self.damping), grads, self.damping, n)

    def element(self, i: int, j: int) -> Tensor:
        """[F^-1]_ij, a 0-dimensional float64 tensor, in O(m^2)."""
        i, j = _checks.index("i", i, self.dim), _checks.index("j", j, self.dim)
        columns = self.window[:, [i, j]].to(torch.float64).mT.contiguous()
        inner = torch.dot(columns[0], self._solve(columns[1:])[0])
        return (float(i == j) - inner) / self.damping

    # -- state --------------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget every gradient."""
        for tensor in self._tensors().values():
            tensor.zero_()
        self._most_seen = self._raised_refusals = 0

    def state_dict(self) -> dict[str, Any]:
        """Everything a bit-for-bit resume needs. The tensors are the live ones, as in torch's state dicts."""
        return self._tensors() | {"damping": self.damping, "normalize": self.normalize}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a :meth:`state_dict`, from any device. Raises as :meth:`check_state_dict`; then nothing changes."""
        self.check_state_dict(state_dict)
        self._damping = float(state_dict["damping"])
        copy_into(self._tensors(), state_dict)
        self._most_seen = self.seen + self.refused  # refusals count: the same rows are read, in the same order
        self._raised_refusals = self.refused
        if self.device.type != "cpu" and not self._keeps_inverse():
            ops.core_refactor_(self.gram, self.factor, self.state, *self._shift)

    def _tensors(self) -> dict[str, Tensor]:
        return {"window": self.window, "gram": self.gram, "factor": self.factor, "state": self.state}

    def check_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raise KeyError for a missing entry, TypeError or ValueError for one that does not fit this window."""
        check_entries("state_dict", self.state_dict(), state_dict)
        check_like("state_dict", self._tensors(), state_dict)
        if state_dict["normalize"] != self.normalize:
            raise ValueError(f"state_dict['normalize']: expected {self.normalize!r}, got {state_dict['normalize']!r}")
        _checks.positive_float("state_dict['damping']", state_dict["damping"])
        if bool((state_dict["state"] < 0).any()):
            raise ValueError(f"state_dict['state']: expected counts >= 0, got {state_dict['state'].tolist()}")

    # -- pieces -------------------------------------------------------------------------------------------------------

    @property
    def _shift(self) -> tuple[float, bool]:
        """K = shift I + S as the core's ops take it: (shift, whether it is per gradient held)."""
        if self.normalize == "seen":
            return self.damping, True
        return self.damping * self.ngrads, False

    @property
    def _held(self) -> int:
        return min(self._most_seen, self.ngrads)

    def _insert(self, g: Tensor, *, quietly: bool = False) -> tuple[Tensor, Tensor]:
        """Both halves of an insert -> (accepted (), K^-1 e_newest (m,))."""
        row = _checks.vectors("g", g, self.dim, self.device, batch=False)[0]
        dots = ops.window_insert_(self.window, self.state, row)
        accepted = dots[0].isfinite()
        if self.device.type == "cpu" and not quietly and not accepted:
            raise ValueError(f"g: expected values that are finite in {self.dtype}, got NaN or infinity")
        coefficients = ops.core_insert_(self.gram, self.factor, self.state, dots, *self._shift)
        self._most_seen += 1
        return accepted, coefficients

    def _combine_newest(self, coefficients: Tensor, dtype: torch.dtype) -> Tensor:
        """n G^T K^-1 e_newest, with n on the device where it depends on what was refused."""
        held = self._held
        n: Tensor | int = self.ngrads
        if self.normalize == "seen":
            n = self.state[0].clamp(max=self.ngrads)
        weights = (coefficients[:held] * n).reshape(1, 1, held)
        return ops.window_combine(self.window[:held], weights, dtype=dtype)[0]

    def _by_age(self) -> Tensor:
        """The slots of the gradients held, the oldest first."""
        seen = self.seen
        return torch.arange(max(0, seen - self.ngrads), seen, device=self.device) % self.ngrads

    def _gram(self, held: int) -> Tensor:
        """G G^T (held, held) in slot order; the core keeps its rows up to date only towards older slots."""
        slots = self._by_age()
        age = torch.empty_like(slots).scatter_(0, slots, torch.arange(held, device=self.device))
        gram = self.gram[:held, :held]
        return torch.where(age[:, None] >= age, gram, gram.mT)

    def _keeps_inverse(self) -> bool:
        """Whether the factor has its inverse beside it, as the core's ops of a GPU, but not of a CPU, keep it."""
        slots = self._by_age()
        halves = self.factor[slots[:, None], slots]
        inverse = halves.tril(-1) + halves.diagonal().reciprocal().diag()
        identity = torch.eye(len(slots), dtype=halves.dtype, device=halves.device)
        # Solves are refined by one step, which squares the difference.
        return bool((inverse @ halves.triu().mT - identity).abs().lt(1e-6).all())

    def _solve(self, b: Tensor) -> Tensor:
        """K^-1 b for rows b (k, held or m) -> (k, m)."""
        padded = torch.nn.functional.pad(b, (0, self.ngrads - b.shape[1]))
        return ops.core_solve(self.factor, self.state, padded.contiguous(), *self._shift)
