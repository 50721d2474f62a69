"""``mfac-kernels prune``: a network in, sparsities, a report of accuracy against sparsity out."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import torch

from mfac_kernels.pruning import Masks, prunable
from mfac_kernels.training import datasets, pruning
from mfac_kernels.training._arguments import count, positive_int
from mfac_kernels.training.checkpoints import Checkpoint, load_checkpoint
from mfac_kernels.training.loop import train
from mfac_kernels.training.models import build_model
from mfac_kernels.training.optimizers import CHOSEN
from mfac_kernels.training.pruning_report import format_accuracies, write_pruning_report

__all__ = ["EXAMPLES", "add_arguments", "prune"]

EXAMPLES = """\
examples:
  mfac-kernels prune --checkpoint net.pt               a ResNet-20 on CIFAR-10: every method at 50 to 90%
  mfac-kernels prune --recompute 0                     one shot, on a network trained here for a few hundred steps
  mfac-kernels prune --checkpoint net.pt --methods full --sparsities 0.8 --save --out runs/sparse
  mfac-kernels prune --checkpoint net.pt --pattern 2:4 --sparsities 0.5 --exclude conv1.weight --exclude fc.weight
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``mfac-kernels prune``."""
    default = pruning.Setting()
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="state dict of a ResNet for CIFAR, in torchvision's names or the demonstration's (default: train one)",
    )
    parser.add_argument("--data", choices=datasets.NAMES, default="cifar10", help="default: %(default)s")
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="folder with the dataset")
    parser.add_argument(
        "--model", choices=("resnet20", "cnn", "mlp"), default="resnet20", help="network to train without --checkpoint"
    )
    parser.add_argument("--train-steps", type=count, default=600, metavar="N", help="of that training (%(default)s)")
    parser.add_argument("--sparsities", type=_sparsities, default=[0.5, 0.6, 0.7, 0.8, 0.9], metavar="S[,S]")
    parser.add_argument(
        "--methods",
        type=_methods,
        default=[pruning.parse_method(name) for name in pruning.METHODS],
        metavar="NAME[,NAME]",
        help="magnitude, diagonal, full, or sizes of blocks (default: " + ",".join(pruning.METHODS) + ")",
    )
    parser.add_argument("--ngrads", type=positive_int, default=default.ngrads, metavar="N", help="default: %(default)s")
    parser.add_argument("--damping", type=float, default=default.damping, metavar="X", help="default: %(default)s")
    parser.add_argument(
        "--gradient-batch", type=positive_int, default=1, metavar="N", help="images that a gradient is the mean over"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=default.temperature,
        metavar="T",
        help="of the distribution whose Fisher it is; 0: the images' own labels, at temperature 1 (%(default)s)",
    )
    parser.add_argument(
        "--single",
        action="store_true",
        help="the paper's update, a sum over single weights, not the joint one",
    )
    parser.add_argument("--pattern", default="unstructured", help="unstructured, 2:4, 1x4 or block")
    parser.add_argument("--scope", choices=("global", "layer"), default="global", help="of the threshold")
    parser.add_argument("--exclude", action="append", default=[], metavar="NAME", help="parameters to leave alone")
    parser.add_argument(
        "--recompute", type=count, default=default.recomputations, metavar="N", help="steps in all; 0: one shot"
    )
    parser.add_argument("--tune-steps", type=count, default=0, metavar="N", help="of SGD after every sparsity")
    parser.add_argument(
        "--statistics-images",
        type=count,
        default=default.statistics_images,
        metavar="N",
        help="for new batch statistics after every step (default: %(default)s; 0: keep the old ones)",
    )
    parser.add_argument("--test-images", type=positive_int, metavar="N", help="default: all")
    parser.add_argument("--seeds", type=positive_int, default=1, metavar="N", help="default: %(default)s")
    parser.add_argument("--save", action="store_true", help="write the pruned networks and their masks too")
    parser.add_argument("--out", type=Path, default=Path("runs/prune"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--threads", type=positive_int, metavar="N", help="CPU threads for torch")


def prune(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)  # before the work, not after it
    checkpoint = None if arguments.checkpoint is None else load_checkpoint(arguments.checkpoint)
    print(f"loading {arguments.data}", flush=True)
    data = datasets.load(arguments.data, arguments.data_dir)
    if checkpoint is None:
        checkpoint = _train(arguments, data)
    setting = pruning.Setting(
        ngrads=arguments.ngrads,
        damping=arguments.damping,
        gradient_batch=arguments.gradient_batch,
        temperature=arguments.temperature or None,
        joint=not arguments.single,
        pattern=arguments.pattern,
        scope=arguments.scope,
        exclude=tuple(arguments.exclude),
        recomputations=arguments.recompute,
        tuning_steps=arguments.tune_steps,
        statistics_images=arguments.statistics_images,
    )
    subject = pruning.Subject(checkpoint.model, data, checkpoint.scale, arguments.test_images)
    weights = sum(p.numel() for p in prunable(subject.model, setting.exclude).values())
    dense = subject.accuracy(copy.deepcopy(subject.model))
    print(f"{weights:,} prunable weights; dense accuracy {dense:.1%}", flush=True)
    curves: dict[str, list[pruning.Point]] = {method.label: [] for method in arguments.methods}
    for seed in range(arguments.seeds):
        shared = None
        if any(method.gradients for method in arguments.methods):
            shared = pruning.dense_gradients(subject, setting, seed)
        for method in arguments.methods:
            last: tuple[pruning.Point, torch.nn.Module, Masks] | None = None
            for last in pruning.run(subject, method, setting, arguments.sparsities, seed, gradients=shared):
                point = last[0]
                print(f"{method.label}, {point.sparsity:.1%}: {point.accuracy:.1%} ({point.seconds:.0f} s)", flush=True)
                curves[method.label].append(point)
            if arguments.save and last is not None and seed == 0:
                torch.save(last[1].state_dict(), arguments.out / f"{method.name}.pt")
                last[2].save(arguments.out / f"{method.name}.masks.pt")
    conditions = {
        "network": "trained here" if arguments.checkpoint is None else arguments.checkpoint.name,
        "data": f"{data.name} ({data.source})",
        "prunable weights": weights,
        **{f.name.replace("_", " "): getattr(setting, f.name) for f in fields(setting)},
        "seeds": arguments.seeds,
        "test images": arguments.test_images or len(data.test_images),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    title = f"{setting.recomputations} recomputations" if setting.recomputations else "One shot"
    print(f"\n{format_accuracies(curves)}\n")
    for path in write_pruning_report({title: curves}, dense, conditions, arguments.out):
        print(f"wrote {path}")
    return 0


def _train(arguments: argparse.Namespace, data: datasets.Dataset) -> Checkpoint:
    print(f"training {arguments.model} for {arguments.train_steps} steps", flush=True)
    torch.manual_seed(0)
    channels, height, width = data.train_images.shape[1:]
    model = build_model(arguments.model, channels, len(data.classes), (height, width))
    batch = min(128, len(data.train_images))
    train(model, data, CHOSEN["sgd"], steps=arguments.train_steps, batch_size=batch, evaluations=0)
    torch.save(model.state_dict(), arguments.out / "dense.pt")
    return Checkpoint(model.eval(), None)


def _methods(text: str) -> list[pruning.Method]:
    try:
        return [pruning.parse_method(name.strip()) for name in dict.fromkeys(text.split(","))]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _sparsities(text: str) -> Sequence[float]:
    try:
        values = sorted({float(value) for value in text.split(",")})
    except ValueError:
        values = []
    if not values or not 0 < values[0] <= values[-1] < 1:
        raise argparse.ArgumentTypeError(f"expected numbers between 0 and 1, got {text!r}")
    return values
