"""Two-level K-FAC: K-FAC's step, corrected across layers in a coarse space."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mfac_kernels.fisher._checks import one_of
from mfac_kernels.fisher._state import check_entries
from mfac_kernels.fisher.jacobian import JacobianProduct
from mfac_kernels.preconditioners._coarse_solve import Basis, CoarseMatrix
from mfac_kernels.preconditioners._fisher_batch import FisherBatch
from mfac_kernels.preconditioners._tselepidis import factorized_matrix
from mfac_kernels.preconditioners.base import Hyperparameter
from mfac_kernels.preconditioners.coarse import COARSE_SPACES, Blocks, CoarseSpace, FixedSpace, Nicolaides, Step
from mfac_kernels.preconditioners.kfac import KFAC

Combination = Literal["corrected", "additive", "deflated", "balanced"]
COMBINATIONS = ("corrected", "additive", "deflated", "balanced")
TSELEPIDIS = "tselepidis"


class TwoLevelKFAC(KFAC):
    """K-FAC whose step is corrected by the exact Fisher matrix of the batch, in a few directions across all layers.

        preconditioner = mk.TwoLevelKFAC(model, damping=1e-3, coarse_space="krylov_residual", inv_update_steps=10)
        loss_function(model(x), y).backward()
        preconditioner.step()
        optimizer.step()

    With g the gradient of all layers, M K-FAC's damped inverse, j_n the gradient of sample n, in K-FAC's convention and
    from the same backward passes, F = (1/N) sum_n j_n j_n^T + damping I, and R0 the coarse space's rows,

        F_c = R0 F R0^T        Q = R0^T F_c^-1 R0
        corrected   x = M g + omega Q (g - F M g)
        additive    x = M g + omega Q g
        deflated    ((I - Q F) M + Q) g, which is corrected with omega = 1
        balanced    ((I - Q F) M (I - F Q) + Q) g, symmetric positive definite

    F is never formed and there are no per-sample gradients: products with it are a forward pass of the layers with x
    for their weights and their weights' gradient. F_c is of this batch alone, there is no moving average, and its
    equations are solved in float64. A coarse matrix that is singular, or not finite, leaves K-FAC's step as it is and
    is counted; nothing waits for the device but the eigenvectors of ``"spectral"``, when the inverses are computed.

    F has ``damping`` alone. K-FAC's factored form, (B + b) (x) (A + a) with a b = damping, damps more than that: a
    damping that is good for K-FAC can be too small here. And what inverses miss that are some steps old, the correction
    is too narrow to mend.

    Inputs and output gradients of each layer, or its samples' gradients where these are smaller, are kept from each
    backward pass to the step, every step, whatever ``factor_update_steps``; under ``fisher_type="mc"`` those of
    :meth:`sampling`, which each step then needs. Layers that are not called, or without a row for each sample, keep
    K-FAC's step.

    Args:
        coarse_space: ``"nicolaides"``, ``"residual"``, ``"spectral"``, ``"krylov_nicolaides"``, ``"krylov_residual"``;
            a :class:`CoarseSpace`; or rows: each a list with a block for every layer, in the shape (groups * outputs,
            columns) of its gradient with the bias last. ``"tselepidis"``: M g + omega 1 (F^_c + damping I)^-1 1^T g, in
            which F^_c is the product of two expectations in place of that of the product (Tselepidis et al. 2020).
        omega: of the coarse correction, > 0; 1 with ``"deflated"`` and ``"balanced"``. A number or a function of the
            step.
        combination: as above.
        fisher_batch: the share of the samples that F is of, in (0, 1].

    The others are :class:`KFAC`'s.

    Sources: Koroko et al., "Analysis and comparison of two-level KFAC methods for training deep neural networks", 2023;
    Tselepidis et al., "Two-level K-FAC preconditioning for deep learning", 2020.

    Raises:
        TypeError, ValueError: an argument outside these ranges, a model without a layer to precondition.
    """

    def __init__(
        self,
        model: nn.Module,
        damping: Hyperparameter = 1e-3,
        *,
        coarse_space: str | CoarseSpace | Sequence[Sequence[Tensor]] = "nicolaides",
        omega: Hyperparameter = 1.0,
        combination: Combination = "corrected",
        fisher_batch: float = 1.0,
        **options: Any,
    ) -> None:
        one_of("combination", combination, COMBINATIONS)
        if combination in ("deflated", "balanced") and omega != 1:
            raise ValueError(f'omega: expected 1 with combination "{combination}", got {omega!r}')
        if isinstance(fisher_batch, bool) or not isinstance(fisher_batch, int | float) or not 0 < fisher_batch <= 1:
            raise ValueError(f"fisher_batch: expected a number in (0, 1], got {fisher_batch!r}")
        self._factorized = isinstance(coarse_space, str) and coarse_space == TSELEPIDIS
        if self._factorized and combination != "corrected":
            raise ValueError(f'combination: expected "corrected" with "{TSELEPIDIS}", got {combination!r}')
        self.coarse_space = _coarse_space(coarse_space)
        self.combination, self.omega = combination, omega
        super().__init__(model, damping, **options)
        self._omega()
        rows = None if self._factorized else self.fisher.dtype
        self._batch = FisherBatch(self._layers, self._gatherer.counting, fisher_batch, "TwoLevelKFAC", rows)
        self._gatherer.kept = self._batch
        self._basis: Basis | None = None
        device = self.fisher.refused.device
        self._gain = torch.zeros((), dtype=torch.float64, device=device)
        self._fallbacks = torch.zeros((), dtype=torch.int64, device=device)

    @property
    def gathering(self) -> bool:
        """Whether backward passes before the next step are made use of: in every step."""
        return True

    @property
    def corrects(self) -> bool:
        """Whether the coarse problem is that of the residual of K-FAC's step, or that of the gradient."""
        return self.combination != "additive" and not self._factorized

    @property
    def fisher_batch(self) -> float:
        """As the argument."""
        return self._batch.fraction

    @property
    def coarse_gain(self) -> Tensor:
        """By how much the last step's coarse correction has lowered the squared F-norm of the error x - F^-1 g.

        () float64, on the device. With ``"corrected"``, omega 1, and beta = F_c^-1 R0 (g - F M g) it is
        beta^T F_c beta, never negative; with ``"balanced"`` the same of its last part, with what it corrects for M g.
        """
        return self._gain

    # ---- the step --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self) -> None:
        self._omega()
        super().step()

    def _updates(self, gradients: list[Tensor], refreshed: bool) -> list[Tensor]:
        gradients = [g.to(self.fisher.dtype) for g in gradients]
        update = self.fisher.ihvp(gradients)
        self._gain = torch.zeros_like(self._gain)
        if self._batch.empty and self._ranks.count == 1:
            return update
        device = self.fisher.refused.device
        jacobian = self._batch.jacobian(self._output_scale(), self.fisher.dtype, device)
        if refreshed:
            self._basis = None
        return _Correction(self, jacobian, gradients, update).run()

    def _omega(self) -> float:
        omega = self._at_step("omega")
        if not (omega > 0 and math.isfinite(omega)):
            raise ValueError(f"omega: expected a positive number, got {omega}")
        return omega

    def diagnostics(self) -> dict[str, float]:
        """Also coarse_gain: :attr:`coarse_gain`; coarse_fallbacks: steps whose coarse matrix was singular."""
        own = {"coarse_gain": float(self._gain), "coarse_fallbacks": int(self._fallbacks)}
        return {**super().diagnostics(), **own}

    def state_dict(self) -> dict[str, Any]:
        """After a step and before the next backward pass: what that keeps is of no use to another process.

        Raises:
            RuntimeError: between a backward pass and its step.
        """
        if not self._batch.empty:
            raise RuntimeError("TwoLevelKFAC: state_dict() was called between a backward pass and its step()")
        rows = None if self._basis is None else self._basis.blocks
        own = {"rows": rows, "gain": self._gain, "fallbacks": self._fallbacks}
        return {**super().state_dict(), "coarse": own}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        check_entries("state_dict", ("coarse",), state_dict)
        own = state_dict["coarse"]
        check_entries("state_dict['coarse']", ("rows", "gain", "fallbacks"), own)
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "coarse"})
        rows = own["rows"]
        kept = None if rows is None else [[b.detach().to(self._gain.device) for b in kind] for kind in rows]
        self._basis = None if kept is None else Basis(kept, self.coarse_space.by_layer)
        self._gain = own["gain"].to(self._gain).clone()
        self._fallbacks = own["fallbacks"].to(self._fallbacks).clone()


