"""Train one network with several optimizers on the same batches, and time every step.

from mfac_kernels.datasets import load
from mfac_kernels.training import CHOSEN, compare
comparison = compare(load("digits"), "mlp", [CHOSEN["sgd"], CHOSEN["mfac"]], steps=100)
"""

from __future__ import annotations

import copy
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mfac_kernels.datasets import Dataset, augment, normalize, require
from mfac_kernels.training.models import build_model

__all__ = [
    "CHOSEN",
    "EVALUATIONS",
    "GRID",
    "GRID_STEPS",
    "Comparison",
    "Evaluation",
    "KFACConfig",
    "MFACConfig",
    "OptimizerConfig",
    "RunResult",
    "SGDConfig",
    "compare",
    "evaluate",
    "train",
]

TAIL = 40  # steps over which the final loss is averaged
EVALUATIONS = 8  # per run
_QUICK_TEST_IMAGES = 1000  # for every evaluation but the last
_EVALUATION_BATCH = 500
_MAX_EPOCHS = 100  # however large the budget: small datasets are learnt by heart long before
_MEASURED_STEPS = 5
_WARM_UP_STEPS = 3
# The rest of a budget: drawing, the bar, and a window that costs more once it is full.
_BUDGET_SHARE_FOR_RUNS = 0.93


_Normalize = Literal["ngrads", "seen"]
Built = tuple[torch.optim.Optimizer, Callable[[], object] | None]


@dataclass(frozen=True)
class OptimizerConfig:
    """Settings that every optimizer has; a subclass adds its own and builds itself."""

    name: ClassVar[str]  # on the command line and in files
    label: ClassVar[str]  # in tables and figures

    lr: float  # of the first step; it decays linearly to zero over the run
    momentum: float = 0.9
    weight_decay: float = 5e-4

    @property
    def settings(self) -> str:
        """The settings in words, for tables."""
        words = (f"{value:g}" if isinstance(value, float) else value for value in vars(self).values())
        return ", ".join(f"{key.replace('_', ' ')} {word}" for key, word in zip(vars(self), words, strict=True))

    def build(self, model: nn.Module) -> Built:
        """The optimizer, and what to call between backward and its step (None: nothing)."""
        raise NotImplementedError


@dataclass(frozen=True)
class SGDConfig(OptimizerConfig):
    """torch's SGD with momentum."""

    name = "sgd"
    label = "SGD"

    def build(self, model: nn.Module) -> Built:
        optimizer = torch.optim.SGD(
            model.parameters(), lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay
        )
        return optimizer, None


@dataclass(frozen=True)
class MFACConfig(OptimizerConfig):
    """Plain SGD on the gradients that M-FAC preconditions."""

    name = "mfac"
    label = "M-FAC"

    ngrads: int = 128
    damping: float = 1e-4
    normalize: _Normalize = "ngrads"

    def build(self, model: nn.Module) -> Built:
        from mfac_kernels import MFAC  # only here: SGD runs without the compiled extension

        # Momentum belongs to the update F^-1 g and weight decay to the gradient of the window,
        # so both are the preconditioner's.
        preconditioner = MFAC(
            model.parameters(),
            ngrads=self.ngrads,
            damping=self.damping,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            normalize=self.normalize,
        )
        return torch.optim.SGD(model.parameters(), lr=self.lr), preconditioner.step


@dataclass(frozen=True)
class KFACConfig(OptimizerConfig):
    """torch's SGD with momentum on the gradients that K-FAC preconditions."""

    name = "kfac"
    label = "K-FAC"

    damping: float = 0.03
    inv_update_steps: int = 10
    spatial: Literal["full", "sua"] = "full"
    group_size: int | None = None

    def build(self, model: nn.Module) -> Built:
        from mfac_kernels import KFAC  # only here: SGD runs without the compiled extension

        preconditioner = KFAC(
            model,
            self.damping,
            inv_update_steps=self.inv_update_steps,
            spatial=self.spatial,
            group_size=self.group_size,
            kl_clip=None,
            normalization="skip",
        )
        optimizer = torch.optim.SGD(
            model.parameters(), lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay
        )
        return optimizer, preconditioner.step


