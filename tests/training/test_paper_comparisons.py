"""`make paper-twolevel` and `make paper-relatives` from end to end at a tiny size, on scikit-learn's digits; what their
measurements are made of."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import paper_relatives
import paper_runs
import paper_twolevel
import pytest
import relatives_runs
import torch
from paper_problems import Bernoulli, Categorical, Data, Problem, autoencoder, deep_linear
from paper_report import minimum
from paper_runs import KFAC, PLAIN, Run
from paper_twolevel_report import write_report
from torch import nn
from two_level_cases import Case, cut
from two_level_probe import energy, natural_gradient
from two_level_runs import CONTENDERS, CORRECTED, TSELEPIDIS

from mfac_kernels.training import datasets


def digits(reconstruct: bool) -> Data:
    pytest.importorskip("sklearn")
    data = datasets.load("digits")
    x = data.train_images.flatten(1) / 255
    return Data(x, x if reconstruct else data.train_labels, "digits")


TINY = {
    "codes": Problem(
        "An autoencoder of digits",
        lambda: autoencoder([64, 16, 4]),
        lambda: digits(True),
        Bernoulli(),
        images=128,
        batch=32,
        epochs=9,
        grid_steps=9,
        loss="cross-entropy of a pixel",
        pixels=64,
    ),
    "linear": Problem(
        "Three linear layers",
        lambda: deep_linear(64, 10, depth=3, width=5),
        lambda: digits(False),
        Categorical(),
        images=96,
        batch=32,
        epochs=9,
        grid_steps=9,
        loss="cross-entropy",
    ),
}


def run(out: Path, *more: str, study: paper_runs.Study = paper_twolevel.STUDY) -> dict[str, object]:
    study = replace(study, problems=TINY, rates=(0.001,))
    paper_runs.main(study, None, ["--out", str(out), "--epochs", "2", "--grid-steps", "1", *more])
    return json.loads((out / f"{study.name}.json").read_text())


def test_end_to_end_and_resumed(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    first = run(tmp_path, "--problems", "codes", "--seeds", "1")
    shown = capsys.readouterr().out
    assert (
        "about" in shown
        and f"s left  codes, K-FAC, lr 0.001, damping {paper_runs.DAMPINGS[0]:g}, search: loss" in shown
    )
    both = run(tmp_path, "--seeds", "1")
    assert both["runs"][: len(first["runs"])] == first["runs"]  # nothing is repeated
    final = [Run(**r) for r in both["runs"] if not r["searching"]]
    assert [(r.problem, r.contender) for r in final] == [(p, c) for p in TINY for c in CONTENDERS]
    for r in final:
        assert r.steps == 2 * TINY[r.problem].steps_per_epoch <= len(r.losses) == len(r.seconds)
        exact = r.contender in CORRECTED and r.contender != TSELEPIDIS
        assert len(r.gains) == (r.steps if r.contender in CORRECTED else 0) and (not exact or min(r.gains) > 0)
        assert len(r.shares) == (3 if r.contender in CORRECTED else 0)
        # A share is a difference of energies, of products in float32: below a few roundings it has no sign.
        assert not exact or min(r.shares) > -16 * torch.finfo(torch.float32).eps
    text = (tmp_path / "twolevel.md").read_text()
    for problem in TINY.values():
        assert f"## {problem.title}" in text
    assert text.count("The paper's conclusion is ") == text.count("The error in the F-norm falls in all of the ") == 2
    assert (tmp_path / "twolevel.png").read_bytes().startswith(b"\x89PNG")

    def repeated(*_: object) -> None:
        raise AssertionError("a run that is in the file")

    monkeypatch.setattr(paper_runs, "train", repeated)
    assert run(tmp_path, "--seeds", "1")["runs"] == both["runs"]


def test_relatives_of_two_processes_put_together(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    parts = []
    for name in TINY:
        run(tmp_path / name, "--problems", name, "--seeds", "1", study=paper_relatives.STUDY)
        parts.append(str(tmp_path / name / "relatives.json"))
    monkeypatch.setattr(paper_runs, "train", None)
    runs = run(tmp_path, "--seeds", "1", "--merge", *parts, study=paper_relatives.STUDY)["runs"]
    final = [Run(**r) for r in runs if not r["searching"]]
    assert [(r.problem, r.contender) for r in final] == [(p, c) for p in TINY for c in relatives_runs.CONTENDERS]
    for r in final:
        assert (len(r.losses) == r.steps) or (r.contender in PLAIN and len(r.losses) > r.steps)
    text = (tmp_path / "relatives.md").read_text()
    assert all(f"## {problem.title}" in text for problem in TINY.values())
    assert text.count("At equal epochs lower than K-FAC's by more than two deviations of the seeds: ") == len(TINY)
    assert "- K-BFGS: outperforms or performs comparably" in text
    assert (tmp_path / "relatives.png").read_bytes().startswith(b"\x89PNG")


def test_unknown_problem(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(tmp_path, "--problems", "codes,mnist")
    assert "--problems: expected some of codes, linear, got 'mnist'" in capsys.readouterr().err


def test_minimum_of_epochs():
    problem = TINY["linear"]  # three steps an epoch
    losses, seconds = [4.0, 3.0, 5.0, 2.0, 2.0, 2.0, 0.0], [1.0] * 7
    r = Run("linear", "SGD", 0.1, None, 0, 6, False, losses=losses, seconds=seconds)
    assert minimum(problem, r, steps=6) == 2
    assert minimum(problem, r) == pytest.approx(4 / 3)
    assert minimum(problem, r, seconds=4.5) == pytest.approx(10 / 3)
    assert minimum(problem, r, seconds=2.5) == float("inf")
    r.seconds = [0.1] * 7
    assert minimum(problem, r, seconds=math.fsum([0.1] * 3)) == 4  # one after the other these are more than 0.3


@pytest.mark.parametrize("failing", [KFAC, CORRECTED[1], "SGD"])
def test_runs_that_diverge_are_told(failing, tmp_path):
    """In the first epoch; none of what is computed from them stops the report."""
    pytest.importorskip("matplotlib")
    problem = replace(TINY["linear"], epochs=2)
    runs = []
    for contender in CONTENDERS:
        for seed, searching in ((0, True), (0, False), (1, False)):
            steps = 2 if contender == failing and not searching else 6
            ones = [1.0] * steps
            gains = ones if contender in CORRECTED else []
            runs.append(Run("linear", contender, 0.1, 0.1, seed, 6, searching, "", ones, ones, gains))
    text = write_report({"linear": problem}, runs, {}, tmp_path)
    row = next(line for line in text.splitlines() if line.startswith(f"| {failing} |"))
    assert "| no whole epoch, then 2 diverged |" in row
    assert (f"diverges with {CORRECTED[1]}" in text) == (failing == CORRECTED[1])


def test_energies_are_errors_and_conjugate_gradients_find_their_least():
    case = Case("convolutional", coarse_space="residual")
    other = Case("convolutional", coarse_space="residual")
    net, p = other.net, other.p
    net.zero_grad()
    nn.functional.cross_entropy(net(other.x), torch.arange(7) * 7 % 3).backward()
    jacobian = p._batch.jacobian(None, torch.float64, torch.device("cpu"))
    gradient, first, step, best = (cut(v, case.shapes) for v in (case.gradient, case.first, case.step, case.best))
    damping = p.fisher.damping
    errors = [energy(jacobian, damping, gradient, x) for x in (first, step, best)]
    assert errors[0] - errors[1] == pytest.approx(case.lowered())
    assert errors[0] - errors[2] == pytest.approx(case.norm(case.first))
    found = natural_gradient(jacobian, damping, gradient, tolerance=1e-9)
    for a, b in zip(found, best, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
