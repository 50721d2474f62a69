"""The coarse matrix of Tselepidis et al. 2020: the expectation of a product as the product of expectations."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mfac_kernels.fisher.jacobian import JacobianProduct


def factorized_matrix(
    jacobian: JacobianProduct,
    positions: Sequence[int],
    weights: Tensor,
    average: Callable[[Sequence[Tensor]], None],
) -> Tensor:
    """F^_c[i, j] = (1^T A_ij 1) (1^T B_ij 1), A_ij = E[a_i a_j^T], B_ij = E[g_i g_j^T] -> (layers, layers), float64.

    a is a sample's sum over positions (the bias's 1 is part of it), g the mean over them, as the layers' positions
    have no pairs; of a layer that is no matrix product a is its mean over output channels. ``positions``: of each call.
    """
    layers = len(jacobian.maps)
    inputs = torch.zeros(jacobian.samples, layers, dtype=torch.float64, device=jacobian.device)
    outputs = torch.zeros_like(inputs)
    total = [0] * layers
    for call, count in zip(jacobian.calls, positions, strict=True):
        total[call.layer] += count
    for call, count in zip(jacobian.calls, positions, strict=True):
        ones = torch.ones((), dtype=jacobian.dtype, device=jacobian.device).expand(jacobian.maps[call.layer].shape)
        a = call.inputs.to(jacobian.dtype) if call.inputs.is_floating_point() else call.inputs
        products = jacobian.maps[call.layer].forward(a, ones).double().flatten(1)
        channels = products.shape[1] * call.repeats // count
        rows = slice(call.first, call.first + call.samples)
        inputs[rows, call.layer] += products.sum(1).view(-1, call.repeats).sum(1) / channels
        sums = call.gradients.double().flatten(1).sum(1).view(-1, call.repeats).sum(1)
        outputs[rows, call.layer] += sums / total[call.layer]
    of_inputs = inputs.mT @ inputs / max(1, jacobian.samples)
    of_outputs = outputs.mT @ (weights[:, None] * outputs)
    average([of_inputs, of_outputs])
    return of_inputs * of_outputs
