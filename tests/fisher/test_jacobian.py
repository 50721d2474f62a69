"""JacobianProduct against a dense J of per-sample gradients: calls that share rows, other rows, positions in rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import mfac_kernels as mk
from mfac_kernels.fisher.jacobian import Call
from mfac_kernels.preconditioners.layers.maps import LinearMap

F64 = torch.float64
MAPS = [LinearMap(outputs=3, inputs=2, bias=True), LinearMap(outputs=1, inputs=4), LinearMap(outputs=2, inputs=1)]


def example() -> tuple[mk.JacobianProduct, Tensor]:
    """Five rows: layer 0 called with samples 0 to 2, each in two rows, and with 3 and 4 as sequences; layer 1 with 0 to
    2; layer 2 never. And J, dense.
    """
    torch.manual_seed(0)
    pairs = [((6, 2), (6, 3)), ((2, 4, 2), (2, 4, 3)), ((3, 4), (3, 1))]
    a, g = zip(*((torch.randn(x, dtype=F64), torch.randn(y, dtype=F64)) for x, y in pairs), strict=True)
    calls = [Call(0, a[0], g[0], repeats=2), Call(0, a[1], g[1], first=3), Call(1, a[2], g[2])]
    one = [torch.cat([x, torch.ones_like(x[..., :1])], -1) for x in a[:2]]
    first = torch.einsum("nso,nsi->noi", g[0].view(3, 2, 3), one[0].view(3, 2, 3))
    last = torch.einsum("nso,nsi->noi", g[1], one[1])
    second = torch.cat([torch.einsum("no,ni->noi", g[2], a[2]), torch.zeros(2, 1, 4, dtype=F64)])
    dense = torch.cat([torch.cat([first, last]).flatten(1), second.flatten(1), torch.zeros(5, 2, dtype=F64)], 1)
    return mk.JacobianProduct(MAPS, calls, dtype=F64), dense


def blocks(x: Tensor) -> list[Tensor]:
    return [b.view(m.shape) for b, m in zip(x.split([m.shape[0] * m.shape[1] for m in MAPS]), MAPS, strict=True)]


def flat(x: list[Tensor]) -> Tensor:
    return torch.cat([b.flatten() for b in x])


def test_products_are_those_of_the_dense_matrix():
    jacobian, dense = example()
    x, w = torch.randn(dense.shape[1], dtype=F64), torch.randn(5, dtype=F64)
    torch.testing.assert_close(jacobian.jvp(blocks(x)), dense @ x)
    torch.testing.assert_close(flat(jacobian.vjp(w)), dense.mT @ w)
    torch.testing.assert_close(flat(jacobian.fisher_product(blocks(x))), dense.mT @ (dense @ x) / 5)
    torch.testing.assert_close(flat(jacobian.fisher_product(blocks(x), 0.1)), dense.mT @ (dense @ x) / 5 + 0.1 * x)
    by_layer = jacobian.layer_jvp(blocks(x))
    torch.testing.assert_close(by_layer.sum(1), dense @ x)
    assert by_layer.shape == (5, 3) and float(by_layer[:, 2].abs().max()) == 0


def test_weights_and_rows_without_calls():
    jacobian, dense = example()
    weights = torch.rand(7, dtype=F64)
    longer = mk.JacobianProduct(MAPS, jacobian.calls, weights=weights, samples=7, dtype=F64)
    x = torch.randn(dense.shape[1], dtype=F64)
    want = dense.mT @ (weights[:5] * (dense @ x))
    torch.testing.assert_close(flat(longer.fisher_product(blocks(x))), want)


def test_without_calls_everything_is_zero():
    jacobian = mk.JacobianProduct(MAPS, [], dtype=F64)
    x = [torch.ones(m.shape, dtype=F64) for m in MAPS]
    assert jacobian.jvp(x).shape == (0,)
    assert float(flat(jacobian.fisher_product(x)).abs().max()) == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda j: j.jvp([]), "x: expected 3 blocks, one for each layer, got 0"),
        (
            lambda j: j.jvp([torch.zeros(3, 3), torch.zeros(4, 1), torch.zeros(2, 1)]),
            r"x\[1\]: expected shape \(1, 4\), got \(4, 1\)",
        ),
        (lambda j: j.vjp(torch.zeros(4)), r"w: expected shape \(5,\), got \(4,\)"),
        (lambda j: mk.JacobianProduct(MAPS, j.calls, samples=4), "samples: expected at least 5, the calls', got 4"),
        (
            lambda j: mk.JacobianProduct(MAPS, [Call(0, torch.zeros(3, 2), torch.zeros(4, 3))]),
            "calls: layer 0: expected as many rows of inputs as of gradients, a multiple of 1, got 3 and 4",
        ),
        (
            lambda j: mk.JacobianProduct(MAPS, [Call(0, torch.zeros(3, 2), torch.zeros(3, 3), repeats=2)]),
            "calls: layer 0: expected as many rows of inputs as of gradients, a multiple of 2, got 3 and 3",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call(example()[0])
