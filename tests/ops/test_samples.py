"""Every op has inputs in tools/op_samples.py, and gives on them what its fake promises, the same bits every time."""

from __future__ import annotations

import op_samples
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map


def layouts(result: object) -> list[object]:
    return [
        (leaf.dtype, tuple(leaf.shape), leaf.stride(), leaf.device.type) if isinstance(leaf, torch.Tensor) else leaf
        for leaf in tree_leaves(result)
    ]


def test_every_op_has_inputs():
    assert op_samples.missing() == []


@pytest.fixture(params=op_samples.cases(), ids=lambda case: f"{case[0]}{case[1]}")
def sample(request, device):
    op, index = request.param
    if not op_samples.has_kernel(op, device):
        pytest.skip(f"{op} has no kernel on {device}")
    return op, op_samples.arguments(op, index, device)


def test_same_bits_every_time(sample):
    op, arguments = sample
    want = op_samples.results(op, op_samples.copied(arguments))
    for got, expected in zip(op_samples.results(op, arguments), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


def test_fake_agrees_with_the_op(sample):
    op, arguments = sample
    with FakeTensorMode() as mode:
        fakes = tree_map(lambda leaf: mode.from_tensor(leaf) if isinstance(leaf, torch.Tensor) else leaf, arguments)
        promised = op_samples.call(op, fakes)
    assert layouts(op_samples.call(op, arguments)) == layouts(promised)
