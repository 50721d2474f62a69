"""What benchmarks are measured against: loops that compile here, and a bound that is the larger of its two parts."""

from __future__ import annotations

import ceilings
import pytest
import torch


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_multiply_adds(dtype, threads):
    assert 1e8 < ceilings.flops(dtype, threads) < 1e14


@pytest.mark.parametrize("size", [1, 1 << 16, 1 << 20, 1 << 40])
@pytest.mark.parametrize("kind", ["read", "write"])
def test_memory(kind, size):
    assert 1e7 < ceilings.bandwidth(kind, size, threads=2) < 1e14


def test_a_bound_is_its_slowest_part(monkeypatch):
    monkeypatch.setattr(ceilings, "flops", lambda dtype: 100.0 if dtype == torch.float32 else 50.0)
    monkeypatch.setattr(ceilings, "bandwidth", lambda kind, size: {"read": 10.0, "write": 5.0}[kind])
    assert ceilings.Bound(flops=400).seconds() == 4
    assert ceilings.Bound(flops=400, dtype=torch.float64).seconds() == 8
    assert ceilings.Bound(flops=400, read=20, written=10).seconds() == 4  # memory: 2 + 2
    assert ceilings.Bound(flops=400, read=50, written=10).seconds() == 7
    assert ceilings.Bound(read=20).moved == 20
