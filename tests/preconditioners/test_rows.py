"""Rows into factors of every form: dense, in blocks, the diagonal."""

from __future__ import annotations

import pytest
import torch
from kfac_cases import seeded
from torch import Tensor

from mfac_kernels.preconditioners.layers import rows as rows_module
from mfac_kernels.preconditioners.layers.base import Add
from mfac_kernels.preconditioners.layers.rows import add_rows


def refused(device: str) -> Tensor:
    return torch.zeros(1, dtype=torch.int32, device=device)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shape", "columns"), [((7,), 5), ((3, 4), 6), ((2, 3, 2), 1), ((0,), 4), ((300,), 33)])
@pytest.mark.parametrize(("weighted", "bias"), [(False, False), (True, False), (False, True), (True, True)])
def test_sums_of_squares_are_the_diagonal_of_the_product(monkeypatch, device, dtype, shape, columns, weighted, bias):
    """Sums of n squares in the accumulator's dtype: n eps of their own."""
    monkeypatch.setattr(rows_module, "_AT_A_TIME", 64)  # several parts
    own = torch.float64 if dtype == torch.float64 else torch.float32
    rows = seeded(*shape, columns).to(device, dtype)
    weights = seeded(*shape, seed=1).abs().to(device, own) if weighted else None
    before = seeded(columns + bias, 1, 1, seed=2).abs().to(device, own)
    flag, total = refused(device), before.clone()
    add_rows(total, rows, Add(0.5, 0.25, flag), weights, bias=bias)
    exact = rows.double().reshape(-1, columns)
    if bias:
        exact = torch.cat([exact, exact.new_ones(len(exact), 1)], 1)
    w = torch.ones(len(exact), device=device) if weights is None else weights.double().flatten()
    want = 0.5 * before.double() + 0.25 * (w[:, None] * exact.square()).sum(0)[:, None, None]
    tolerance = (len(exact) + 4) * torch.finfo(own).eps
    torch.testing.assert_close(total.double(), want.double(), rtol=tolerance, atol=0)
    assert int(flag) == 0


def test_what_is_there_is_not_read_if_beta_is_zero(device):
    total = torch.full((4, 1, 1), float("nan"), device=device)
    rows = seeded(6, 4).to(device, torch.float32)
    add_rows(total, rows, Add(0.0, 1.0, refused(device)))
    torch.testing.assert_close(total.flatten(), rows.square().sum(0))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_sums_that_are_not_finite_are_refused(device, bad):
    """Whether the rows are not, or their squares overflow."""
    rows = torch.ones(3, 4, device=device)
    rows[1, 2] = bad
    flag = refused(device)
    add_rows(torch.zeros(4, 1, 1, device=device), rows, Add(1.0, 1.0, flag))
    assert int(flag) == 1


@pytest.mark.parametrize("blocks", [(5, 5), (3, 2, 2), (5, 1, 1)])
def test_rows_that_are_views(device, blocks):
    """As a convolution's gradient is, seen with its channels last."""
    rows = seeded(3, 5, 4).to(device, torch.float32).movedim(1, -1)
    total, copied = (torch.zeros(blocks, device=device) for _ in range(2))
    add_rows(total, rows, Add(0.0, 1.0, refused(device)))
    add_rows(copied, rows.contiguous(), Add(0.0, 1.0, refused(device)))
    torch.testing.assert_close(total, copied)
