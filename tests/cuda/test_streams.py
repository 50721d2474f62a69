"""What only a GPU can show: ops are captured into CUDA graphs, follow the current stream, never wait for the device.

Every op that has a CUDA kernel, on the inputs of tools/op_samples.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import op_samples
import pytest
import torch
from torch.utils._pytree import tree_leaves

CASES = op_samples.cases() if torch.cuda.is_available() else []


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}{case[1]}")
def op(request: pytest.FixtureRequest, device: str) -> Callable[[int], tuple[str, Any]]:
    """op(seed): the name and its arguments on the GPU."""
    name, index = request.param
    if device != "cuda" or not op_samples.has_kernel(name, device):
        pytest.skip(f"{name} on {device}")
    return lambda seed: (name, op_samples.arguments(name, index, device, seed))


def assert_same_bits(got: list[torch.Tensor], want: list[torch.Tensor]) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_graph_replays_on_new_inputs(op):
    name, held = op(0)
    on_a_side = torch.cuda.Stream()
    on_a_side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(on_a_side):
        op_samples.results(name, op_samples.copied(held))  # what is set up once is set up here
    torch.cuda.current_stream().wait_stream(on_a_side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = op_samples.results(name, held)
    for seed in (1, 2):
        _, fresh = op(seed)
        want = op_samples.results(name, op_samples.copied(fresh))
        for target, source in zip(tree_leaves(held), tree_leaves(fresh), strict=True):
            if isinstance(target, torch.Tensor):
                target.copy_(source)
        graph.replay()
        torch.cuda.synchronize()
        assert_same_bits(captured, want)


def test_never_waits_for_the_device(op):
    name, arguments = op(0)
    op_samples.results(name, op_samples.copied(arguments))
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        op_samples.call(name, arguments)
    finally:
        torch.cuda.set_sync_debug_mode(before)


def test_runs_on_the_current_stream(op):
    """The inputs arrive on a stream that is busy: an op that ran on another would not see them."""
    name, fresh = op(1)
    _, late = op(0)
    want = op_samples.results(name, op_samples.copied(fresh))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # about 10 ms
        for target, source in zip(tree_leaves(late), tree_leaves(fresh), strict=True):
            if isinstance(target, torch.Tensor):
                target.copy_(source)
        got = op_samples.results(name, late)
    stream.synchronize()
    assert_same_bits(got, want)