_NORMALIZATIONS: tuple[tuple[int, _Normalize], ...] = ((128, "seen"), (512, "ngrads"), (512, "seen"))
GRID: dict[str, tuple[OptimizerConfig, ...]] = {
    "sgd": tuple(SGDConfig(lr=lr) for lr in (0.03, 0.1, 0.3)),
    "mfac": (
        *(MFACConfig(lr=lr, damping=damping) for damping in (1e-4, 3e-5) for lr in (5e-4, 1e-3, 2e-3)),
        # A wide window is slow to start if the sum is divided by its size from the first gradient on.
        *(MFACConfig(lr=1e-3, ngrads=ngrads, normalize=normalize) for ngrads, normalize in _NORMALIZATIONS),
    ),
    "kfac": tuple(KFACConfig(lr=lr, damping=damping) for damping in (0.01, 0.03, 0.1) for lr in (0.003, 0.01, 0.03)),
}
GRID_STEPS = 240
# The best of GRID on CIFAR-10 with ResNet-20, batch 128, by the mean loss of the last 40 of 240
# steps (benchmarks/results/cifar10_grid*.md); `mfac-kernels train --grid` repeats the search.
CHOSEN: dict[str, OptimizerConfig] = {
    "sgd": SGDConfig(lr=0.1),
    "mfac": MFACConfig(lr=1e-3, damping=1e-4),
    "kfac": KFACConfig(lr=0.01, damping=0.03),
}


@dataclass(frozen=True)
class Evaluation:
    """Accuracy on test images, after so many steps."""

    step: int
    seconds: float  # spent in steps until then, evaluation excluded
    accuracy: float  # 0 to 1
    images: int


@dataclass
class RunResult:
    """What one optimizer did: one entry per step, times in seconds."""

    config: OptimizerConfig
    losses: list[float] = field(default_factory=list)  # of the batch, before the step
    step_seconds: list[float] = field(default_factory=list)  # the whole step, preconditioner too
    # Of the preconditioner's step; what K-FAC gathers in the passes of the network is in the whole step alone.
    preconditioner_seconds: list[float] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)

    @property
    def final_loss(self) -> float:
        """Mean loss of the last steps (at most ``TAIL``); not a number if the run diverged."""
        tail = self.losses[-TAIL:]
        return math.fsum(tail) / len(tail) if all(map(math.isfinite, tail)) else math.nan

    @property
    def accuracy(self) -> float:
        """Accuracy of the last evaluation, on the whole test set."""
        return self.evaluations[-1].accuracy if self.evaluations else math.nan

    @property
    def median_step_seconds(self) -> float:
        return statistics.median(self.step_seconds)

    @property
    def median_preconditioner_seconds(self) -> float:
        return statistics.median(self.preconditioner_seconds)

    @property
    def preconditioner_share(self) -> float:
        """The preconditioner's part of a step, by the two medians."""
        return self.median_preconditioner_seconds / self.median_step_seconds


@dataclass(frozen=True)
class Comparison:
    """Several runs from the same weights, over the same batches, for the same number of steps."""

    results: tuple[RunResult, ...]
    dataset: str
    source: str
    train_images: int
    test_images: int
    model: str
    parameters: int
    batch_size: int
    steps: int
    budget: float | None  # seconds asked for, if the steps come from a budget
    seconds: float  # measured for the whole comparison, evaluation included
    seed: int
    threads: int
    torch_version: str
    device: str


def compare(
    data: Dataset,
    model_name: str,
    configs: Sequence[OptimizerConfig],
    *,
    steps: int | None = None,
    budget: float | None = None,
    batch_size: int = 128,
    seed: int = 0,
    evaluations: int = EVALUATIONS,
    device: str = "cpu",
    progress: bool = False,
) -> Comparison:
    """Train ``model_name`` once per configuration: same initial weights, batches and steps.

    Args:
        steps: steps of each run; or else
        budget: seconds for everything, evaluation included: the time of a step is measured for
            each configuration first, and the number of steps follows (at most 100 epochs).
        evaluations: per run, evenly spaced; the last is on the whole test set.
        progress: show a bar with loss, accuracy and time left, and a line per run (tqdm).

    Raises:
        ValueError: not exactly one of ``steps`` and ``budget``, a value out of range, or a budget
            too small for one step.
        MissingDependency: tqdm is not installed and ``progress`` is true.
    """
    if (steps is None) == (budget is None):
        raise ValueError("expected either steps or budget")
    started = time.perf_counter()
    with torch.random.fork_rng(devices=[]):  # the caller's generator stays as it is
        torch.manual_seed(seed)
        initial = build_model(
            model_name,
            data.train_images.shape[1],
            len(data.classes),
            (data.train_images.shape[2], data.train_images.shape[3]),
        ).to(device)
    if budget is not None:
        steps = _steps_for_budget(
            initial,
            data,
            configs,
            budget=budget,
            started=started,
            batch_size=batch_size,
            evaluations=evaluations,
            device=device,
        )
    assert steps is not None

    results = []
    with _Progress(total=steps * len(configs), enabled=progress) as bar:
        for config in configs:
            bar.begin(config)
            result = train(
                copy.deepcopy(initial),
                data,
                config,
                steps=steps,
                batch_size=batch_size,
                seed=seed,
                evaluations=evaluations,
                device=device,
                on_step=bar.step,
            )
            bar.end(result)
            results.append(result)
    return Comparison(
        results=tuple(results),
        dataset=data.name,
        source=data.source,
        train_images=len(data.train_images),
        test_images=len(data.test_images),
        model=model_name,
        parameters=sum(p.numel() for p in initial.parameters()),
        batch_size=batch_size,
        steps=steps,
        budget=budget,
        seconds=time.perf_counter() - started,
        seed=seed,
        threads=torch.get_num_threads(),
        torch_version=torch.__version__,
        device=_describe_device(device),
    )


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
            limit = None if step == steps else _QUICK_TEST_IMAGES
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
        for start in range(0, len(images), _EVALUATION_BATCH):
            batch = images[start : start + _EVALUATION_BATCH].to(device)
            predicted = model(normalize(batch, data.mean, data.std)).argmax(1).cpu()
            correct += int((predicted == labels[start : start + _EVALUATION_BATCH]).sum())
    model.train()
    return correct / len(images), len(images)


