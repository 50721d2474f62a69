"""Accuracy against sparsity, for several ways to choose what is dropped and to move what is not."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mfac_kernels.pruning import Each, Gradients, Masks, collect, prunable, prune
from mfac_kernels.training.datasets import Dataset, augment

__all__ = ["METHODS", "Method", "Point", "Setting", "Subject", "dense_gradients", "fine_tune", "parse_method", "run"]

_EVALUATION_BATCH = 500


@dataclass(frozen=True)
class Method:
    """What is known of the loss: nothing, or a Fisher in blocks of ``block_size`` (None: one block)."""

    name: str
    gradients: bool = True
    block_size: int | None = None

    @property
    def label(self) -> str:
        if not self.gradients:
            return "magnitude"
        if self.block_size == 1:
            return "diagonal Fisher"
        return "M-FAC, full" if self.block_size is None else f"M-FAC, blocks of {self.block_size}"


METHODS = ("magnitude", "diagonal", "128", "1024", "full")


def parse_method(name: str) -> Method:
    """``"magnitude"``, ``"diagonal"``, ``"full"`` or the size of blocks, else ValueError."""
    if name == "magnitude":
        return Method(name, gradients=False)
    if name == "diagonal":
        return Method(name, block_size=1)
    if name == "full":
        return Method(name)
    if name.isdecimal() and int(name) > 0:
        return Method(name, block_size=int(name))
    raise ValueError(f"unknown method {name!r}: expected magnitude, diagonal, full or the size of blocks")


@dataclass(frozen=True)
class Setting:
    """How a method prunes.

    Attributes:
        ngrads, damping, joint, pattern, scope, exclude: see :func:`mfac_kernels.pruning.prune`.
        gradient_batch: images a gradient is the mean over; 1 for gradients of single images.
        temperature: T: the Fisher is that of softmax(logits / T), with labels drawn from it. A network that is sure
            of its training images has hardly any gradient there at T = 1. None: the images' own labels, at T = 1.
        recomputations: steps from the dense network to the highest sparsity, with the others on the way; 0: one shot,
            every sparsity from the dense network.
        tuning_steps: of SGD after every sparsity, the masks held; learning_rate decays linearly to zero in each.
        statistics_images: to estimate batch statistics again after every step; 0: they stay as they are.
    """

    ngrads: int = 256
    damping: float = 1e-5
    gradient_batch: int = 1
    temperature: float | None = 4.0
    joint: bool = True
    pattern: str = "unstructured"
    scope: str = "global"
    exclude: tuple[str, ...] = ()
    recomputations: int = 16
    tuning_steps: int = 0
    learning_rate: float = 0.01
    batch_size: int = 128
    statistics_images: int = 1000


@dataclass(frozen=True)
class Point:
    """A pruned network: its sparsity over the prunable weights, and accuracies from 0 to 1."""

    method: str
    seed: int
    target: float
    sparsity: float
    pruned: float  # accuracy before fine-tuning
    accuracy: float  # after it, if there is any
    seconds: float  # since the last point, without evaluation


@dataclass(frozen=True)
class Subject:
    """A network and its data; ``scale`` is the mean and deviation of inputs, or None for the dataset's own."""

    model: nn.Module
    data: Dataset
    scale: tuple[float, float] | None = None
    test_images: int | None = None  # evenly spaced; None: all

    def inputs(self, images: Tensor) -> Tensor:
        """uint8 (N, C, H, W) -> scaled float32, channels last."""
        channels = images.shape[1]
        mean, deviation = (
            (self.data.mean, self.data.std) if self.scale is None else ([s] * channels for s in self.scale)
        )
        x = images.to(torch.float32, memory_format=torch.channels_last).div_(255)
        return x.sub_(torch.tensor(mean).view(-1, 1, 1)).div_(torch.tensor(deviation).view(-1, 1, 1))

    def batches(self, generator: torch.Generator, size: int, *, augmented: bool = False) -> Batches:
        return Batches(self, generator, size, augmented)

    def accuracy(self, model: nn.Module) -> float:
        stride = 1 if self.test_images is None else max(1, len(self.data.test_images) // self.test_images)
        images, labels = self.data.test_images[::stride], self.data.test_labels[::stride]
        correct = 0
        model.eval()
        with torch.inference_mode():
            for start in range(0, len(images), _EVALUATION_BATCH):
                part = slice(start, start + _EVALUATION_BATCH)
                correct += int((model(self.inputs(images[part])).argmax(1) == labels[part]).sum())
        return correct / len(images)


class Batches:
    """(scaled images, labels) of the training set, in a new order at every iteration, without a ragged end."""

    def __init__(self, subject: Subject, generator: torch.Generator, size: int, augmented: bool) -> None:
        self._subject, self._generator, self._size, self._augmented = subject, generator, size, augmented

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        data = self._subject.data
        order = torch.randperm(len(data.train_images), generator=self._generator)
        for start in range(0, len(order) - self._size + 1, self._size):
            index = order[start : start + self._size]
            images = data.train_images[index]
            if self._augmented:
                images = augment(images, self._generator, pad=data.pad, flip=data.flip)
            yield self._subject.inputs(images), data.train_labels[index]


def loss(model: nn.Module, batch: Any) -> Tensor:
    """Cross-entropy of a batch of scaled images and labels."""
    return F.cross_entropy(model(batch[0]), batch[1])


class Likelihood:
    """Where the gradients of a Fisher come from: batches, and a loss of them."""

    def __init__(self, subject: Subject, setting: Setting, generator: torch.Generator) -> None:
        self._temperature, self._generator = setting.temperature, generator
        size = min(32, len(subject.data.train_images)) if setting.gradient_batch == 1 else setting.gradient_batch
        self._batches, self._classes = subject.batches(generator, size), len(subject.data.classes)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(images, labels), or (images, noise of Gumbel's distribution (N, classes) to draw labels with)."""
        for images, labels in self._batches:
            if self._temperature is None:
                yield images, labels
            else:
                uniform = torch.rand(len(images), self._classes, generator=self._generator)
                yield images, -uniform.clamp_(1e-20, 1 - 1e-7).log_().neg_().log_()

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        if self._temperature is None:
            return loss(model, batch)
        logits = model(batch[0]) / self._temperature
        return F.cross_entropy(logits, (logits.detach() + batch[1]).argmax(1))


def dense_gradients(subject: Subject, setting: Setting, seed: int) -> Gradients:
    """Of the network as it is, for the first step of any method."""
    names = list(prunable(subject.model, setting.exclude))
    source = Likelihood(subject, setting, torch.Generator().manual_seed(seed))
    return collect(subject.model.eval(), source.loss, source, setting.ngrads, names=names, each=_each(setting))


def run(
    subject: Subject,
    method: Method,
    setting: Setting,
    sparsities: Sequence[float],
    seed: int = 0,
    *,
    gradients: Gradients | None = None,
    progress: bool = False,
) -> Iterator[tuple[Point, nn.Module, Masks]]:
    """Prune to each of ascending ``sparsities``.

    ``gradients``: what :func:`dense_gradients` returns, so that methods need not collect them again.
    """
    generator = torch.Generator().manual_seed(seed + 1)
    source = Likelihood(subject, setting, generator)
    model, masks, first = _fresh(subject), None, gradients
    counts = _recomputations(setting.recomputations, sparsities) if setting.recomputations else [1] * len(sparsities)
    for sparsity, count in zip(sparsities, counts, strict=True):
        started = time.perf_counter()
        if not setting.recomputations:
            model, masks, first = _fresh(subject), None, gradients
        result = prune(
            model,
            sparsity,
            source.loss,
            source,
            ngrads=setting.ngrads if method.gradients else 0,
            damping=setting.damping,
            block_size=method.block_size,
            joint=setting.joint,
            pattern=setting.pattern,
            scope="layer" if setting.scope == "layer" else "global",
            recomputations=count,
            exclude=setting.exclude,
            masks=masks,
            after_step=lambda net: _estimate_statistics(net, subject, setting, seed),
            gradients=first if method.gradients else None,
            progress=progress,
            each=_each(setting),
        )
        masks, first = result.masks, None
        seconds = time.perf_counter() - started
        pruned = accuracy = subject.accuracy(model)
        if setting.tuning_steps:
            started = time.perf_counter()
            fine_tune(model, masks, subject, setting, generator)
            seconds += time.perf_counter() - started
            accuracy = subject.accuracy(model)
        yield Point(method.name, seed, sparsity, masks.sparsity, pruned, accuracy, seconds), model, masks


def fine_tune(model: nn.Module, masks: Masks, subject: Subject, setting: Setting, generator: torch.Generator) -> None:
    """SGD with momentum on augmented images, the masks held; the model is in evaluation mode again afterwards."""
    optimizer = torch.optim.SGD(model.parameters(), setting.learning_rate, momentum=0.9, weight_decay=5e-4)
    steps = setting.tuning_steps
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    epochs = (batch for _ in iter(int, 1) for batch in subject.batches(generator, setting.batch_size, augmented=True))
    model.train()
    with masks.hold(model, optimizer):
        for batch in islice(epochs, steps):
            optimizer.zero_grad()
            loss(model, batch).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    model.eval()


def _fresh(subject: Subject) -> nn.Module:
    model: nn.Module = copy.deepcopy(subject.model).eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def _each(setting: Setting) -> Each:
    return "sample" if setting.gradient_batch == 1 else "batch"


def _recomputations(total: int, sparsities: Sequence[float]) -> list[int]:
    """``total`` steps on the way to the highest sparsity, by how much is dropped of what is left; one at least."""
    logs = [0.0, *(math.log(1 - s) for s in sparsities)]
    ends = [round(total * log / logs[-1]) for log in logs]
    return [max(1, b - a) for a, b in pairwise(ends)]


def _estimate_statistics(model: nn.Module, subject: Subject, setting: Setting, seed: int) -> None:
    if not setting.statistics_images:
        return
    size = min(200, setting.statistics_images)
    batches = subject.batches(torch.Generator().manual_seed(seed), size)
    torch.optim.swa_utils.update_bn(islice(batches, setting.statistics_images // size), model)
