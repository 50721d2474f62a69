"""M-FAC as a preconditioner beside any torch optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from mfac_kernels.fisher._state import check_entries, check_like
from mfac_kernels.fisher.window import FisherWindow
from mfac_kernels.preconditioners.base import Hyperparameter, Preconditioner, own_gradients

Mode = Literal["coupled", "decoupled"]


class MFAC(Preconditioner):
    """Replaces gradients by F^-1 g, with F the damped Fisher of the last ``ngrads`` gradients (:class:`FisherWindow`).

    Each step inserts the flattened gradient into the window and preconditions that same gradient:

        g  <- gradient (+ weight_decay * w, coupled) (momentum buffer of it, coupled)
        u  <- F^-1 g             after g has entered the window
        u  <- momentum * u_previous + u (decoupled)
        .grad <- u (+ weight_decay * w, decoupled)

    The optimizer that follows should have no momentum or weight decay of its own unless both are wanted. Gradients may
    be accumulated over several backward passes before ``step()``. With :class:`torch.amp.GradScaler` call
    ``scaler.unscale_(optimizer)`` first. A gradient that is not finite is never inserted and is counted in
    :attr:`skipped`: it stays as it is in ``.grad``, where a GradScaler sees it. One that is finite but too large for a
    float16 window is refused too, and ``.grad`` becomes zero: the step is skipped.

    Args:
        params: parameters, or parameter groups (dicts with a ``"params"`` entry; other entries are not read).
        ngrads: m, gradients kept. Memory: m d elements of ``dtype``.
        damping: > 0; a number, or a function of the step (each change costs O(m^3)).
        momentum: in [0, 1); a number or a function of the step.
        momentum_mode: ``"decoupled"``: on the preconditioned update (the paper's). ``"coupled"``: on the gradient, and
            the averaged gradient enters the window.
        weight_decay: >= 0; a number or a function of the step.
        weight_decay_mode: ``"coupled"``: added to the gradient before it enters the window (the paper's).
            ``"decoupled"``: added to the update, as AdamW does.
        dtype: storage of the window, e.g. ``torch.bfloat16`` for half the memory and time.
        normalize: ``"ngrads"`` or ``"seen"``, see :class:`FisherWindow`.
        per_group: one window for each parameter group instead of one over all parameters.

    Raises:
        TypeError, ValueError: an argument outside these ranges; no parameters; parameters on several devices.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[Mapping[str, Any]],
        ngrads: int = 1024,
        damping: Hyperparameter = 1e-5,
        *,
        momentum: Hyperparameter = 0.0,
        momentum_mode: Mode = "decoupled",
        weight_decay: Hyperparameter = 0.0,
        weight_decay_mode: Mode = "coupled",
        dtype: torch.dtype = torch.float32,
        normalize: Literal["ngrads", "seen"] = "ngrads",
        per_group: bool = False,
    ) -> None:
        super().__init__()
        self.damping, self.momentum, self.weight_decay = damping, momentum, weight_decay
        self.momentum_mode = _mode("momentum_mode", momentum_mode)
        self.weight_decay_mode = _mode("weight_decay_mode", weight_decay_mode)
        self._range("momentum", 1.0)
        self._range("weight_decay", torch.finfo(torch.float32).max)
        groups = _groups(params)
        if not per_group:
            groups = [[p for group in groups for p in group]]
        self._frozen = [p for group in groups for p in group if not p.requires_grad]
        groups = [trained for group in groups if (trained := [p for p in group if p.requires_grad])]
        first = self._at_step("damping")
        self._windows = [_Window(g, ngrads, first, dtype, normalize) for g in groups]

    @property
    def windows(self) -> list[FisherWindow]:
        """The windows: one, or one a group."""
        return [w.fisher for w in self._windows]

    @property
    def skipped(self) -> int:
        """Gradients that were not finite and did not enter their window. Synchronises with the device."""
        return sum(w.fisher.refused for w in self._windows)

    @torch.no_grad()
    def step(self) -> None:
        """Insert the gradients into the window and replace them by F^-1 g.

        A parameter whose ``.grad`` is None counts as a zero gradient and is left alone.

        Raises:
            RuntimeError: a parameter was frozen, unfrozen, resized or moved since construction; a sparse gradient.
            ValueError: a hyper-parameter's function returned a value out of range. Nothing changes in either case.
        """
        momentum = self._range("momentum", 1.0)
        decay = self._range("weight_decay", torch.finfo(torch.float32).max)
        damping = self._at_step("damping")
        if any(p.requires_grad for p in self._frozen):
            raise RuntimeError(
                "MFAC: a parameter that was frozen at construction requires a gradient now, but the window has no "
                "entries for it; construct a new MFAC over the parameters that are trained"
            )
        for window in self._windows:
            window.check_parameters()
        for window in self._windows:
            own_gradients(window.params)
            window.fisher.damping = damping
            self._step_window(window, momentum, decay)
        self.steps += 1

    def _step_window(self, window: _Window, momentum: float, decay: float) -> None:
        held = [i for i, p in enumerate(window.params) if p.grad is not None and p.numel() > 0]
        if not held:
            return
        params = [window.params[i] for i in held]
        grads = [p.grad for p in params if p.grad is not None]
        g = window.gather(held, grads)
        if decay and self.weight_decay_mode == "coupled":
            torch._foreach_add_(window.views(g, held), params, alpha=decay)
        if momentum and self.momentum_mode == "coupled":
            g = torch.add(g, window.buffer, alpha=momentum)
        u, accepted = window.fisher.try_update_ihvp(g)
        asks = g.device.type == "cpu"  # elsewhere it would synchronise
        if asks and not accepted:
            if all(bool(grad.isfinite().all()) for grad in grads):
                torch._foreach_zero_(grads)
            return
        if momentum and self.momentum_mode == "decoupled":
            u = torch.addcmul(u, window.buffer, accepted.to(u.dtype) * momentum)
        averaged = u if self.momentum_mode == "decoupled" else g
        # In place: state_dict's tensors are the live ones.
        window.buffer.copy_(averaged if asks else torch.where(accepted, averaged, window.buffer))
        if decay and self.weight_decay_mode == "decoupled":
            decays = torch._foreach_mul(params, accepted.to(u.dtype) * decay)
            torch._foreach_add_(window.views(u, held), decays)
        if asks:
            torch._foreach_copy_(grads, window.views(u, held))
        else:  # u is zero if g was refused: .grad stays if it is not finite, and becomes u otherwise
            finite = torch.stack([n.to(u.dtype) for n in torch._foreach_norm(grads, float("inf"))]).isfinite().all()
            torch._foreach_mul_(grads, (~finite).to(u.dtype))
            torch._foreach_add_(grads, window.views(u, held))

    def add_param_group(self, group: Mapping[str, Any]) -> None:
        """Not possible: the window's gradients have no entries for new parameters. Raises RuntimeError."""
        raise RuntimeError(
            "MFAC: parameters cannot be added: the gradients in the window have no entries for them; "
            "construct a new MFAC over all parameters"
        )

    def diagnostics(self) -> dict[str, float]:
        """steps; seen: gradients accepted by the first window; skipped: gradients refused, all windows."""
        return {
            "steps": self.steps,
            "seen": self._windows[0].fisher.seen,
            "skipped": self.skipped,
        }

    def state_dict(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "windows": [w.fisher.state_dict() for w in self._windows],
            "momentum_buffers": [w.buffer for w in self._windows],
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        check_entries("state_dict", ("steps", "windows", "momentum_buffers"), state_dict)
        windows, buffers = state_dict["windows"], state_dict["momentum_buffers"]
        if len(windows) != len(self._windows):
            raise ValueError(f"state_dict['windows']: expected {len(self._windows)}, got {len(windows)}")
        for mine, window in zip(self._windows, windows, strict=True):
            mine.fisher.check_state_dict(window)
        check_like("state_dict['momentum_buffers']", [w.buffer for w in self._windows], buffers)
        steps = int(state_dict["steps"])
        for mine, window, buffer in zip(self._windows, windows, buffers, strict=True):
            mine.fisher.load_state_dict(window)
            mine.buffer.copy_(buffer)
        self.steps = steps

    def _range(self, name: str, below: float) -> float:
        value = self._at_step(name)
        if not 0 <= value < below:
            raise ValueError(f"{name}: expected a number in [0, {below}), got {value}")
        return value


class _Window:
    """A FisherWindow over the flattened parameters of a group, and the way in and out of it."""

    def __init__(
        self,
        params: list[Tensor],
        ngrads: int,
        damping: float,
        dtype: torch.dtype,
        normalize: Literal["ngrads", "seen"],
    ) -> None:
        self.params = params
        self._shapes = [p.shape for p in params]
        self._sizes = [p.numel() for p in params]
        self._device = params[0].device
        self.fisher = FisherWindow(
            sum(self._sizes), ngrads, damping, dtype=dtype, device=self._device, normalize=normalize
        )
        # The flat gradient is float32 unless the window itself is float64: 16-bit windows round it on entry.
        flat = torch.float64 if dtype == torch.float64 else torch.float32
        self.buffer = torch.zeros(self.fisher.dim, dtype=flat, device=self._device)

    def views(self, flat: Tensor, which: list[int]) -> list[Tensor]:
        """The parts of ``flat`` (dim,) that belong to the parameters ``which``, in their shapes."""
        parts = torch.split(flat, self._sizes)
        return [parts[i].view(self._shapes[i]) for i in which]

    def gather(self, which: list[int], grads: list[Tensor]) -> Tensor:
        """The gradients of the parameters ``which`` as one vector (dim,), zero elsewhere."""
        everything = len(which) == len(self.params)
        flat = torch.empty_like(self.buffer) if everything else torch.zeros_like(self.buffer)
        torch._foreach_copy_(self.views(flat, which), grads)
        return flat

    def check_parameters(self) -> None:
        for i, (p, shape) in enumerate(zip(self.params, self._shapes, strict=True)):
            if not p.requires_grad:
                raise RuntimeError(
                    f"MFAC: parameter {i} of shape {tuple(shape)} no longer requires a gradient, but the window "
                    "has entries for it; construct a new MFAC over the parameters that are trained"
                )
            if p.shape != shape or p.device != self._device:
                raise RuntimeError(
                    f"MFAC: parameter {i}: expected shape {tuple(shape)} on {self._device}, as at construction, "
                    f"got {tuple(p.shape)} on {p.device}"
                )
            if p.grad is not None and p.grad.is_sparse:
                raise RuntimeError(f"MFAC: parameter {i}: expected a dense gradient, got a sparse one")


def _mode(name: str, mode: Mode) -> Mode:
    if mode not in ("coupled", "decoupled"):
        raise ValueError(f"{name}: expected 'coupled' or 'decoupled', got {mode!r}")
    return mode


def _groups(params: Iterable[Tensor] | Iterable[Mapping[str, Any]]) -> list[list[Tensor]]:
    """The parameters by group, checked; at least one requires a gradient."""
    if isinstance(params, Tensor):
        raise TypeError("params: expected an iterable of tensors or groups, got a tensor")
    given = list(params)
    if given and all(isinstance(g, Mapping) for g in given):
        in_groups = [g["params"] for g in given if isinstance(g, Mapping)]
        groups = [[g] if isinstance(g, Tensor) else list(g) for g in in_groups]
    else:
        groups = [given]
    seen: set[int] = set()
    for p in (p for group in groups for p in group):
        if not isinstance(p, Tensor):
            raise TypeError(f"params: expected tensors, got {type(p).__name__}")
        if not p.is_floating_point():
            raise TypeError(f"params: expected floating-point parameters, got {p.dtype}")
        if id(p) in seen:
            raise ValueError("params: expected each parameter once, got one twice")
        seen.add(id(p))
    trained = [p for group in groups for p in group if p.requires_grad]
    if not trained:
        raise ValueError("params: expected at least one parameter that requires a gradient, got none")
    devices = {str(p.device) for p in trained}
    if len(devices) > 1:
        raise ValueError(f"params: expected parameters on one device, got {', '.join(sorted(devices))}")
    return groups
