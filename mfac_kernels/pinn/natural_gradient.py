"""Energy natural gradient and SPRING by the Gram matrix of residuals' gradients.

With residuals r (m,) and their Jacobian O (m, d), m far below d, both scaled by 1 / sqrt(m), a step is

    ENGD     phi = O^T (O O^T + damping I)^-1 r
    SPRING   phi = mu phi_before + O^T (O O^T + damping I)^-1 (r - mu O phi_before)

(Mueller, Zeinhofer, ICML 2023; Goldshlager, Abrahamsen, Lin, J. Comput. Phys. 2024; both by the m x m matrix as in
Guzman-Cordero et al., 2025.) O O^T is a Gram matrix, in float64, and so is its Cholesky factor; the two products with O
are those of a window of gradients. No d x d matrix and no float64 copy of O is made.
"""

from __future__ import annotations

from torch import Tensor

from mfac_kernels import ops

__all__ = ["spring"]


def spring(jacobian: Tensor, residuals: Tensor, damping: float, mu: float = 0.0, phi: Tensor | None = None) -> Tensor:
    """phi (d,) of jacobian (m, d), rows contiguous, and residuals (m,); with mu = 0 that of ENGD.

    A matrix that cannot be factorised makes the result NaN; nothing waits for the device.
    """
    if jacobian.dim() != 2 or tuple(residuals.shape) != tuple(jacobian.shape[:1]):
        raise ValueError(
            f"residuals: expected shape (m,) with jacobian (m, d), got {tuple(residuals.shape)} and "
            f"{tuple(jacobian.shape)}"
        )
    b = residuals.double().unsqueeze(1)
    before = None if phi is None else phi.unsqueeze(0)
    if before is not None:
        b = b - mu * ops.window_dots(jacobian, before).squeeze(0).mT
    factor, _ = ops.cholesky_factor_ex(ops.gram(jacobian, double_precision=True), damping)
    coefficients = ops.cholesky_solve(factor, b).mT.contiguous().unsqueeze(0)
    return ops.window_combine(jacobian, coefficients, x=before, alpha=mu).squeeze(0)
