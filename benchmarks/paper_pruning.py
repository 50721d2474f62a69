"""Pruning of ResNet-20 on CIFAR-10 by the optimal brain surgeon on M-FAC Fishers: `make paper-pruning CHECKPOINT=FILE`.

One shot, with recomputations, and gradually with fine-tuning; by magnitude, the diagonal Fisher, M-FAC in blocks and
whole; 50 to 95%, several seeds; a grid of dampings. Without --checkpoint the demonstration's network is trained first.
Written to --out: pruning.png, pruning.md, pruning.json. Tables that --out has of the same network under the same
conditions are kept, so that a run that was stopped goes on; without them it starts anew.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

import torch
from provenance import commit

from mfac_kernels.pruning import prunable
from mfac_kernels.training import datasets, pruning
from mfac_kernels.training.checkpoints import Checkpoint, load_checkpoint
from mfac_kernels.training.loop import train
from mfac_kernels.training.models import ResNet20
from mfac_kernels.training.optimizers import SGDConfig
from mfac_kernels.training.pruning_report import format_accuracies, write_pruning_report

SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
GRID_SPARSITY = 0.8
BLOCK = "512"  # the best of the recomputed ones at 80%


@dataclass(frozen=True)
class Part:
    """Curves of one table: methods under one setting."""

    title: str
    setting: pruning.Setting
    methods: tuple[str, ...]


def parts(arguments: argparse.Namespace) -> list[Part]:
    joint = pruning.Setting(ngrads=arguments.ngrads, damping=1e-4, recomputations=arguments.recomputations)
    paper = replace(joint, damping=1e-5, joint=False, recomputations=0, statistics_images=0, temperature=None)
    gradual = replace(joint, recomputations=len(SPARSITIES), tuning_steps=arguments.tuning_steps, batch_size=64)
    return [
        Part("one shot, the paper's update", paper, ("magnitude", "diagonal", "128", BLOCK, "full")),
        Part("recomputed, joint update", joint, ("magnitude", "128", BLOCK, "full")),
        Part("gradual, with fine-tuning", gradual, ("magnitude", BLOCK)),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="state dict of a CIFAR ResNet (default: train one)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--train-steps", type=int, default=1500, help="of the network without a checkpoint")
    parser.add_argument("--ngrads", type=int, default=256)
    parser.add_argument("--recomputations", type=int, default=16)
    parser.add_argument("--tuning-steps", type=int, default=40, help="of batch 64, after every sparsity")
    parser.add_argument("--test-images", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()

    data = datasets.load("cifar10")
    checkpoint = trained(data, arguments) if arguments.checkpoint is None else load_checkpoint(arguments.checkpoint)
    subject = pruning.Subject(checkpoint.model, data, checkpoint.scale, arguments.test_images)
    dense = subject.accuracy(copy.deepcopy(subject.model))
    plan = parts(arguments)
    conditions: dict[str, object] = {
        "date": date.today().isoformat(),
        "commit": commit(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "network": arguments.checkpoint.name if arguments.checkpoint else f"ResNet-20, {arguments.train_steps} steps",
        "prunable weights": sum(p.numel() for p in prunable(subject.model).values()),
        "test images": f"{arguments.test_images} of {len(data.test_images)}, evenly spaced",
        "seeds": f"{arguments.seeds}; mean ± deviation; they draw the gradients and the images of the statistics",
        **{part.title: part.setting for part in plan},
    }
    started = time.perf_counter()
    tables, grid = earlier(arguments.out, conditions, dense, plan)

    def write() -> None:
        said = {key: str(value) for key, value in conditions.items()}
        for path in write_pruning_report(tables, dense, {**said, "grid": grid}, arguments.out):
            if path.suffix == ".md":
                text = path.read_text().replace(f"- grid: {grid}\n", "")
                head = [f"## What each thing brings at {GRID_SPARSITY:.0%}, one seed", ""]
                rows = ["| setting | method | accuracy | seconds |", "|---|---|---|---|", *grid, ""]
                path.write_text("\n".join([text, *head, *rows]))

    for row in settings_grid(plan[1].setting)[len(grid) :]:
        grid.append(grid_row(subject, *row))
    for part in plan:
        if part.title in tables:
            continue
        table = tables[part.title] = {pruning.parse_method(name).label: [] for name in part.methods}
        for seed in range(arguments.seeds):
            shared = pruning.dense_gradients(subject, part.setting, seed)
            for name in part.methods:
                method = pruning.parse_method(name)
                for point, _, _ in pruning.run(subject, method, part.setting, SPARSITIES, seed, gradients=shared):
                    table[method.label].append(point)
                last = ", ".join(f"{p.accuracy:.3f}" for p in table[method.label][-len(SPARSITIES) :])
                spent = time.perf_counter() - started
                print(f"{spent:5.0f} s  {part.title}, {method.label}, seed {seed}: {last}", flush=True)
        print(format_accuracies(table), flush=True)
        write()  # after every part: what is there is there


def earlier(
    out: Path, conditions: dict[str, object], dense: float, plan: list[Part]
) -> tuple[dict[str, dict[str, list[pruning.Point]]], list[str]]:
    """Whole tables and the rows of the grid that are there already; ``conditions`` learn of which commit they are."""
    path = out / "pruning.json"
    content = json.loads(path.read_text()) if path.exists() else {"conditions": {}}
    before = content["conditions"]
    same = ("torch", "threads", "network", "prunable weights", "test images", "seeds")
    if content.get("dense_accuracy") != dense or any(before.get(key) != str(conditions[key]) for key in same):
        return {}, []
    tables = {}
    for part in plan:
        if part.title in content["tables"] and before[part.title] == str(part.setting):
            table = content["tables"][part.title].items()
            tables[part.title] = {label: [pruning.Point(**point) for point in points] for label, points in table}
            of = f"commit of {part.title!r}"
            conditions[of] = before.get(of, before["commit"])
    return tables, before.get("grid", [])


def settings_grid(joint: pruning.Setting) -> list[tuple[str, str, pruning.Setting]]:
    """(in words, method, setting): what each thing brings at one sparsity, then the dampings."""
    plain = replace(joint, damping=1e-5, joint=False, recomputations=0, statistics_images=0, temperature=None)
    warm = replace(plain, temperature=joint.temperature)
    fresh = replace(warm, statistics_images=joint.statistics_images)
    few = replace(joint, recomputations=4)
    return [
        ("one shot, labels of the data, single updates", BLOCK, plain),
        (f"labels of the network at temperature {joint.temperature:g}", BLOCK, warm),
        ("batch statistics estimated again", BLOCK, fresh),
        ("joint update", BLOCK, replace(fresh, joint=True)),
        ("4 recomputations, single updates, damping 1e-05", BLOCK, replace(few, joint=False, damping=1e-5)),
        *(
            (f"4 recomputations, joint, damping {d:g}", BLOCK, replace(few, damping=d))
            for d in (1e-6, 1e-5, 1e-4, 1e-3)
        ),
        (
            f"512 gradients, 8 recomputations, joint, damping {joint.damping:g}",
            BLOCK,
            replace(joint, ngrads=512, recomputations=8),
        ),
    ]


def grid_row(subject: pruning.Subject, words: str, method: str, setting: pruning.Setting) -> str:
    """A row of the table of settings."""
    chosen = pruning.parse_method(method)
    ((point, _, _),) = pruning.run(subject, chosen, setting, [GRID_SPARSITY])
    row = f"| {words} | {chosen.label} | {100 * point.accuracy:.1f} | {point.seconds:.0f} |"
    print(row, flush=True)
    return row


def trained(data: datasets.Dataset, arguments: argparse.Namespace) -> Checkpoint:
    torch.manual_seed(0)
    model = ResNet20(3, 10)
    train(model, data, SGDConfig(lr=0.1), steps=arguments.train_steps, evaluations=1)
    return Checkpoint(model.eval(), None)


if __name__ == "__main__":
    main()
