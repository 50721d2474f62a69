"""Models, training loop and report, on scikit-learn's digits."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mfac_kernels import training
from mfac_kernels.training import loop, optimizers, report
from mfac_kernels.training.datasets import Dataset, load

SGD = training.CHOSEN["sgd"]


@pytest.fixture(scope="module")
def digits() -> Dataset:
    pytest.importorskip("sklearn")
    return load("digits")


def compare(digits: Dataset, **changes: object) -> training.Comparison:
    arguments: dict[str, object] = {"steps": 5, "batch_size": 32, **changes}
    return training.compare(digits, "mlp", [SGD], **arguments)  # type: ignore[arg-type]


def test_resnet20_has_its_published_size() -> None:
    model = training.build_model("resnet20", 3, 10, (32, 32))
    assert sum(p.numel() for p in model.parameters()) == 269_722
    convolutions = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(convolutions) + 1 == 20  # and the linear layer


@pytest.mark.parametrize("name", list(training.MODELS))
@pytest.mark.parametrize(("channels", "size"), [(3, (32, 32)), (1, (8, 8)), (1, (28, 27))])
def test_models_take_every_image_size(name: str, channels: int, size: tuple[int, int]) -> None:
    model = training.build_model(name, channels, 7, size)
    logits = model(torch.randn(2, channels, *size).to(memory_format=torch.channels_last))
    assert logits.shape == (2, 7)
    logits.sum().backward()
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert parameter.grad.is_contiguous()


def test_unknown_model() -> None:
    with pytest.raises(ValueError, match="unknown model 'vgg': expected one of resnet20"):
        training.build_model("vgg", 3, 10, (32, 32))


def test_training_learns(digits: Dataset) -> None:
    (run,) = compare(digits, steps=60, batch_size=128).results
    assert run.final_loss < 0.5 * run.losses[0]
    assert run.accuracy > 0.8
    assert [point.step for point in run.evaluations] == [8, 15, 22, 30, 38, 45, 52, 60]
    assert run.evaluations[-1].images == len(digits.test_images)
    assert len(run.losses) == len(run.step_seconds) == len(run.preconditioner_seconds) == 60


def test_seeded_runs_are_identical(digits: Dataset) -> None:
    state = torch.random.get_rng_state()
    first, second, other = (compare(digits, seed=seed).results[0] for seed in (1, 1, 2))
    assert first.losses == second.losses
    assert first.accuracy == second.accuracy
    assert first.losses != other.losses
    assert torch.equal(torch.random.get_rng_state(), state)


def test_every_run_starts_alike(digits: Dataset) -> None:
    configs = [SGD, replace(SGD, lr=0.3)]
    first, second = training.compare(digits, "mlp", configs, steps=3, batch_size=32).results
    assert first.losses[0] == second.losses[0]
    assert first.losses[1:] != second.losses[1:]


def test_the_learning_rate_decays_linearly(digits: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = []
    step = torch.optim.SGD.step

    def noting(self: torch.optim.SGD) -> None:
        rates.append(self.param_groups[0]["lr"])
        step(self)

    monkeypatch.setattr(torch.optim.SGD, "step", noting)
    compare(digits, steps=4)
    lr = SGD.lr
    assert rates == pytest.approx([lr, 0.75 * lr, 0.5 * lr, 0.25 * lr])


def test_preconditioner_acts_between_backward_and_step(digits: Dataset) -> None:
    class ZeroingConfig(training.SGDConfig):
        def build(self, model: torch.nn.Module) -> optimizers.Built:
            def zero_gradients() -> None:
                for parameter in model.parameters():
                    assert parameter.grad is not None
                    parameter.grad.zero_()

            return torch.optim.SGD(model.parameters(), lr=1.0), zero_gradients

    model = training.build_model("mlp", 1, 10, (8, 8))
    before = [p.clone() for p in model.parameters()]
    run = training.train(model, digits, ZeroingConfig(lr=1.0), steps=2, batch_size=8)
    assert all(map(torch.equal, before, model.parameters()))
    assert all(0 < part < whole for part, whole in zip(run.preconditioner_seconds, run.step_seconds, strict=True))
    assert 0 < run.preconditioner_share < 1


def test_others_beside_sgd(digits: Dataset) -> None:
    configs = list(training.CHOSEN.values())
    sgd, *others = training.compare(digits, "mlp", configs, steps=40, batch_size=64).results
    assert sgd.preconditioner_share == 0
    for run in others:
        assert sgd.losses[0] == run.losses[0]
        assert run.final_loss < run.losses[0]
        assert (0 < run.preconditioner_share < 1) == (run.config.name != "adam")


def test_steps_from_a_budget(digits: Dataset) -> None:
    comparison = compare(digits, steps=None, budget=2.0)
    assert comparison.steps >= 1
    assert comparison.budget == 2.0
    assert comparison.steps <= 100 * 1438 // 32
    with pytest.raises(ValueError, match=r"a budget of 1e-06 s is too small: one step needs"):
        compare(digits, steps=None, budget=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "at least 1 step, got 0"),
        ({"batch_size": 1439}, r"batch size from 1 to 1438 \(digits\), got 1439"),
        ({"batch_size": 0}, "batch size from 1"),
        ({"steps": None}, "either steps or budget"),
        ({"budget": 3.0}, "either steps or budget"),
    ],
)
def test_bad_arguments(digits: Dataset, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare(digits, **changes)


def test_batches_cover_an_epoch_without_repeats() -> None:
    batches = loop._batches(10, 3, torch.Generator().manual_seed(0))
    epoch = torch.cat([next(batches) for _ in range(3)])
    assert len(set(epoch.tolist())) == 9
    following = torch.cat([next(batches) for _ in range(3)])
    assert len(set(following.tolist())) == 9
    assert not torch.equal(epoch, following)


def test_chosen_settings_are_of_the_grid() -> None:
    for name, config in training.CHOSEN.items():
        assert config.name == name
        assert config in training.GRID[name]
        assert all(other.name == name for other in training.GRID[name])


def test_report_writes_three_files(digits: Dataset, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    comparison = compare(digits)
    paths = training.write_report(comparison, tmp_path / "new" / "folder")
    assert [path.name for path in paths] == ["results.json", "report.md", "curves.png"]
    content = json.loads(paths[0].read_text())
    assert content["runs"][0]["losses"] == comparison.results[0].losses
    assert content["runs"][0]["lr"] == SGD.lr
    assert content["seed"] == 0
    assert content["dataset"] == "digits"
    assert len(content["settings_chosen_from"]["sgd"]) == len(training.GRID["sgd"])
    text = paths[1].read_text()
    for expected in (training.format_table(comparison), SGD.settings, torch.__version__, "seed 0"):
        assert expected in text
    assert paths[2].read_bytes().startswith(b"\x89PNG")


def test_report_of_a_diverged_run(digits: Dataset, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    comparison = training.compare(digits, "mlp", [replace(SGD, lr=1e30), SGD], steps=5, batch_size=32)
    assert math.isnan(comparison.results[0].final_loss)
    path = training.write_report(comparison, tmp_path)[0]
    assert json.loads(path.read_text())["runs"][0]["final_loss"] is None
    assert "diverged" in training.format_table(comparison)
    assert report.best_of(comparison) == {"sgd": SGD}


def test_grid_report_names_the_best(digits: Dataset, tmp_path: Path) -> None:
    comparison = training.compare(digits, "mlp", training.GRID["sgd"], steps=5, batch_size=32, evaluations=1)
    best = min(comparison.results, key=lambda run: run.final_loss).config
    paths = training.write_grid(comparison, tmp_path)
    assert [path.name for path in paths] == ["grid.json", "grid.md"]
    assert json.loads(paths[0].read_text())["best"]["sgd"]["lr"] == best.lr
    assert f"Best SGD: {best.settings}." in paths[1].read_text()


def test_smoothing_keeps_constants_and_length() -> None:
    values = torch.full((101,), 2.5).double().numpy()
    assert report._smooth(values) == pytest.approx(values)
    assert len(report._smooth(values[:1])) == 1
