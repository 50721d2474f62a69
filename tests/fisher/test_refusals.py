"""What curvature objects refuse, by name and without a change; tools/fuzz.py looks for more."""

from __future__ import annotations

import pytest
import torch

import mfac_kernels as mk
from mfac_kernels.fisher.jacobian import Call
from mfac_kernels.preconditioners.layers.maps import LinearMap

EYE = torch.eye(2)


def test_rows_that_are_no_layers():
    fisher = mk.KroneckerFisher([mk.KroneckerShape(2, 3), mk.KroneckerShape(2, 3, groups=2)], 0.1)
    for inputs, gradients in (((0, 3), (0, 2)), ((4, 3), (3, 2)), ((4, 2), (4, 2)), ((), (4, 2))):
        with pytest.raises(ValueError, match=r"(inputs|gradients): expected shape \(n, \d\) with n >= 1"):
            fisher.accumulate(0, torch.ones(inputs), torch.ones(gradients))
    with pytest.raises(ValueError, match="layer: expected one of 1 group and 1 offset, got 2 and 1"):
        fisher.accumulate(1, torch.ones(4, 3), torch.ones(4, 2))


@pytest.mark.parametrize(
    ("first", "second", "options", "message"),
    [
        ((EYE,), (EYE, EYE), {}, "first: expected A and B, got 1 matrices"),
        ((EYE, EYE), (EYE, EYE, EYE), {}, "second: expected A and B, got 3 matrices"),
        ((EYE, EYE.double()), (EYE, EYE.double()), {}, "second: expected float32 or float64 throughout"),
        ((EYE, EYE), (EYE, EYE), {"floor": 1e300}, "floor: expected a positive number that torch.float32 holds"),
        ((EYE, EYE), (EYE * float("inf"), EYE), {}, "second: expected a product that is finite"),
    ],
)
def test_sums_of_products(first, second, options, message):
    with pytest.raises((ValueError, torch.linalg.LinAlgError), match=message):
        mk.KroneckerSum(first, second, 0.1, **options)


def test_nearest_products():
    rows = torch.ones(4, 2)
    with pytest.raises(ValueError, match=r"weights: expected shape \(4,\), got \(3,\)"):
        mk.nearest_kronecker_sum(rows, rows, weights=torch.ones(3))
    with pytest.raises(ValueError, match="gradients: expected float32 or float64 as inputs have"):
        mk.nearest_kronecker_sum(rows, rows.double())


def test_calls_that_are_no_layers():
    maps, a, g = [LinearMap(2, 3)], torch.ones(4, 3), torch.ones(4, 2)
    for inputs, gradients in ((torch.ones(()), g), (a, g.long())):
        with pytest.raises(ValueError, match="calls: layer 0: expected samples in the first dimension"):
            mk.JacobianProduct(maps, [Call(0, inputs, gradients)])
    with pytest.raises(ValueError, match=r"calls: layer 0: expected gradients of the outputs' shape"):
        mk.JacobianProduct(maps, [Call(0, a, g[:, :1])]).jvp([torch.ones(2, 3)])
    with pytest.raises(ValueError, match=r"a: expected shape \(n, .., 3\)"):
        mk.JacobianProduct(maps, [Call(0, a[:, :2], g)]).jvp([torch.ones(2, 3)])
    with pytest.raises(ValueError, match=r"g: expected shape \(4, 2\), got \(4, 1\)"):
        mk.JacobianProduct(maps, [Call(0, a, g[:, :1])]).vjp(torch.ones(4))
    with pytest.raises(ValueError, match=r"damping: expected a number that torch.float32 holds, got 1e"):
        mk.JacobianProduct(maps, [Call(0, a, g)]).fisher_product([torch.ones(2, 3)], 1e300)
    with pytest.raises(ValueError, match=r"dtype: expected a floating-point type, got torch.int64"):
        mk.JacobianProduct(maps, [], dtype=torch.int64)


def test_a_state_that_belongs_to_a_graph_is_copied():
    window = mk.FisherWindow(3, 2, 0.1)
    state = window.state_dict()
    window.load_state_dict({**state, "gram": state["gram"].clone().requires_grad_()})
    assert not window.gram.requires_grad
