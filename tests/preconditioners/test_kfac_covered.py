"""What a preconditioner covers of a model; layers whose factors would be too large are named before there are any."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mfac_kernels as mk
from mfac_kernels.preconditioners._covered import Covered

GB = 1e9


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 4)
        self.scale = nn.Parameter(torch.ones(4))
        self.lstm = nn.LSTM(4, 4, batch_first=True)
        self.convolution = nn.Conv1d(4, 6, 3, groups=2, padding=1)
        self.wide = nn.Conv1d(6, 5, 3, bias=False)
        self.norm = nn.LayerNorm(5)
        self.frozen = nn.Linear(5, 5).requires_grad_(False)
        self.head = nn.Linear(5, 7)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.lstm(self.embedding(tokens) * self.scale)[0]
        return self.head(self.frozen(self.norm(self.wide(self.convolution(x.mT)).mT)))


def covered(net: nn.Module, **options: Any) -> Covered:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return mk.KFAC(net, **options).covered()


def held(p: mk.KFAC) -> int:
    """Bytes of all that a preconditioner keeps of its layers, apart from a number or two for each."""
    inverses = p.fisher._inverses
    tensors = [t for s in p.fisher._stacks for t in (s.inputs, s.outputs, s.input_sums, s.output_sums)]
    tensors += [*inverses._inputs, *inverses._outputs, *getattr(inverses, "moments", []), *inverses.sums()]
    return sum(t.nbytes for t in tensors)


def test_the_table():
    table = covered(Net(), group_size=(None, 3), output={"head": "diagonal"})
    assert [(row.name, row.kind, row.parameters, row.inputs, row.outputs) for row in table.layers] == [
        ("embedding", "Embedding", 44, "diagonal of 11", "2 of 3 x 3"),
        ("convolution", "Conv1d", 42, "2 of 7 x 7", "2 of 3 x 3"),
        ("wide", "Conv1d", 90, "18 x 18", "2 of 3 x 3"),
        ("norm", "LayerNorm", 10, "5 of 2 x 2", "1"),
        ("head", "Linear", 42, "6 x 6", "diagonal of 7"),
    ]
    assert [(row.name, row.kind, row.parameters) for row in table.left_alone] == [
        ("the model itself", "Net", 4),
        ("lstm", "LSTM", 160),
    ]
    assert table.parameters == 228
    assert table.trained == 228 + 164
    assert table.share == 228 / 392


def test_each_parameter_counts_once():
    """One of a module that two names have, too; a frozen bias not at all."""
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 4))
    net.append(net[0])
    net[1].bias.requires_grad_(False)
    table = covered(net)
    assert (table.trained, table.share) == (12 + 12, 1.0)
    assert [row.parameters for row in table.layers] == [12, 12]


@pytest.mark.parametrize(
    "options", [{}, {"damping_style": "exact"}, {"damping_style": "exact", "eigen_correction": True}]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("forms", [{}, {"output": {"*": 2}, "input": {"*": "diagonal"}}, {"spatial": "sua"}])
def test_megabytes_are_those_held(options, dtype, forms):
    if options.get("eigen_correction") and "spatial" in forms:
        return
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, groups=2), nn.GroupNorm(2, 4), nn.Linear(5, 7)).to(dtype)
    p = mk.KFAC(net, **options, **forms)
    assert round(p.covered().megabytes * 1e6) == held(p)


def test_printing():
    with pytest.warns(UserWarning, match="LSTM"):
        p = mk.KFAC(Net(), include=["head", "lstm", "norm"])
    text = str(p)
    assert text.startswith("KFAC: 13.3% of 392 trained parameters, 0.00 MB\n")
    lines = [re.split(r"  +", line) for line in text.splitlines()[1:]]
    assert lines == [
        ["layer", "kind", "parameters", "A", "B", "MB"],
        ["norm", "LayerNorm", "10", "5 of 2 x 2", "1", "0.00"],
        ["head", "Linear", "42", "6 x 6", "7 x 7", "0.00"],
        ["left alone", "kind", "parameters", "because"],
        ["the model itself", "Net", "4", "not in include"],
        ["embedding", "Embedding", "44", "not in include"],
        ["lstm", "LSTM", "160", "LSTM is of no kind that has Kronecker factors"],
        ["convolution", "Conv1d", "42", "not in include"],
        ["wide", "Conv1d", "90", "not in include"],
    ]
    assert str(mk.TwoLevelKFAC(nn.Linear(2, 2))).startswith("TwoLevelKFAC: 100.0% of 6 trained parameters")


def head(outputs: int, inputs: int = 8) -> nn.Module:
    """Of any size: a meta tensor."""
    return nn.Sequential(nn.Linear(inputs, inputs), nn.Linear(inputs, outputs, device="meta")).to("meta")


TOO_LARGE = [
    (head(50_257), {}, f"1 needs {3 * 4 * 50_257**2 / GB:.3g} GB for its factors, .* for B \\(50257 x 50257\\)"),
    (head(50_257).double(), {}, f"1 needs {3 * 8 * 50_257**2 / GB:.3g} GB"),
    (head(8, 40_000), {"include": ["1"]}, 'A \\(40001 x 40001\\).*input={"1": "diagonal"}'),
    (nn.Sequential(nn.Conv2d(4_096, 8, 3, device="meta")), {}, r"A \(36865 x 36865\)"),
    (nn.Sequential(nn.Embedding(10, 30_000, device="meta")), {}, 'B \\(30000 x 30000\\).*output={"0": "diagonal"}'),
    (head(50_257), {"group_size": 20_000}, r"B \(3 of 20000 x 20000\)"),
]


@pytest.mark.parametrize(("net", "options", "message"), TOO_LARGE)
def test_a_layer_that_is_too_large_is_named_before_anything_is_allocated(net, options, message):
    """With the bytes it needs and the ways out."""
    with pytest.raises(ValueError, match=message) as error:
        mk.KFAC(net, **options)
    assert all(part in str(error.value) for part in ("expected at most 8.59 GB", "group_size", "skip_layers"))
    assert not any(module._forward_hooks for module in net.modules())


@pytest.mark.parametrize(
    "way", [{"output": {"1": "diagonal"}}, {"output": {"1": 64}}, {"group_size": 64}, {"skip_layers": ["1"]}]
)
def test_each_way_out(way):
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 50_257))
    p = mk.KFAC(net, **way)
    net(torch.randn(2, 4)).sum().backward()
    p.step()
    assert bool(net[1].weight.grad.isfinite().all())


def test_the_limit_is_an_argument():
    net = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 40))
    needs = 3 * 4 * (40**2 + 5**2)
    assert mk.KFAC(net, max_layer_bytes=needs).covered().layers[1].megabytes == needs / 1e6
    with pytest.raises(ValueError, match="1 needs"):
        mk.KFAC(net, max_layer_bytes=needs - 1)
    assert mk.KFAC(net, max_layer_bytes=None).covered().share == 1
    with pytest.raises(ValueError, match="max_layer_bytes: expected at least 1, got 0"):
        mk.KFAC(net, max_layer_bytes=0)