class _Correction:
    """One step of the coarse level."""

    def __init__(self, owner: TwoLevelKFAC, jacobian: JacobianProduct, gradients: Blocks, update: Blocks) -> None:
        self.owner, self.jacobian, self.gradients, self.update = owner, jacobian, gradients, update
        self.damping = owner.fisher.damping
        self.weights = torch.as_tensor(jacobian.weights, dtype=torch.float64, device=jacobian.device)

    def run(self) -> Blocks:
        owner, ranks, space = self.owner, self.owner._ranks, self.owner.coarse_space
        present = owner._batch.present(self.jacobian.device)
        ranks.average([present])
        seen = self.jacobian.jvp(self.update)  # J M g
        self.basis = owner._basis or Basis(space.rows(self._step(seen)), space.by_layer)
        owner._basis = self.basis if space.of_inverses else None
        self.basis.restrict(present > 0)
        self.columns = self.basis.columns([self.jacobian.layer_jvp(kind) for kind in self.basis.blocks])  # J R0^T
        exact = self.columns.mT @ (self.weights[:, None] * self.columns)
        ranks.average([exact])
        matrix = exact + self.damping * self.basis.gram()
        self.matrix = CoarseMatrix(torch.where(self.basis.finite, matrix, math.nan))

        base = self.update
        right = self.basis.dots(self.gradients)  # R0 g
        if owner.combination == "balanced":
            beta = self.matrix.solve(right)
            coarse = [torch.zeros_like(x) for x in base]
            self.basis.add_to_(coarse, beta, self.matrix.ok)
            rest = self._residual(coarse, self.columns @ beta)  # (I - F Q) g
            base = [torch.where(self.matrix.ok, y, x) for y, x in zip(owner.fisher.ihvp(rest), base, strict=True)]
            seen = self.jacobian.jvp(base)
        left = right - self._coarse_product(base, seen)  # R0 (g - F base)
        solver = CoarseMatrix(self._factorized_matrix()) if owner._factorized else self.matrix
        beta = owner._omega() * solver.solve(left if owner.corrects else right)
        gain = 2 * (beta @ left) - beta @ (self.matrix.matrix @ beta)
        owner._gain = torch.where(gain.isfinite(), gain, 0)
        owner._fallbacks += (~solver.ok).long()
        self.basis.add_to_(base, beta, solver.ok)
        return base

    def _step(self, seen: Tensor) -> Step:
        """What the space's rows are made from; nothing holds it but them."""
        residual = self._residual(self.update, seen) if self.owner.coarse_space.needs_residual else None
        return Step(self.owner.fisher, self.gradients, self.update, residual)

    def _residual(self, x: Blocks, seen: Tensor) -> Blocks:
        """g - F x, given J x."""
        product = self.jacobian.vjp(seen * self.weights)
        self.owner._ranks.average(product)
        for p, g, y in zip(product, self.gradients, x, strict=True):
            p.add_(y, alpha=min(self.damping, torch.finfo(y.dtype).max)).neg_().add_(g)
        return product

    def _coarse_product(self, x: Blocks, seen: Tensor) -> Tensor:
        """R0 F x, given J x."""
        product = self.columns.mT @ (self.weights * seen.double())
        self.owner._ranks.average([product])
        return product + self.damping * self.basis.dots(x)

    def _factorized_matrix(self) -> Tensor:
        matrix = factorized_matrix(self.jacobian, self.owner._batch.positions, self.weights, self.owner._ranks.average)
        return matrix + self.damping * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)


def _coarse_space(given: str | CoarseSpace | Sequence[Sequence[Tensor]]) -> CoarseSpace:
    if isinstance(given, CoarseSpace):
        return given
    if isinstance(given, str):
        if given == TSELEPIDIS:
            return Nicolaides()
        if given not in COARSE_SPACES:
            raise ValueError(
                f"coarse_space: expected one of {', '.join([*COARSE_SPACES, TSELEPIDIS])}, a CoarseSpace or rows, got "
                f"{given!r}"
            )
        return COARSE_SPACES[given]()
    return FixedSpace(given)
