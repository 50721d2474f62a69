"""Per-sample gradients by brute force: each sample gets its own copy of the parameters, in plain torch."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mfac_kernels.preconditioners.layers.base import Layer


def per_sample_gradients(net: nn.Module, layers: list[Layer], loss: Callable[[], Tensor], samples: int) -> Tensor:
    """J (N, p), in K-FAC's order: ``loss()`` calls the net; j_n is what sample n's copy of the parameters gets."""
    copies: list[list[Tensor]] = []
    kept = []
    for layer in layers:
        module = layer.module
        own = [q for q in (layer.weight, layer.bias) if q is not None]
        leaves = [q.detach().expand(samples, *q.shape).clone().requires_grad_() for q in own]
        copies.append(leaves)
        kept.append(module.forward)
        module.forward = lambda x, module=module, leaves=leaves: _forward(module, x, leaves)
    try:
        gradients = torch.autograd.grad(loss(), [leaf for leaves in copies for leaf in leaves], allow_unused=True)
    finally:
        for layer, forward in zip(layers, kept, strict=True):
            layer.module.forward = forward
    flat, rest = [], list(gradients)
    for layer, leaves in zip(layers, copies, strict=True):
        parts = [torch.zeros_like(leaf) if (g := rest.pop(0)) is None else g for leaf in leaves]
        flat.append(torch.stack([_matrix(layer, [part[n] for part in parts]).flatten() for n in range(samples)]))
    return torch.cat(flat, 1)


def _matrix(layer: Layer, gradients: list[Tensor]) -> Tensor:
    if isinstance(layer.module, nn.Embedding):
        return gradients[0].mT
    if layer.weight.dim() == 1 or isinstance(layer.module, nn.LayerNorm):
        return torch.stack([g.flatten() for g in gradients], 1)
    weight = gradients[0].flatten(1)
    return torch.cat([weight, gradients[1][:, None]], 1) if len(gradients) > 1 else weight


def _forward(module: nn.Module, x: Tensor, leaves: list[Tensor]) -> Tensor:
    samples = len(leaves[0])
    parts = []
    if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
        x = F.batch_norm(x, None, None, training=True, eps=module.eps)
    for n, rows in enumerate(x.chunk(samples) if len(x) != samples else x.split(1)):
        weight, *rest = [leaf[n] for leaf in leaves]
        bias = rest[0] if rest else None
        if isinstance(module, nn.Linear):
            parts.append(F.linear(rows, weight, bias))
        elif isinstance(module, nn.Embedding):
            parts.append(F.embedding(rows, weight, module.padding_idx))
        elif isinstance(module, nn.LayerNorm):
            parts.append(F.layer_norm(rows, module.normalized_shape, weight, bias, module.eps))
        elif isinstance(module, nn.GroupNorm):
            parts.append(F.group_norm(rows, module.num_groups, weight, bias, module.eps))
        elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            shape = (1, -1, *[1] * (x.dim() - 2))
            parts.append(rows * weight.view(shape) + (0 if bias is None else bias.view(shape)))
        else:
            parts.append(module._conv_forward(rows, weight, bias))
    return torch.cat(parts)