def _batches(count: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    while True:
        order = torch.randperm(count, generator=generator)
        for start in range(0, count - batch_size + 1, batch_size):
            yield order[start : start + batch_size]


def _steps_for_budget(
    initial: nn.Module,
    data: Dataset,
    configs: Sequence[OptimizerConfig],
    *,
    budget: float,
    started: float,
    batch_size: int,
    evaluations: int,
    device: str,
) -> int:
    """How many steps of every configuration fit what is left of ``budget`` seconds."""
    step_seconds = 0.0
    for config in configs:
        trial = train(
            copy.deepcopy(initial),
            data,
            config,
            steps=_WARM_UP_STEPS + _MEASURED_STEPS,
            batch_size=batch_size,
            evaluations=0,
            device=device,
        )
        step_seconds += statistics.median(trial.step_seconds[_WARM_UP_STEPS:])
    before = time.perf_counter()
    _, images = evaluate(copy.deepcopy(initial), data, limit=_EVALUATION_BATCH, device=device)
    image_seconds = (time.perf_counter() - before) / images
    test_images = len(data.test_images)
    per_run = test_images + (evaluations - 1) * min(test_images, _QUICK_TEST_IMAGES)
    reserved = len(configs) * per_run * image_seconds + time.perf_counter() - started
    steps = int((budget * _BUDGET_SHARE_FOR_RUNS - reserved) / step_seconds)
    if steps < 1:
        needed = (reserved + step_seconds) / _BUDGET_SHARE_FOR_RUNS
        raise ValueError(f"a budget of {budget:g} s is too small: one step needs {needed:.1f} s")
    return min(steps, _MAX_EPOCHS * len(data.train_images) // batch_size)


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def _describe_device(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{device} ({torch.backends.cpu.get_cpu_capability()})"


class _Progress:
    """One bar over all runs, so that its time left is that of the whole comparison."""

    def __init__(self, *, total: int, enabled: bool) -> None:
        self._bar: Any = None
        self._loss: float | None = None
        if enabled:
            tqdm = require("tqdm", "tqdm", "for the progress bar").tqdm
            self._bar = tqdm(
                total=total,
                unit="step",
                mininterval=0.5 if sys.stderr.isatty() else 20.0,  # a log file gets few lines
                dynamic_ncols=True,
                bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} "
                "[{elapsed} elapsed, {remaining} left{postfix}]",
            )

    def __enter__(self) -> _Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def begin(self, config: OptimizerConfig) -> None:
        self._loss = None
        if self._bar is not None:
            self._bar.set_postfix_str("", refresh=False)
            self._bar.set_description_str(f"{config.label:5}")

    def step(self, loss: float, accuracy: float | None) -> None:
        if self._bar is None:
            return
        # A single batch's loss jumps too much to be read.
        self._loss = loss if self._loss is None else 0.95 * self._loss + 0.05 * loss
        shown = "-" if accuracy is None else f"{accuracy:.1%}"
        self._bar.set_postfix_str(f"loss {self._loss:.3f}, accuracy {shown}", refresh=False)
        self._bar.update()

    def end(self, result: RunResult) -> None:
        if self._bar is not None:
            self._bar.write(
                f"{result.config.label:5} ({result.config.settings}): "
                f"loss {result.final_loss:.3f}, accuracy {result.accuracy:.1%}"
            )
