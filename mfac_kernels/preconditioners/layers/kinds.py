"""The table of kinds: which modules are layers, and of which class."""

from __future__ import annotations

from torch import nn

from mfac_kernels.preconditioners.layers.attention import AttentionProjection
from mfac_kernels.preconditioners.layers.base import Layer
from mfac_kernels.preconditioners.layers.convolution import ConvLayer
from mfac_kernels.preconditioners.layers.embedding import EmbeddingLayer
from mfac_kernels.preconditioners.layers.linear import LinearLayer, TransposedLinearLayer
from mfac_kernels.preconditioners.layers.normalization import NORMALIZATIONS, NormalizationLayer
from mfac_kernels.preconditioners.layers.transposed import ConvTransposeLayer

_KINDS: dict[type[nn.Module] | str, type[Layer]] = {}


def register(kind: type[nn.Module] | str, layer: type[Layer]) -> None:
    """Let modules of class ``kind``, and of classes derived from it, be layers of class ``layer``."""
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)) and not (isinstance(kind, str) and "." in kind):
        raise TypeError(f"kind: expected a class of modules, or its name as 'package.module.Class', got {kind!r}")
    if not (isinstance(layer, type) and issubclass(layer, Layer)):
        raise TypeError(f"layer: expected a class derived from mk.layers.Layer, got {layer!r}")
    _KINDS[kind] = layer


def kind_of(module: nn.Module) -> type[Layer] | None:
    """That of its class, or of the nearest that it is derived from."""
    for base in type(module).__mro__:
        layer = _KINDS.get(base) or _KINDS.get(f"{base.__module__}.{base.__qualname__}")
        if layer is not None:
            return layer
    return None


register(nn.Linear, LinearLayer)
register("transformers.pytorch_utils.Conv1D", TransposedLinearLayer)
register(nn.MultiheadAttention, AttentionProjection)
register(nn.Embedding, EmbeddingLayer)
for convolution in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
    register(convolution, ConvLayer)
for transposed in (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d):
    register(transposed, ConvTransposeLayer)
for normalization in NORMALIZATIONS:
    register(normalization, NormalizationLayer)
