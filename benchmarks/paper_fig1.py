"""Figure 1 of Laurent et al. 2018 on real CIFAR-10, at a size that two cores can run: `make paper-fig1`.

    SGD with batch normalization; K-FAC full; full, groups of 32; SUA; SUA, groups of 32

VGG-11 with batch normalization, inverses every 50 batches of 100, as in the paper; a quarter of its width, fewer images
and epochs. The learning rate decays linearly to zero. Each method's learning rate and damping are the best of a small
grid, by the mean loss of its last steps on one seed. Written to --out: fig1.png, fig1.md, fig1.json.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from provenance import commit

import mfac_kernels as mk
from mfac_kernels.preconditioners._gathering import Gatherer
from mfac_kernels.training import KFACConfig, OptimizerConfig, RunResult, SGDConfig, datasets, train
from mfac_kernels.training.models import vgg11

BATCH = 100
METHODS: dict[str, tuple[OptimizerConfig, dict[str, tuple[float, ...]]]] = {
    "SGD": (SGDConfig(lr=0.1), {"lr": (0.01, 0.03, 0.1)}),
    **{
        name: (
            KFACConfig(lr=0.01, inv_update_steps=50, spatial=spatial, group_size=group),
            {"lr": (0.001, 0.003, 0.01, 0.03), "damping": (0.003, 0.01, 0.03)},
        )
        for name, spatial, group in (
            ("K-FAC full", "full", None),
            ("K-FAC full, groups of 32", "full", 32),
            ("K-FAC SUA", "sua", None),
            ("K-FAC SUA, groups of 32", "sua", 32),
        )
    },
}


class Clock:
    """Seconds that K-FAC spends in factors, inversion and the rest of its step."""

    def __init__(self) -> None:
        self.seconds = {"factors": 0.0, "inversion": 0.0, "step": 0.0}

    def watch(self, owner: type, method: str, part: str) -> None:
        inner = getattr(owner, method)

        def timed(*arguments: Any, **keywords: Any) -> Any:
            start = time.perf_counter()
            try:
                return inner(*arguments, **keywords)
            finally:
                self.seconds[part] += time.perf_counter() - start

        setattr(owner, method, timed)

    def reset(self) -> None:
        for part in self.seconds:
            self.seconds[part] = 0.0


@dataclass
class Run:
    seed: int
    result: RunResult
    parts: dict[str, float]  # shares of the run's time


def run(
    config: OptimizerConfig,
    data: datasets.Dataset,
    width: int,
    steps: int,
    seed: int,
    clock: Clock,
    evaluations: int = 10,
) -> Run:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = vgg11(data.train_images.shape[1], len(data.classes), width)
    clock.reset()
    result = train(model, data, config, steps=steps, batch_size=BATCH, seed=seed, evaluations=evaluations)
    total = math.fsum(result.step_seconds)
    spent = dict(clock.seconds)
    spent["apply"] = spent.pop("step") - spent["inversion"]
    return Run(seed, result, {part: seconds / total for part, seconds in spent.items()})


def search(
    config: OptimizerConfig,
    grid: dict[str, tuple[float, ...]],
    data: datasets.Dataset,
    width: int,
    steps: int,
    clock: Clock,
) -> tuple[OptimizerConfig, list[dict[str, float]]]:
    """The best setting of the grid, and the loss of each."""
    settings: list[dict[str, float]] = [{}]
    for name, values in grid.items():
        settings = [{**s, name: value} for s in settings for value in values]
    losses = []
    for setting in settings:
        loss = run(replace(config, **setting), data, width, steps, 0, clock, 0).result.final_loss
        losses.append({**setting, "loss": loss})
        print(f"  {losses[-1]}", flush=True)
    best = min(losses, key=lambda s: s["loss"] if math.isfinite(s["loss"]) else math.inf)
    return replace(config, **{k: v for k, v in best.items() if k != "loss"}), losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--width", type=int, default=16, help="channels of the first layer; the paper's VGG-11 has 64")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--grid-steps", type=int, default=200)
    arguments = parser.parse_args()

    data = datasets.load("cifar10")
    data = replace(
        data, train_images=data.train_images[: arguments.images], train_labels=data.train_labels[: arguments.images]
    )
    clock = Clock()
    clock.watch(Gatherer, "on_forward", "factors")
    clock.watch(Gatherer, "on_backward", "factors")
    clock.watch(mk.KroneckerFisher, "refresh", "inversion")
    clock.watch(mk.KFAC, "step", "step")
    steps = arguments.epochs * (len(data.train_images) // BATCH)
    started = time.perf_counter()
    chosen: dict[str, OptimizerConfig] = {}
    grids: dict[str, list[dict[str, float]]] = {}
    for name, (config, grid) in METHODS.items():
        print(name, flush=True)
        chosen[name], grids[name] = search(config, grid, data, arguments.width, arguments.grid_steps, clock)
    runs: dict[str, list[Run]] = {name: [] for name in METHODS}
    for seed in range(arguments.seeds):  # methods in turns: the machine's drift meets all
        for name, config in chosen.items():
            runs[name].append(run(config, data, arguments.width, steps, seed, clock))
            last = runs[name][-1].result
            print(f"{name}, seed {seed}: loss {last.final_loss:.3f}, error {1 - last.accuracy:.3f}", flush=True)
    conditions = {
        "date": date.today().isoformat(),
        "commit": commit(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "model": f"VGG-11, batch normalization, first width {arguments.width}",
        "images": len(data.train_images),
        "batch": BATCH,
        "epochs": arguments.epochs,
        "seeds": arguments.seeds,
        "grid": f"{arguments.grid_steps} steps each, one seed",
        "seconds": round(time.perf_counter() - started),
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_table(runs, chosen, grids, conditions, arguments.out)
    plot(runs, len(data.train_images) // BATCH, conditions, arguments.out / "fig1.png")


def spread(values: list[float], digits: int = 3) -> str:
    """Mean and standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


