"""The command line: exit codes, messages and files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mfac_kernels import cli
from mfac_kernels.training import datasets

load = datasets.load


@pytest.fixture(autouse=True)
def same_number_of_threads() -> object:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def unavailable(name: str, data_dir: Path | None = None) -> datasets.Dataset:
    """Stands for datasets.load on a machine without a network."""
    if name == "digits":
        return load(name)
    raise datasets.DatasetUnavailable(f"cannot fetch {name}: no network")


@pytest.mark.parametrize("command", [[], ["info"], ["train"], ["prune"], ["pinn"], ["bench"]])
def test_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main([*command, "--help"])
    assert exit_.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: mfac-kernels")
    assert command == ["info"] or "examples:" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: COMMAND"),
        (["fly"], "invalid choice: 'fly'"),
        (["train", "--steps", "0"], "at least 1, got '0'"),
        (["train", "--budget", "-3"], "above 0, got '-3'"),
        (["train", "--budget", "nan"], "above 0, got 'nan'"),
        (["train", "--steps", "3", "--budget", "3"], "not allowed with"),
        (["train", "--optimizers", "sgd,lion"], "unknown optimizer 'lion': choose from sgd, adam, mfac"),
        (["train", "--data", "imagenet"], "invalid choice: 'imagenet'"),
    ],
)
def test_wrong_usage(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert cli.main(["info", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert [line.split()[0] for line in lines] == list(content)


def test_train_writes_its_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for module in ("sklearn", "matplotlib", "tqdm"):
        pytest.importorskip(module)
    out = tmp_path / "demo"
    command = f"train --data digits --steps 5 --optimizers sgd,adam,mfac,kfac --batch-size 32 --out {out}"
    assert cli.main([*command.split(), "--seed", "3", "--threads", "1"]) == 0
    assert {path.name for path in out.iterdir()} == {"results.json", "report.md", "curves.png"}
    content = json.loads((out / "results.json").read_text())
    assert content["seed"] == 3
    assert content["threads"] == 1
    assert [run["optimizer"] for run in content["runs"]] == ["sgd", "adam", "mfac", "kfac"]
    report = (out / "report.md").read_text()
    assert "- Adam: the best of its grid (benchmarks/results/cifar10_grid_adam.md)" in report
    assert "- K-FAC: the best of its grid (benchmarks/results/cifar10_grid_kfac.md)" in report
    assert all(len(run["losses"]) == content["steps"] == 5 for run in content["runs"])
    shown = capsys.readouterr().out
    assert all(f"| {label} " in shown for label in ("SGD", "Adam", "M-FAC", "K-FAC"))


def test_train_with_a_grid(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("tqdm")
    command = f"train --data digits --steps 2 --grid --optimizers sgd --out {tmp_path}"
    assert cli.main(command.split()) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"grid.json", "grid.md"}
    assert len(json.loads((tmp_path / "grid.json").read_text())["runs"]) == 3


@pytest.mark.parametrize("arguments", [[], ["--data", "cifar10", "--fallback"]])
def test_digits_stand_in_for_cifar10(
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for module in ("sklearn", "matplotlib", "tqdm"):
        pytest.importorskip(module)
    monkeypatch.setattr(datasets, "load", unavailable)
    command = f"train --steps 2 --optimizers sgd --out {tmp_path}"
    assert cli.main([*command.split(), *arguments]) == 0
    errors = capsys.readouterr().err
    assert "cannot fetch cifar10: no network" in errors
    assert "running on digits instead" in errors
    assert "in place of cifar10" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize("arguments", [["--data", "cifar10"], ["--data-dir", "somewhere"]])
def test_no_stand_in_for_what_was_asked(
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(datasets, "load", unavailable)
    assert cli.main(["train", "--out", str(tmp_path), *arguments]) == 1
    assert capsys.readouterr().err == "mfac-kernels: error: cannot fetch cifar10: no network\n"


def test_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    blocked = tmp_path / "file"
    blocked.write_text("")
    cases = {
        f"train --data digits --out {blocked}": "exists",
        f"train --data digits --budget 1e-6 --out {tmp_path}": "too small",
        f"train --data cifar10 --data-dir {tmp_path} --out {tmp_path}": "cifar-10-batches-py",
    }
    cases[f"train --device nowhere --data digits --steps 1 --out {tmp_path}"] = "--device nowhere: "
    cases[f"train --device meta --data digits --steps 1 --out {tmp_path}"] = "--device meta: "
    if not torch.cuda.is_available():
        cases[f"train --device cuda --out {tmp_path}"] = "finds no CUDA device"
    for command, message in cases.items():
        assert cli.main(command.split()) == 1
        error = capsys.readouterr().err
        assert error.startswith("mfac-kernels: error: ")
        assert message in error
        assert error.count("\n") == 1


def test_interrupt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(name: str, data_dir: Path | None = None) -> datasets.Dataset:
        raise KeyboardInterrupt

    monkeypatch.setattr(datasets, "load", interrupted)
    assert cli.main(["train", "--out", str(tmp_path)]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_bench_outside_a_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "site-packages" / "cli.py"))
    assert cli.main(["bench"]) == 1
    assert "source repository" in capsys.readouterr().err


def test_bench_hands_on_to_pytest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pytest_benchmark")
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "bench_nothing.py").write_text("def test_good(): pass\ndef test_bad(): assert False\n")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench", "--", "-k", "good"]) == 0
    assert cli.main(["bench"]) == 1
