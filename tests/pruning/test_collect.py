"""Gradients for a Fisher: what a row is, how many count, memory, files that go on."""

from __future__ import annotations

import pruning_cases
import pytest
import torch
import torch.nn.functional as F
from pruning_cases import loss
from torch import Tensor, nn

import mfac_kernels as mk
from mfac_kernels.pruning import collect


def network() -> nn.Module:
    return pruning_cases.network(channels=3, classes=4)


def batches(count: int = 3, size: int = 4) -> list[tuple[Tensor, Tensor]]:
    return pruning_cases.batches(count, size, classes=4)


def by_backward(model: nn.Module, batch: object) -> Tensor:
    model.zero_grad()
    loss(model, batch).backward()
    rows = [p.grad.reshape(-1) for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return torch.cat(rows)


def test_rows_are_gradients_of_batches():
    model = network()
    got = collect(model, loss, batches(), 3)
    want = torch.stack([by_backward(model, batch) for batch in batches()])
    torch.testing.assert_close(got.rows, want)
    assert got.names == tuple(name for name, _ in model.named_parameters()) and got.skipped == 0
    assert all(p.grad is None for p in model.parameters()) and not model.training


@pytest.mark.parametrize("each", ["sample", "loop"])
def test_rows_are_gradients_of_samples(each):
    """As many as asked for, from within a batch."""
    model = network()
    samples = [(x[i : i + 1], y[i : i + 1]) for x, y in batches() for i in range(4)]
    want = torch.stack([by_backward(model, sample) for sample in samples[:10]])
    torch.testing.assert_close(collect(model, loss, batches(), 10, each=each).rows, want)
    mean = collect(model, loss, batches(), 1).rows[0]
    torch.testing.assert_close(collect(model, loss, batches(), 4, each=each).rows.mean(0), mean)


def test_batches_may_be_nested():
    model = network()
    nested = [{"x": x, "more": [y]} for x, y in batches()]

    def of(model: nn.Module, batch: dict) -> Tensor:
        return loss(model, [batch["x"], batch["more"][0]])

    want = collect(model, loss, batches(), 12, each="sample").rows
    for each in ("sample", "loop"):
        torch.testing.assert_close(collect(model, of, nested, 12, each=each).rows, want)


def test_chosen_parameters_and_masks():
    """Parameters that the loss does not reach have zero gradients."""
    model = network()
    model.extra = nn.Parameter(torch.ones(2, 2))

    def of(model: nn.Module, batch: list[Tensor]) -> Tensor:
        x = batch[0]
        for layer in list(model.children()):
            x = layer(x)
        return F.cross_entropy(x, batch[1])

    mask = torch.arange(48).view(4, 12) % 3 == 0
    for each in ("batch", "sample"):
        whole = collect(model, of, batches(), 3, names=["4.weight", "extra"], each=each).rows
        assert torch.equal(whole[:, 48:], torch.zeros(3, 4)) and bool((whole[:, :48] != 0).any())
        got = collect(model, of, batches(), 3, names=["4.weight", "extra"], masks={"4.weight": mask}, each=each)
        assert got.names == ("4.weight", "extra") and got.rows.shape == (3, 20)
        assert torch.equal(got.rows, torch.cat([whole[:, :48:3], whole[:, 48:]], dim=1))


def test_the_number_used_is_the_number_divided_by():
    """Batches that end early and gradients that are not finite: F is a mean over what there is."""
    model = network()
    spoiled = batches(5)
    spoiled[1] = (spoiled[1][0] * float("nan"), spoiled[1][1])
    got = collect(model, loss, spoiled, 100)
    assert (len(got.rows), got.skipped) == (4, 1)
    fisher = got.fisher(0.1)
    assert fisher.ngrads == fisher.count == 4
    want = torch.linalg.inv(0.1 * torch.eye(got.rows.shape[1]).double() + got.rows.double().mT @ got.rows.double() / 4)
    assert float((fisher.submatrix(torch.arange(len(want))) - want).norm()) <= 1e-10 * float(want.norm())


def test_memory():
    model = network()
    dim = sum(p.numel() for p in model.parameters())
    whole = collect(model, loss, batches(), 10, each="sample", memory=40 * dim)
    assert torch.equal(whole.rows, collect(model, loss, batches(), 10, each="sample").rows)
    with pytest.raises(ValueError, match=rf"^memory: expected at least {40 * dim} bytes for 10 .*enough for 9\)"):
        collect(model, loss, batches(), 10, memory=40 * dim - 1)
    narrow = collect(model, loss, batches(), 10, each="sample", memory=20 * dim, dtype=torch.bfloat16)
    assert torch.equal(narrow.rows, whole.rows.bfloat16())


def test_pages_are_within_the_memory(tmp_path, gradients):
    model = network()
    dim = sum(p.numel() for p in model.parameters())
    got = collect(model, loss, batches(), 12, each="sample", memory=4 * 12 * 10, path=tmp_path)
    assert got.rows.shape == (12, dim)
    fisher = got.fisher(0.1)
    assert fisher._rows._page_size == 10
    x = gradients(1, dim)[0]
    torch.testing.assert_close(fisher.ihvp(x), mk.StaticFisher(got.rows.clone(), 0.1).ihvp(x))


class Interrupted(Exception):
    pass


def broken(after: int, count: int = 5) -> object:
    for i, batch in enumerate(batches(count)):
        if i == after:
            raise Interrupted
        yield batch


@pytest.mark.parametrize("each", ["batch", "sample"])
def test_a_collection_goes_on(each, tmp_path):
    model = network()
    count = {"batch": 5, "sample": 18}[each]
    want = collect(model, loss, batches(5), count, each=each).rows
    for after in (2, 4):
        with pytest.raises(Interrupted):
            collect(model, loss, broken(after), count, each=each, path=tmp_path)
    calls = []

    def counted(model: nn.Module, batch: list[Tensor]) -> Tensor:
        calls.append(1)
        return loss(model, batch)

    got = collect(model, counted, batches(5), count, each=each, path=tmp_path)
    assert torch.equal(got.rows, want) and len(calls) == 1
    assert torch.equal(collect(model, counted, batches(5), count, each=each, path=tmp_path).rows, want)
    assert len(calls) == 1  # complete


def test_other_weights_do_not_go_on(tmp_path):
    model = network()
    collect(model, loss, batches(), 3, path=tmp_path)
    with torch.no_grad():
        model[4].weight[0, 0] += 1
    with pytest.raises(ValueError, match=r"^path: expected gradients of .*, got .*"):
        collect(model, loss, batches(), 3, path=tmp_path)


def test_a_bar(capsys):
    pytest.importorskip("tqdm")
    collect(network(), loss, batches(), 3, progress=True)
    assert "/3 [" in capsys.readouterr().err


ROWS = [
    ({"count": 0}, ValueError, "count: expected at least 1, got 0"),
    ({"each": "token"}, ValueError, "each: expected 'batch', 'sample' or 'loop', got 'token'"),
    ({"dtype": torch.int32}, TypeError, "dtype: expected float32, .*, got torch.int32"),
    ({"names": ["x"]}, ValueError, "names: expected parameters of the model, got 'x'"),
    ({"names": []}, ValueError, "names: expected at least one parameter"),
    ({"batches": []}, ValueError, r"batches: expected a finite gradient, got none \(0 were not finite\)"),
    ({"batches": [("a", "b")], "each": "sample"}, TypeError, "batches: expected tensors in tuples, .*, got str"),
    ({"loss": lambda model, batch: model(batch[0])}, ValueError, r"loss: expected a scalar tensor, got \(4, 4\)"),
    ({"memory": 0}, ValueError, "memory: expected at least 1, got 0"),
]


@pytest.mark.parametrize(("change", "kind", "message"), ROWS, ids=[row[2] for row in ROWS])
def test_a_bad_argument(change, kind, message):
    arguments = {"model": network(), "loss": loss, "batches": batches(), "count": 3, **change}
    with pytest.raises(kind, match=f"^{message}"):
        collect(**arguments)


def test_batch_statistics_have_no_gradients_of_samples():
    with pytest.raises(
        ValueError, match=r"^each: expected 'batch' where batch statistics are used \(1\), got 'sample'"
    ):
        collect(network().train(), loss, batches(), 3, each="sample")
    collect(network().train(), loss, batches(), 3)