def write_table(
    runs: dict[str, list[Run]],
    chosen: dict[str, OptimizerConfig],
    grids: dict[str, list[dict[str, float]]],
    conditions: dict[str, Any],
    out: Path,
) -> None:
    lines = [f"- {key}: {value}" for key, value in conditions.items()]
    lines += [
        "",
        "| method | settings | final loss | validation error | s per run | ms per step | factors | inversion | apply |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, of_method in runs.items():
        config = chosen[name]
        settings = f"lr {config.lr:g}" + (f", damping {config.damping:g}" if isinstance(config, KFACConfig) else "")
        shares = [
            f"{statistics.mean(r.parts[part] for r in of_method):.1%}" if isinstance(config, KFACConfig) else ""
            for part in ("factors", "inversion", "apply")
        ]
        cells = [
            name,
            settings,
            spread([r.result.final_loss for r in of_method]),
            spread([1 - r.result.accuracy for r in of_method]),
            f"{statistics.mean(math.fsum(r.result.step_seconds) for r in of_method):.1f}",
            f"{1e3 * statistics.mean(r.result.median_step_seconds for r in of_method):.1f}",
            *shares,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Loss of every setting of the grid:", *grid_lines(grids)]
    (out / "fig1.md").write_text("\n".join([*lines, ""]))
    content = {
        "conditions": conditions,
        "grids": grids,
        "runs": {
            name: [
                {
                    "seed": r.seed,
                    "settings": asdict(r.result.config),
                    "losses": [round(loss, 4) for loss in r.result.losses],
                    "step_ms": round(1e3 * r.result.median_step_seconds, 2),
                    "evaluations": [asdict(e) for e in r.result.evaluations],
                    "parts": r.parts,
                }
                for r in of_method
            ]
            for name, of_method in runs.items()
        },
    }
    (out / "fig1.json").write_text(json.dumps(content) + "\n")


def grid_lines(grids: dict[str, list[dict[str, float]]]) -> list[str]:
    """A table: settings across, methods down; SGD has a learning rate alone."""
    lines: list[str] = []
    for keys in dict.fromkeys(tuple(losses[0]) for losses in grids.values()):
        rows = {name: losses for name, losses in grids.items() if tuple(losses[0]) == keys}
        settings = [
            ", ".join(f"{key} {value:g}" for key, value in setting.items() if key != "loss")
            for setting in next(iter(rows.values()))
        ]
        lines += ["", " | ".join(["| method", *settings, ""]).rstrip(), "|---" * (len(settings) + 1) + "|"]
        lines += [
            " | ".join([f"| {name}", *(f"{one['loss']:.3f}" for one in losses), ""]).rstrip()
            for name, losses in rows.items()
        ]
    return lines


def plot(runs: dict[str, list[Run]], steps_per_epoch: int, conditions: dict[str, Any], path: Path) -> None:
    """Loss against epochs, validation error against seconds: means over the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for name, of_method in runs.items():
        losses = torch.tensor([r.result.losses for r in of_method]).mean(0)
        smooth = losses.unfold(0, steps_per_epoch // 2, 5).mean(1)
        at = (torch.arange(len(smooth)) * 5 + steps_per_epoch / 4) / steps_per_epoch
        (line,) = left.plot(at, smooth, label=name)
        evaluations = [r.result.evaluations for r in of_method]
        seconds = [statistics.mean(e[i].seconds for e in evaluations) for i in range(len(evaluations[0]))]
        errors = [statistics.mean(1 - e[i].accuracy for e in evaluations) for i in range(len(evaluations[0]))]
        right.plot(seconds, errors, marker=".", color=line.get_color(), label=name)
    left.set(xlabel="epochs", ylabel="training loss", yscale="log")
    right.set(xlabel="seconds", ylabel="validation error")
    right.legend(fontsize=8)
    figure.suptitle(f"{conditions['model']}; {conditions['images']} images, {conditions['seeds']} seeds", fontsize=10)
    figure.savefig(path, dpi=140)


if __name__ == "__main__":
    main()
