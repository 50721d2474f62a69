"""What K-FAC knows about modules, one file a kind. Derive from these to :meth:`register <KFAC.register>` your own."""

from mfac_kernels.preconditioners.layers.base import Layer
from mfac_kernels.preconditioners.layers.convolution import ConvLayer
from mfac_kernels.preconditioners.layers.embedding import EmbeddingLayer
from mfac_kernels.preconditioners.layers.linear import LinearLayer, TransposedLinearLayer
from mfac_kernels.preconditioners.layers.normalization import NormalizationLayer
from mfac_kernels.preconditioners.layers.tied import TiedLayer
from mfac_kernels.preconditioners.layers.transposed import ConvTransposeLayer

__all__ = [
    "ConvLayer",
    "ConvTransposeLayer",
    "EmbeddingLayer",
    "Layer",
    "LinearLayer",
    "NormalizationLayer",
    "TiedLayer",
    "TransposedLinearLayer",
]
