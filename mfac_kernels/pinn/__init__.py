"""Physics-informed networks: forward Laplacians, linearised residuals, and the second-order methods that use them.

forward_laplacian: u, its derivatives and its Laplacian, of an MLP. Condition, linearise: residuals of equations and
boundary conditions, with their Jacobian as products. KFAC: for losses of two conditions. spring: ENGD and SPRING by
the Gram matrix of the residuals' gradients; line_search: what both move by.
"""

from mfac_kernels.pinn.conditions import Condition, Linearisation, Term, linearise, loss_of
from mfac_kernels.pinn.kfac import KFAC
from mfac_kernels.pinn.laplacian import ACTIVATIONS, Sine, forward_laplacian
from mfac_kernels.pinn.natural_gradient import spring
from mfac_kernels.pinn.steps import line_search, move

__all__ = [
    "ACTIVATIONS",
    "KFAC",
    "Condition",
    "Linearisation",
    "Sine",
    "Term",
    "forward_laplacian",
    "line_search",
    "linearise",
    "loss_of",
    "move",
    "spring",
]
