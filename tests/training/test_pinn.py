"""`mfac-kernels pinn` and `make paper-pinn` from end to end at a tiny size; what their equations and methods are."""

from __future__ import annotations

import json
from pathlib import Path

import paper_pinn
import pytest
import torch
from pinn_cases import by_autograd

from mfac_kernels import cli, pinn
from mfac_kernels.training.pinn.equations import EQUATIONS, Equation
from mfac_kernels.training.pinn.methods import METHODS
from mfac_kernels.training.pinn.report import format_errors, order
from mfac_kernels.training.pinn.runs import Run, read_runs, train


class Exact(torch.nn.Module):
    """The solution, for autograd."""

    def __init__(self, equation: Equation) -> None:
        super().__init__()
        self.equation = equation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.equation.solution(x.view(-1, self.equation.inputs)).view(*x.shape[:-1], 1)


@pytest.mark.parametrize("name", EQUATIONS)
def test_the_solutions_solve(name):
    """float64: sums of at most 10 terms of order 10."""
    equation = EQUATIONS[name]
    terms = equation.terms(torch.Generator().manual_seed(0))
    for condition, x in terms:
        weights = torch.ones(equation.inputs, dtype=x.dtype) if condition.weights is None else condition.weights
        rows = by_autograd(Exact(equation), x[:50], weights)
        assert float(condition.residual(x[:50], rows).abs().max()) < 1e-12
    border = terms[1][1]
    assert bool(((border == 0) | (border == 1)).any(1).all())
    assert not equation.time or not bool((border[:, 0] == 1).any())
    assert equation.error(Exact(equation)) == 0
    assert equation.error(equation.network(0)) > 0.1


@pytest.mark.parametrize("name", METHODS)
def test_every_method_lowers_the_loss(name):
    equation, method = EQUATIONS["poisson-2d"], METHODS[name]
    net = equation.network(0)
    terms = equation.terms(torch.Generator().manual_seed(0))
    step = method.build(net, equation, method.values[len(method.values) // 2])
    first = float(step(terms))
    for _ in range(3):
        step(terms)
    assert float(pinn.loss_of(net, terms).detach()) < first


def test_runs_of_one_seed_are_alike_and_divergence_is_told():
    runs = [Run("poisson-2d", "adam", 1e-3, seed, 1e-9) for seed in (0, 0, 1)]
    for run in runs:
        train(run, redraw=None)
    assert all(run.steps == 1 and len(run.errors) == len(run.seconds) == len(run.losses) == 2 for run in runs)
    assert runs[0].errors == runs[1].errors != runs[2].errors
    lost = Run("poisson-2d", "sgd", 1e9, 0, 1.0)
    train(lost, redraw=1)
    assert lost.diverged and lost.error == float("inf") and lost.seconds[-1] < 1.0
    assert "| diverged" in format_errors("poisson-2d", [lost])


def test_the_order_is_told():
    def run(method: str, error: float) -> Run:
        return Run("heat", method, 1.0, 0, 1.0, errors=[1.0, error], losses=[1.0, 1.0], seconds=[0.0, 1.0], steps=1)

    runs = [run("adam", 1e-2), run("engd", 1e-6), run("kfac*", 1e-4)]
    seen = "Order: ENGD, K-FAC*, Adam. The authors' order is seen."
    assert order("heat", runs) == seen
    runs[0] = run("adam", 1e-5)
    part = "Order: ENGD, Adam, K-FAC*. The authors' order is seen in part: Adam is before K-FAC*."
    assert order("heat", runs) == part
    assert order("heat", runs[:2]) == "Order: ENGD, Adam."


def command(out: Path, *more: str) -> list[str]:
    return ["--methods", "adam,kfac*,engd", "--budget", "0.05", "--search", "0.01", "--out", str(out), *more]


def test_the_command(tmp_path, capsys):
    for module in ("matplotlib", "tqdm"):
        pytest.importorskip(module)
    threads = torch.get_num_threads()
    assert cli.main(["pinn", *command(tmp_path, "--threads", "1")]) == 0
    torch.set_num_threads(threads)
    assert "| K-FAC*" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"pinn.json", "pinn.md", "pinn.png"}
    runs = read_runs(tmp_path / "pinn.json")
    assert len([run for run in runs if not run.searching]) == 3 and len([run for run in runs if run.searching]) == 12
    text = (tmp_path / "pinn.md").read_text()
    assert "Order: " in text and "the authors' own records" in text and "The search" in text
    assert (tmp_path / "pinn.png").read_bytes().startswith(b"\x89PNG")


def test_the_paper_run_is_resumed_and_merged(tmp_path):
    for module in ("matplotlib", "tqdm"):
        pytest.importorskip(module)
    parts = [tmp_path / name for name in ("poisson-2d", "heat")]
    for out in parts:
        paper_pinn.main(command(out, "--equation", out.name, "--seeds", "1", "--search", "0"))
    first = (parts[1] / "pinn.json").read_text()
    paper_pinn.main(command(parts[1], "--equation", "heat", "--seeds", "1", "--search", "0"))
    assert json.loads((parts[1] / "pinn.json").read_text())["runs"] == json.loads(first)["runs"]
    paper_pinn.main(["--merge", *map(str, parts), "--out", str(tmp_path / "all")])
    assert [run.equation for run in read_runs(tmp_path / "all" / "pinn.json")] == ["poisson-2d"] * 3 + ["heat"] * 3
    other = json.loads(first)
    other["conditions"]["budget"] = "another"
    (parts[1] / "pinn.json").write_text(json.dumps(other))
    with pytest.raises(SystemExit, match="heat: expected the conditions"):
        paper_pinn.main(["--merge", *map(str, parts), "--out", str(tmp_path / "all")])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--equation", "wave"], "unknown equation 'wave': choose from poisson-2d"),
        (["--methods", "newton"], "unknown method 'newton': choose from sgd"),
        (["--budget", "0"], "a number above 0, got '0'"),
        (["--search", "-1"], "a number of at least 0, got '-1'"),
    ],
)
def test_wrong_usage(arguments, message, capsys):
    with pytest.raises(SystemExit):
        cli.main(["pinn", *arguments])
    assert message in capsys.readouterr().err
