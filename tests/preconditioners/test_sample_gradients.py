"""Gradients of single samples, and what is kept of a batch for products with the exact Fisher matrix."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import mfac_kernels as mk
from mfac_kernels.fisher.jacobian import Call, JacobianProduct, Rows
from mfac_kernels.preconditioners.layers import maps
from mfac_kernels.preconditioners.layers.maps import (
    ConvolutionMap,
    EmbeddingMap,
    LinearMap,
    SampleMap,
    ScaleMap,
    ShiftMap,
)
from mfac_kernels.preconditioners.layers.tied import TiedMap

F64 = torch.float64
OTHERS = {
    "linear": (LinearMap(3, 4, bias=True), (5, 4), (5, 3)),
    "linear, positions": (LinearMap(3, 4), (5, 2, 6, 4), (5, 2, 6, 3)),
    "embedding": (EmbeddingMap(3, 7), "indices", (5, 6, 3)),
    "embedding of one": (EmbeddingMap(3, 7, padding_idx=2), "index", (5, 3)),
    "tied head": (TiedMap(7, 3, bias=True, padding_idx=2), (5, 6, 3), (5, 6, 7)),
    "tied embedding": (TiedMap(7, 3, bias=True, padding_idx=2), "indices", (5, 6, 3)),
    "scale": (ScaleMap((1, 3), 3), (5, 3, 4, 2), (5, 3, 4, 2)),
    "scale and shift": (ScaleMap((3, 2), 3, bias=True), (5, 3, 4), (5, 3, 4)),
    "no positions": (ScaleMap((3, 2), 3, bias=True), (5, 3), (5, 3)),
    "last dimensions": (ScaleMap((1, 12), 6, bias=True, unit_dims=2), (5, 4, 2, 3), (5, 4, 2, 3)),
    "shift": (ShiftMap(3), (5, 2), (5, 3, 4)),
}


def assert_terms(own: SampleMap, a: Tensor, g: Tensor) -> None:
    """Each row is the weight gradient of one sample: sums of as many terms in another order, to 1e-12."""
    got = own.sample_gradients(a, g)
    want = [own.weight_gradient(a[n : n + 1], g[n : n + 1]).flatten() for n in range(len(a))]
    assert got.shape == (len(a), math.prod(own.shape))
    torch.testing.assert_close(got, torch.stack(want), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", OTHERS)
def test_rows_are_the_terms_of_the_weight_gradient(kind):
    own, inputs, outputs = OTHERS[kind]
    torch.manual_seed(0)
    size = {"indices": (5, 6), "index": (5,)}.get(inputs)
    a = torch.randint(7, size) if size else torch.randn(inputs, dtype=F64)
    assert_terms(own, a, torch.randn(outputs, dtype=F64))


@st.composite
def convolutions(draw) -> tuple[nn.Module, Tensor]:
    dims = draw(st.integers(1, 3))
    each = st.tuples(*[st.integers(1, 3)] * dims)
    groups, outputs, channels = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 2))
    kernel, stride, dilation = draw(each), draw(each), draw(each)
    padding = tuple(draw(st.integers(0, 2)) for _ in range(dims))
    transposed = draw(st.booleans())
    kinds = (
        [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d]
        if transposed
        else [nn.Conv1d, nn.Conv2d, nn.Conv3d]
    )
    least = [max(2 * p + 1, d * (k - 1) + 1) for p, k, d in zip(padding, kernel, dilation, strict=True)]
    size = [low + draw(st.integers(0, 3)) for low in least]
    options = {"output_padding": 0} if transposed else {"padding_mode": draw(st.sampled_from(["zeros", "circular"]))}
    module = kinds[dims - 1](
        groups * channels, groups * outputs, kernel, stride, padding, dilation=dilation, groups=groups,
        bias=draw(st.booleans()), dtype=F64, **options,
    )  # fmt: skip
    return module, torch.randn(draw(st.integers(1, 4)), groups * channels, *size, dtype=F64)


@given(convolutions(), st.sampled_from([1, 200, 1 << 18]), st.booleans())
def test_rows_of_convolutions(pair, patches, last):
    module, x = pair
    if last and x.dim() == 4:
        x = x.to(memory_format=torch.channels_last)
    y = module(x)
    layer, *_ = mk.KFAC(module, 1e-3)._layers  # of a transposed one the bias is another
    a, own = layer.features(x), layer.linear_map()
    assert isinstance(own, ConvolutionMap)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(maps._PATCHES, "cpu", patches)
        assert_terms(own, a, torch.randn_like(y))


def test_products_of_rows_are_those_of_calls():
    torch.manual_seed(0)
    own = [LinearMap(3, 2, bias=True), LinearMap(1, 4)]
    a, g = torch.randn(4, 6, 2, dtype=F64), torch.randn(4, 6, 3, dtype=F64)
    b, h = torch.randn(2, 4, dtype=F64), torch.randn(2, 1, dtype=F64)
    calls = [Call(0, a, g), Call(1, b, h, first=1), Call(1, b, h, first=1)]
    rows = [Rows(0, own[0].sample_gradients(a, g)), Rows(1, own[1].sample_gradients(b, h), first=1)]
    whole = JacobianProduct(own, calls, dtype=F64)
    parts = JacobianProduct(own, calls[1:2], rows=rows, dtype=F64)
    x, w = [torch.randn(m.shape, dtype=F64) for m in own], torch.randn(4, dtype=F64)
    torch.testing.assert_close(parts.layer_jvp(x), whole.layer_jvp(x))
    torch.testing.assert_close(parts.vjp(w), whole.vjp(w))
    with pytest.raises(ValueError, match=r"rows: layer 1: expected \(n, 4\), got \(2, 3\)"):
        JacobianProduct(own, [], rows=[Rows(1, torch.ones(2, 3))])


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_the_smaller_of_both_is_kept(fraction):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 6), nn.Flatten(), nn.Linear(4, 5))
    p = mk.TwoLevelKFAC(net, 0.1, fisher_batch=fraction, kl_clip=None)
    net(torch.randn(4, 2, 8, 8)).square().mean().backward()
    batch = p._batch
    assert [part.layer for part in batch._rows] == [1, 0]
    assert [call.layer for call, _ in batch._calls] == [3, 2]
    held = [part.values for part in batch._rows] + [t for c, _ in batch._calls for t in (c.inputs, c.gradients)]
    assert all(t.untyped_storage().nbytes() == 4 * t.numel() for t in held)
    assert {len(t) for t in held} == {round(4 * fraction)}
