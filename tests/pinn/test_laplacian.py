"""The forward Laplacian against autograd's Hessians; linearised residuals against a dense Jacobian."""

from __future__ import annotations

import pytest
import torch
from pinn_cases import BOUNDARY, EQUATION, F64, by_autograd, dense_jacobian, network, points
from torch import nn

from mfac_kernels import pinn

TOLERANCE = {"rtol": 1e-12, "atol": 1e-12}  # of sums of at most 100 products of order 1: 100 eps, and a margin


@pytest.mark.parametrize("activation", [nn.Tanh, nn.Sigmoid, pinn.Sine])
@pytest.mark.parametrize(
    ("n", "sizes"), [(5, (3, 7, 4, 2)), (1, (1, 3, 1)), (4, (5, 1)), (3, (2, 1, 1)), (0, (2, 3, 1))]
)
def test_rows_are_those_of_autograd(n, sizes, activation):
    net, x = network(*sizes, activation=activation), points(n, sizes[0])
    weights = torch.linspace(0, 2, sizes[0], dtype=F64)
    got = pinn.forward_laplacian(net, x, weights)
    assert got.shape == (n, sizes[0] + 2, sizes[-1])
    if n:
        torch.testing.assert_close(got, by_autograd(net, x, weights), **TOLERANCE)
        want = by_autograd(net, x, torch.ones_like(weights))
        torch.testing.assert_close(pinn.forward_laplacian(net, x), want, **TOLERANCE)
        torch.testing.assert_close(pinn.forward_laplacian(net, x, derivatives=False), net(x)[:, None], **TOLERANCE)


def test_an_activation_of_your_own(monkeypatch):
    class Cube(nn.Module):
        def forward(self, x):
            return x**3

    net, x = network(2, 4, 1, activation=Cube), points(3, 2)
    with pytest.raises(TypeError, match="net: expected Linear, or of ACTIVATIONS Tanh, Sigmoid, Sine, got Cube"):
        pinn.forward_laplacian(net, x)
    monkeypatch.setitem(pinn.ACTIVATIONS, Cube, lambda x: (x**3, 3 * x**2, 6 * x))
    want = by_autograd(net, x, torch.ones(2, dtype=F64))
    torch.testing.assert_close(pinn.forward_laplacian(net, x), want, **TOLERANCE)


def test_errors():
    net = network(2, 3, 1)
    with pytest.raises(ValueError, match=r"x: expected shape \(n, 2\), got \(2,\)"):
        pinn.forward_laplacian(net, points(2, 2)[0])
    with pytest.raises(ValueError, match=r"x: expected shape \(n, 2\), got \(4, 3\)"):
        pinn.forward_laplacian(net, points(4, 3))
    with pytest.raises(TypeError, match=r"x: expected torch\.float64, as the network, got torch\.float32"):
        pinn.forward_laplacian(net, points(4, 2).float())
    with pytest.raises(ValueError, match=r"x: expected at least one point, got shape \(0, 2\)"):
        pinn.linearise(net, [(EQUATION, points(0, 2))])
    with pytest.raises(ValueError, match=r"weights: expected shape \(2,\), got \(3,\)"):
        pinn.forward_laplacian(net, points(2, 2), torch.ones(3))
    with pytest.raises(ValueError, match=r"residual: expected to return shape \(4,\), got \(4, 1\)"):
        pinn.Condition(lambda x, u: u[:, 0])(net, points(4, 2))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("n", "k", "sizes"), [(5, 4, (3, 6, 4, 1)), (1, 1, (1, 2, 1)), (3, 2, (2, 1))])
def test_linearised_residuals(n, k, sizes, bias):
    net = network(*sizes, bias=bias)
    terms = [(EQUATION, points(n, sizes[0])), (BOUNDARY, points(k, sizes[0], 1))]
    at = pinn.linearise(net, terms)
    dense = torch.cat([dense_jacobian(net, condition, x) for condition, x in terms])
    w = torch.tensor([1 / n] * n + [1 / k] * k, dtype=F64)
    torch.testing.assert_close(at.loss, pinn.loss_of(net, terms).detach(), **TOLERANCE)
    torch.testing.assert_close(torch.cat([b.flatten() for b in at.gradient()]), dense.mT @ (w * at.residuals))
    jacobian, r = at.scaled()
    torch.testing.assert_close(jacobian, w.sqrt()[:, None] * dense)
    torch.testing.assert_close(r, w.sqrt() * at.residuals)
    x = torch.linspace(-1, 1, dense.shape[1], dtype=F64)
    product = torch.cat([b.flatten() for b in at.product.fisher_product(at.blocks(x))])
    torch.testing.assert_close(product, dense.mT @ (w * (dense @ x)))
