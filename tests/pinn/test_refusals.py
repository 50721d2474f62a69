"""What mfac_kernels.pinn refuses, by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mfac_kernels import pinn

F64 = torch.float64
EQUATION = pinn.Condition(lambda x, rows: rows[:, -1, 0])
BOUNDARY = pinn.Condition(lambda x, rows: rows[:, 0, 0], derivatives=False)


def network(dtype: torch.dtype = F64) -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).to(dtype)


def test_no_terms():
    for call in (pinn.linearise, pinn.loss_of):
        with pytest.raises(ValueError, match="terms: expected at least one condition and its points"):
            call(network(), [])


def test_steps_of_other_shapes_move_nothing():
    net = network()
    before = [p.clone() for p in net.parameters()]
    for step in ([torch.ones(3, 3)], [torch.ones(3, 3), torch.ones(1)], [torch.ones(3, 3), torch.ones(1, 4).bool()]):
        with pytest.raises(ValueError, match=r"step: expected blocks of shapes \[\(3, 3\), \(1, 4\)\], got"):
            pinn.move(net, step)
    assert all(torch.equal(p, old) for p, old in zip(net.parameters(), before, strict=True))


def test_residuals_of_another_number():
    with pytest.raises(ValueError, match=r"residuals: expected shape \(m,\) with jacobian \(m, d\)"):
        pinn.spring(torch.ones(3, 4, dtype=F64), torch.ones(2, dtype=F64), 0.1)


def test_weights_of_another_dtype_and_points_of_a_graph():
    weights = torch.tensor([1.0, 0.5], dtype=F64)
    rows = pinn.forward_laplacian(network(torch.float32), torch.ones(4, 2), weights)
    assert rows.dtype == torch.float32
    p = pinn.KFAC(network(), EQUATION, BOUNDARY)
    p.step(*torch.ones(2, 4, 2, dtype=F64, requires_grad=True))
    assert not any(
        t.requires_grad for t in torch.utils._pytree.tree_leaves(p.state_dict()) if isinstance(t, torch.Tensor)
    )
