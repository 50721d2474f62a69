"""K-FAC for physics-informed networks: a Kronecker product for the equation, and one for its boundary condition."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from mfac_kernels.fisher._checks import one_of, positive_float
from mfac_kernels.fisher._state import check_like, copy_into
from mfac_kernels.fisher.jacobian import Call
from mfac_kernels.fisher.kronecker import KroneckerFisher, KroneckerShape
from mfac_kernels.fisher.kronecker_sum import KroneckerSum
from mfac_kernels.pinn.conditions import Condition, linear_layers, linearise
from mfac_kernels.pinn.steps import line_search, move, quadratic_minimum

__all__ = ["KFAC"]


class KFAC:
    """An optimizer of half the mean squared residuals of an equation and of a boundary condition.

        net = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 1)).double()
        equation = pinn.Condition(lambda x, u: u[:, -1, 0] + f(x))                   # -Laplacian of u = f
        boundary = pinn.Condition(lambda x, u: u[:, 0, 0], derivatives=False)        # u = 0
        optimizer = pinn.KFAC(net, equation, boundary, damping=1e-6)
        loss = optimizer.step(interior_points, boundary_points)

    With the S = d + 2 rows z_n,s that a layer is given for a point n, and the gradients g_n,s of the point's residual
    with regard to the layer's outputs for these, the layer's block of the Gauss-Newton matrix is near to

        B1 (x) A1 + B2 (x) A2,   A1 = (1 / N S) sum_n,s z z^T,   B1 = (1 / N) sum_n,s g g^T

    and likewise A2 and B2 of the boundary, where S = 1. All four are averaged exponentially, debiased; sqrt(damping) I
    is added to each, and the sum is inverted exactly (:class:`~mfac_kernels.KroneckerSum`).

    The authors' program (f-dangel/kfac-pinns-experiments) has the same factors, inverse, quadratic model and grid of
    the line search, and differs in four things. Its averages begin at zero and are not debiased. What it calls damping
    is added to each factor, and as it is to the quadratic model; here the product of two shifts is the model's damping.
    The momentum of its line search is of directions, v <- momentum v + direction with the step a rate times v; here it
    is of steps, as short as the search has made them. The first step of its KFAC* is 1e-6 times the direction; here it
    is the model's minimum along it.

    Args:
        net: float64; linear layers and :data:`~mfac_kernels.pinn.ACTIVATIONS`.
        equation, boundary: either may have derivatives.
        damping: > 0.
        factor_decay: of the averages, in [0, 1).
        step_rule: ``"quadratic_model"``, the paper's KFAC*: alpha and mu of the step alpha direction + mu (last step)
            minimise the quadratic model with the exact, damped Gauss-Newton matrix of the batch. ``"line_search"``, the
            paper's KFAC but for its momentum: direction + momentum * (last step), as far as :func:`line_search` goes.
        momentum: for the line search, in [0, 1).

    A step waits for the device.

    Source: Dangel, Mueller, Zeinhofer, "Kronecker-factored approximate curvature for physics-informed neural networks",
    NeurIPS 2024.

    Raises:
        TypeError: the network's parameters are not float64, or of layers that have no forward Laplacian.
        torch.linalg.LinAlgError: in a step: the factors are not positive definite at this damping, in float64. The
            parameters are unchanged.
    """

    def __init__(
        self,
        net: nn.Sequential,
        equation: Condition,
        boundary: Condition,
        damping: float = 1e-6,
        *,
        factor_decay: float = 0.95,
        step_rule: Literal["quadratic_model", "line_search"] = "quadratic_model",
        momentum: float = 0.0,
    ) -> None:
        for name, p in net.named_parameters():
            if p.dtype != torch.float64:
                raise TypeError(f"net: {name}: expected float64, got {p.dtype}")
        one_of("step_rule", step_rule, ("quadratic_model", "line_search"))
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum: expected a number in [0, 1), got {momentum}")
        if momentum and step_rule == "quadratic_model":
            raise ValueError('momentum: expected 0 with step_rule "quadratic_model", which finds its own')
        self.net = net
        self.conditions = equation, boundary
        self.damping = positive_float("damping", damping)
        self.step_rule, self.momentum = step_rule, momentum
        layers = linear_layers(net)
        shapes = [KroneckerShape(m.out_features, m.in_features + (m.bias is not None)) for m in layers]
        device = layers[0].weight.device if layers else None
        self._fishers = [
            KroneckerFisher(shapes, self.damping, factor_decay=factor_decay, dtype=torch.float64, device=device)
            for _ in self.conditions
        ]
        self._last = [torch.zeros(s.outputs, s.columns, dtype=torch.float64, device=device) for s in shapes]

    @torch.no_grad()
    def step(self, equation_points: Tensor, boundary_points: Tensor) -> Tensor:
        """Move the parameters; points (n, d) and (k, d). Returns the loss before the step, ().

        Where this or its gradient is not finite, nothing changes.
        """
        points = (equation_points.detach(), boundary_points.detach())
        terms = list(zip(self.conditions, points, strict=True))
        at = linearise(self.net, terms)
        gradient = at.gradient()
        if not torch.stack([at.loss, *(block.sum() for block in gradient)]).isfinite().all():
            return at.loss
        self.update_factors(at.calls)
        direction = [-block for block in self.ihvp(gradient)]
        if self.step_rule == "quadratic_model":
            alpha, mu = quadratic_minimum(at, [direction, self._last], gradient, self.damping)
            step = [alpha * new + mu * old for new, old in zip(direction, self._last, strict=True)]
            move(self.net, step)
        else:
            step = [new + self.momentum * old for new, old in zip(direction, self._last, strict=True)]
            rate = line_search(self.net, terms, step, at.loss)
            step = [rate * block for block in step]
        copy_into(self._last, step)
        return at.loss

    def update_factors(self, calls: list[list[Call]]) -> None:
        """Let the rows of a batch, the equation's and the boundary's, enter the averages."""
        for fisher, of_term in zip(self._fishers, calls, strict=True):
            for call in of_term:
                root = call.inputs.shape[1] ** 0.5  # both factors of a KroneckerFisher are means over rows
                fisher.accumulate(call.layer, call.inputs.flatten(0, 1), root * call.gradients.flatten(0, 1))
            fisher.update()

    def factors(self, layer: int) -> list[tuple[Tensor, Tensor]]:
        """The averages A and B of a layer, of the equation and of the boundary, undamped."""
        pairs = [fisher.factors(layer) for fisher in self._fishers]
        return [(a[0], b[0]) for a, b in pairs]

    @torch.no_grad()
    def ihvp(self, blocks: list[Tensor]) -> list[Tensor]:
        """The damped sum's inverse times a block (outputs, inputs + bias) for each layer."""
        results = []
        for layer, block in enumerate(blocks):
            first, (a, b) = self.factors(layer)
            second = _damped(a, self.damping**0.5), _damped(b, self.damping**0.5)  # the sum itself damps its first
            results.append(KroneckerSum(first, second, self.damping).ihvp(block))
        return results

    def state_dict(self) -> dict[str, Any]:
        """Everything a bit-for-bit resume needs; not the hyper-parameters."""
        return {"fishers": [fisher.state_dict() for fisher in self._fishers], "last": self._last}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a :meth:`state_dict` from any device. Raises, changing nothing, if it does not fit."""
        check_like("state_dict", self.state_dict(), state_dict)
        for fisher, state in zip(self._fishers, state_dict["fishers"], strict=True):
            fisher.load_state_dict(state)
        copy_into(self._last, state_dict["last"])


def _damped(factor: Tensor, shift: float) -> Tensor:
    return factor + shift * torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
