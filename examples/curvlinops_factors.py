"""curvlinops 3.0.1 on these kernels: `python -m examples.curvlinops_factors`.

    with on_our_kernels():
        operator = curvlinops.KFACLinearOperator(...)

Three methods are replaced: the hooks that accumulate the covariances of a layer's inputs and of its output gradients,
for Linear and Conv2d, expand and reduce, and the damped Cholesky inverse. No patches and no joined column of ones are
formed. What reads the factors, as laplace-torch does, gets the same numbers up to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import curvlinops
import torch
from curvlinops.kfac import KFACType
from torch import Tensor, nn

from examples._timing import before_and_after
from mfac_kernels import ops

KFAC, Inverse = curvlinops.KFACLinearOperator, curvlinops.KFACInverseLinearOperator
theirs = {"inputs": KFAC._hook_accumulate_input_covariance, "inverses": Inverse._compute_inverse_factors}


def _positions(layer: nn.Conv2d, x: Tensor) -> int:
    """Output positions of a convolution, over both dimensions."""
    if layer.padding == "same":
        return x.shape[2] * x.shape[3]
    padding = (0, 0) if layer.padding == "valid" else layer.padding
    geometry = zip(x.shape[2:], layer.kernel_size, layer.stride, padding, layer.dilation, strict=True)
    return math.prod((size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in geometry)


def _factor(factors: dict[str, Tensor], name: str, x: Tensor, size: int) -> Tensor:
    return factors.setdefault(name, x.new_zeros(size, size))


def input_covariance(self: Any, module: nn.Module, inputs: tuple[Tensor], module_name: str) -> None:
    """In place of ``_hook_accumulate_input_covariance``."""
    if len(inputs) != 1 or getattr(module, "groups", 1) != 1:  # of grouped convolutions they average the groups
        return theirs["inputs"](self, module, inputs, module_name)
    x, mapping = inputs[0].detach(), self._mapping[module_name]
    bias = "bias" in mapping and not self._separate_weight_and_bias
    reduced = self._kfac_approx == KFACType.REDUCE
    factor = _factor(self._input_covariances, module_name, x, module.weight[0].numel() + bias)
    if isinstance(module, nn.Conv2d):
        # Their rows are means over positions, ours are sums, so that a bias is a 1 there and their number here.
        count = _positions(module, x)
        ops.conv2d_factor_(
            factor,
            x,
            module.kernel_size,
            stride=module.stride,
            padding=module.padding,
            dilation=module.dilation,
            bias=bias,
            approximation="reduce" if reduced else "expand",
            alpha=1 / (self._N_data * (count**2 if reduced else count)),
        )
    else:
        x = x.flatten(1, -2).mean(1) if reduced and x.dim() > 2 else x
        ops.linear_factor_(factor, x, bias=bias, alpha=1 / (self._N_data * x.shape[1:-1].numel()))


def gradient_covariance(self: Any, grad_output: Tensor, module: nn.Module, module_name: str) -> None:
    """In place of ``_accumulate_gradient_covariance``."""
    g, samples = grad_output.detach(), len(grad_output)
    terms = self._num_per_example_loss_terms
    mean = {"sum": 1.0, "mean": samples**2 * terms / self._N_data}[self._loss_func.reduction]
    if isinstance(module, nn.Conv2d):
        g = g.movedim(1, -1)
    if self._kfac_approx == KFACType.REDUCE and g.dim() > 2:
        g = g.flatten(1, -2).sum(1)
    factor = _factor(self._gradient_covariances, module_name, g, g.shape[-1])
    ops.linear_factor_(factor, g, alpha=mean / self._mc_samples)


def inverse_factors(self: Any, a: Tensor | None, b: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """In place of ``_compute_inverse_factors``: both in one call; theirs decides about what cannot be inverted."""
    dampings = [float(damping) for damping in self._compute_damping(a, b)]
    present = [(factor, damping) for factor, damping in zip((a, b), dampings, strict=True) if factor is not None]
    inverses, infos = ops.grouped_cholesky_inverse_ex([f for f, _ in present], [d for _, d in present])
    if any(int(info) for info in infos):
        return theirs["inverses"](self, a, b)
    found = iter(inverses)
    return (None if a is None else next(found)), (None if b is None else next(found))


@contextmanager
def on_our_kernels() -> Iterator[None]:
    """Inside, curvlinops' K-FAC and its inverse are computed here."""
    with (
        mock.patch.object(KFAC, "_hook_accumulate_input_covariance", input_covariance),
        mock.patch.object(KFAC, "_accumulate_gradient_covariance", gradient_covariance),
        mock.patch.object(Inverse, "_compute_inverse_factors", inverse_factors),
    ):
        yield


def factors(model: nn.Module, data: list[tuple[Tensor, Tensor]], **options: Any) -> tuple[list[Tensor], list[Tensor]]:
    """All factors, and with damping 0.1 all inverses, as curvlinops computes them here and now."""
    operator = KFAC(
        model,
        nn.CrossEntropyLoss(),
        list(model.parameters()),
        data,
        check_deterministic=False,
        progressbar=False,
        **options,
    )
    operator.compute_kronecker_factors()
    a, b = operator._input_covariances, operator._gradient_covariances
    inverse = Inverse(operator, damping=0.1)
    found = [f for name in operator._mapping for f in inverse._compute_inverse_factors(a.get(name), b.get(name))]
    return [*a.values(), *b.values()], [f for f in found if f is not None]


def difference(got: list[Tensor], want: list[Tensor]) -> float:
    """The largest relative difference in the Frobenius norm."""
    return max(float((g - w).norm() / w.norm()) for g, w in zip(got, want, strict=True))


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(32 * 49, 64), nn.ReLU(), nn.Linear(64, 10)),
    )
    data = [(torch.randn(32, 3, 16, 16), torch.randint(10, (32,)))]

    def ours() -> tuple[list[Tensor], list[Tensor]]:
        with on_our_kernels():
            return factors(model, data)

    got, want = ours(), factors(model, data)
    print(f"{len(want[0])} factors: relative error {difference(got[0], want[0]):.1e}")
    print(f"{len(want[1])} inverses: relative error {difference(got[1], want[1]):.1e}")
    print(f"factors and inverses: {before_and_after(lambda: factors(model, data), ours, rounds=3)}")


if __name__ == "__main__":
    main()
