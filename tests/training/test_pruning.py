"""The pruning report: checkpoints, methods on the way to a sparsity, the command's files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from mfac_kernels import cli
from mfac_kernels.training import datasets, pruning
from mfac_kernels.training.checkpoints import CifarResNet, load_checkpoint
from mfac_kernels.training.models import ResNet20, build_model
from mfac_kernels.training.pruning_report import format_accuracies


def torchvision_state(projection: bool) -> dict[str, torch.Tensor]:
    """One block a stage, widths 4, 8, 8."""

    def block(name: str, channels: int, width: int, projected: bool) -> dict[str, torch.Tensor]:
        state = {f"{name}.conv1.weight": torch.randn(width, channels, 3, 3)}
        state[f"{name}.conv2.weight"] = torch.randn(width, width, 3, 3)
        norms = [f"{name}.bn1", f"{name}.bn2"]
        if projected:
            state[f"{name}.downsample.0.weight"] = torch.randn(width, channels, 1, 1)
            norms.append(f"{name}.downsample.1")
        for norm in norms:
            state.update({f"{norm}.{k}": v for k, v in nn.BatchNorm2d(width).state_dict().items()})
        return state

    state = {"conv1.weight": torch.randn(4, 3, 3, 3), "fc.weight": torch.randn(5, 8), "fc.bias": torch.randn(5)}
    state.update({f"bn1.{k}": v for k, v in nn.BatchNorm2d(4).state_dict().items()})
    return {
        **state,
        **block("layer1.0", 4, 4, False),
        **block("layer2.0", 4, 8, projection),
        **block("layer3.0", 8, 8, projection),
    }


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("projection", [False, True])
def test_checkpoints_in_torchvision_s_names(projection, wrapped, tmp_path):
    state = torchvision_state(projection)
    torch.save({"state_dict": state, "epoch": 3} if wrapped else state, tmp_path / "net.pt")
    checkpoint = load_checkpoint(tmp_path / "net.pt")
    assert isinstance(checkpoint.model, CifarResNet) and not checkpoint.model.training
    assert checkpoint.scale == (0.5, 0.5)
    assert all(torch.equal(value, state[name]) for name, value in checkpoint.model.state_dict().items())
    assert checkpoint.model(torch.randn(2, 3, 16, 16)).shape == (2, 5)
    assert checkpoint.model.layer2(torch.randn(2, 4, 16, 16)).shape == (2, 8, 8, 8)


def test_checkpoints_of_the_demonstration(tmp_path):
    model = ResNet20(3, 7).eval()
    torch.save(model.state_dict(), tmp_path / "net.pt")
    checkpoint = load_checkpoint(tmp_path / "net.pt")
    x = torch.randn(2, 3, 8, 8)
    assert checkpoint.scale is None and torch.equal(checkpoint.model(x), model(x))


def test_files_that_are_no_checkpoints(tmp_path):
    path = tmp_path / "net.pt"
    for content, message in (
        ([1, 2], "expected a dict of tensors"),
        ({"a": 1}, "expected a dict of tensors"),
        ({"weight": torch.ones(2)}, "expected a ResNet in the demonstration's names .*, got weight"),
        ({**torchvision_state(True), "layer1.0.conv2.weight": torch.ones(1)}, "size mismatch"),
    ):
        torch.save(content, path)
        with pytest.raises(ValueError, match=rf"(?s)^{path}: .*{message}"):
            load_checkpoint(path)
    path.write_bytes(b"no archive")
    with pytest.raises(ValueError, match=f"^{path}: expected a file of torch.save, got"):
        load_checkpoint(path)
    with pytest.raises(FileNotFoundError):
        load_checkpoint(tmp_path / "missing.pt")


@pytest.fixture(scope="module")
def subject() -> pruning.Subject:
    pytest.importorskip("sklearn")
    data = datasets.load("digits")
    torch.manual_seed(0)
    return pruning.Subject(build_model("mlp", 1, 10, (8, 8)).eval(), data, test_images=100)


SETTING = pruning.Setting(ngrads=16, statistics_images=0, recomputations=4)


@pytest.mark.parametrize("name", ["magnitude", "diagonal", "50", "full"])
def test_the_same_seed_is_the_same_run(name, subject):
    before = {name: value.clone() for name, value in subject.model.state_dict().items()}
    method = pruning.parse_method(name)
    runs = []
    for _ in range(2):
        found = list(pruning.run(subject, method, SETTING, [0.5, 0.75], 3))
        assert [point.sparsity for point, _, _ in found] == pytest.approx([0.5, 0.75], abs=1e-3)
        runs.append([(point.pruned, point.sparsity) for point, _, _ in found])
        model, masks = found[-1][1:]
        assert all(torch.equal(model.get_parameter(n) != 0, mask) for n, mask in masks.items())
    assert runs[0] == runs[1]
    assert all(torch.equal(value, before[name]) for name, value in subject.model.state_dict().items())


def test_one_shot_starts_from_the_dense_network(subject):
    one_shot = pruning.Setting(ngrads=16, statistics_images=0, recomputations=0)
    shared = pruning.dense_gradients(subject, one_shot, 0)
    method = pruning.parse_method("full")
    _, (_, _, both) = pruning.run(subject, method, one_shot, [0.5, 0.75], gradients=shared)
    ((_, _, alone),) = pruning.run(subject, method, one_shot, [0.75], gradients=shared)
    assert all(torch.equal(both[n], alone[n]) for n in alone)


def test_fine_tuning_keeps_the_masks(subject):
    tuned = pruning.Setting(ngrads=16, statistics_images=0, recomputations=1, tuning_steps=3, batch_size=20)
    ((_, model, masks),) = pruning.run(subject, pruning.parse_method("full"), tuned, [0.6])
    assert all(torch.equal(model.get_parameter(n) != 0, mask) for n, mask in masks.items())
    assert not model.training


@pytest.mark.parametrize("temperature", [None, 1.0, 4.0])
@pytest.mark.parametrize("batch", [1, 8])
def test_gradients_of_the_network_s_own_distribution(subject, temperature, batch):
    setting = pruning.Setting(ngrads=10, gradient_batch=batch, temperature=temperature)
    rows = pruning.dense_gradients(subject, setting, 0).rows
    assert rows.shape == (10, 8832) and torch.equal(rows, pruning.dense_gradients(subject, setting, 0).rows)
    assert not torch.equal(rows, pruning.dense_gradients(subject, setting, 1).rows)


def test_labels_are_drawn_from_the_softened_distribution(subject):
    """Frequencies of the drawn labels, by the loss of a model that has one bias."""
    logits = torch.tensor([2.0, 0.0, -1.0]).requires_grad_()
    source = pruning.Likelihood(subject, pruning.Setting(temperature=2.0), torch.Generator().manual_seed(0))
    uniform = torch.rand(20_000, 3, generator=torch.Generator().manual_seed(1))
    noise = -(-uniform.log()).log()
    value = source.loss(lambda images: logits.expand(len(images), 3), (torch.empty(20_000), noise))
    want = torch.softmax(logits.detach() / 2, 0)
    (gradient,) = torch.autograd.grad(value, logits)  # (p - frequencies) / 2
    assert float((gradient * 2).abs().max()) < 5 * (0.25 / 20_000) ** 0.5  # five deviations
    assert value.item() == pytest.approx(float(-(want * want.log()).sum()), abs=0.02)


def test_recomputations_are_shared_out():
    assert pruning._recomputations(16, [0.5, 0.75, 0.9375]) == [4, 4, 8]
    assert pruning._recomputations(1, [0.5, 0.75]) == [1, 1] and pruning._recomputations(16, [0.8]) == [16]


def test_unknown_methods():
    for name in ("", "0", "-3", "obs"):
        with pytest.raises(ValueError, match=f"^unknown method '{name}': expected magnitude"):
            pruning.parse_method(name)


def test_a_table():
    point = pruning.Point("full", 0, 0.5, 0.5, 0.7, 0.8, 1.0)
    other = pruning.Point("full", 1, 0.5, 0.5, 0.7, 0.9, 1.0)
    lines = format_accuracies({"M-FAC": [point, other], "none": []}).splitlines()
    assert lines[2].split("|")[1:3] == [" 50%      ", " 85.0 \u00b1 7.1 "]
    assert "70.0 \u00b1 0.0" in format_accuracies({"M-FAC": [point, other]}, before_tuning=True)


def test_the_command_writes_its_files(tmp_path: Path, capsys):
    for module in ("sklearn", "matplotlib"):
        pytest.importorskip(module)
    out = tmp_path / "report"
    command = (
        f"prune --data digits --model mlp --train-steps 5 --methods magnitude,full --sparsities 0.8,0.5 --ngrads 8 "
        f"--recompute 2 --tune-steps 2 --save --out {out}"
    )
    assert cli.main(command.split()) == 0
    names = {"dense.pt", "full.pt", "full.masks.pt", "magnitude.pt", "magnitude.masks.pt"}
    assert {p.name for p in out.iterdir()} == names | {"pruning.json", "pruning.md", "pruning.png"}
    content = json.loads((out / "pruning.json").read_text())
    assert [point["target"] for point in content["tables"]["2 recomputations"]["M-FAC, full"]] == [0.5, 0.8]
    assert content["conditions"]["prunable weights"] == 8832
    assert "| 80%      |" in capsys.readouterr().out
    assert cli.main(f"prune --checkpoint {tmp_path / 'none.pt'} --out {out}".split()) == 1
    assert "none.pt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--sparsities 0.5,1", "expected numbers between 0 and 1"),
        ("--methods full,obs", "unknown method 'obs'"),
        ("--ngrads 0", "at least 1, got '0'"),
        ("--recompute -1", "at least 0, got '-1'"),
    ],
)
def test_wrong_usage(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["prune", *arguments.split()])
    assert exit_.value.code == 2 and message in capsys.readouterr().err
