"""Train one network with one optimizer, and time every step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mfac_kernels.training.datasets import Dataset, augment, normalize
from mfac_kernels.training.optimizers import OptimizerConfig
from mfac_kernels.training.results import Evaluation, RunResult

__all__ = ["EVALUATIONS", "EVALUATION_BATCH", "QUICK_TEST_IMAGES", "evaluate", "train"]

EVALUATIONS = 8  # per run
QUICK_TEST_IMAGES = 1000  # for every evaluation but the last
EVALUATION_BATCH = 500


def train(
    model: nn.Module,
    data: Dataset,
    config: OptimizerConfig,
    *,
    steps: int,
    batch_size: int = 128,
    seed: int = 0,
    evaluations: int = EVALUATIONS,
    device: str = "cpu",
    on_step: Callable[[float, float | None], None] | None = None,
) -> RunResult:
    """Train ``model`` in place with one optimizer; the learning rate decays linearly to zero.

    Batches and their augmentation depend on ``seed`` alone. The ragged end of an epoch is left out.

    Args:
        on_step: called after each step with its loss and the last accuracy (None before the first).

    Raises:
        ValueError: ``steps`` < 1, or ``batch_size`` not between 1 and the number of images.
    """
    count = len(data.train_images)
    if steps < 1:
        raise ValueError(f"expected at least 1 step, got {steps}")
    if not 1 <= batch_size <= count:
        raise ValueError(f"expected a batch size from 1 to {count} ({data.name}), got {batch_size}")
    generator = torch.Generator().manual_seed(seed)
    batches = _batches(count, batch_size, generator)
    optimizer, precondition = config.build(model)
    evaluated_steps = {max(1, round(steps * i / evaluations)) for i in range(1, evaluations + 1)}
    result = RunResult(config)
    elapsed = 0.0
    model.train()
    for step in range(1, steps + 1):
        _synchronize(device)
        start = time.perf_counter()
        index = next(batches)
        images = augment(data.train_images[index], generator, pad=data.pad, flip=data.flip)
        labels = data.train_labels[index].to(device)
        for group in optimizer.param_groups:
            group["lr"] = config.lr * (1 - (step - 1) / steps)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(normalize(images.to(device), data.mean, data.std)), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        in_preconditioner = 0.0
        if precondition is not None:
            _synchronize(device)
            before = time.perf_counter()
            precondition()
            _synchronize(device)
            in_preconditioner = time.perf_counter() - before
        optimizer.step()
        _synchronize(device)
        seconds = time.perf_counter() - start

        elapsed += seconds
        result.losses.append(loss.item())
        result.step_seconds.append(seconds)
        result.preconditioner_seconds.append(in_preconditioner)
        if step in evaluated_steps:
            limit = None if step == steps else QUICK_TEST_IMAGES
            accuracy, images_seen = evaluate(model, data, limit=limit, device=device)
            result.evaluations.append(Evaluation(step, elapsed, accuracy, images_seen))
        if on_step is not None:
            on_step(result.losses[-1], result.evaluations[-1].accuracy if result.evaluations else None)
    return result


def evaluate(model: nn.Module, data: Dataset, *, limit: int | None = None, device: str = "cpu") -> tuple[float, int]:
    """Accuracy (0 to 1) on the test set, or on about ``limit`` evenly spaced images of it.

    Returns the accuracy and the number of images; the model is left in training mode.
    """
    stride = 1 if limit is None else max(1, len(data.test_images) // limit)
    images, labels = data.test_images[::stride], data.test_labels[::stride]
    correct = 0
    model.eval()
    with torch.inference_mode():
        for start in range(0, len(images), EVALUATION_BATCH):
            batch = images[start : start + EVALUATION_BATCH].to(device)
            predicted = model(normalize(batch, data.mean, data.std)).argmax(1).cpu()
            correct += int((predicted == labels[start : start + EVALUATION_BATCH]).sum())
    model.train()
    return correct / len(images), len(images)


def _batches(count: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    while True:
        order = torch.randperm(count, generator=generator)
        for start in range(0, count - batch_size + 1, batch_size):
            yield order[start : start + batch_size]


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
