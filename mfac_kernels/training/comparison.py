"""Train one network with several optimizers on the same batches, for a number of steps or of seconds.

from mfac_kernels.training import CHOSEN, compare
from mfac_kernels.training.datasets import load
comparison = compare(load("digits"), "mlp", [CHOSEN["sgd"], CHOSEN["mfac"]], steps=100)
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Sequence

import torch
from torch import nn

from mfac_kernels.training.datasets import Dataset
from mfac_kernels.training.loop import EVALUATION_BATCH, EVALUATIONS, QUICK_TEST_IMAGES, evaluate, train
from mfac_kernels.training.models import build_model
from mfac_kernels.training.optimizers import OptimizerConfig
from mfac_kernels.training.progress import Progress
from mfac_kernels.training.results import Comparison

__all__ = ["compare"]

_MAX_EPOCHS = 100  # however large the budget: small datasets are learnt by heart long before
_MEASURED_STEPS = 5
_WARM_UP_STEPS = 3
# The rest of a budget: drawing, the bar, and a window that costs more once it is full.
_BUDGET_SHARE_FOR_RUNS = 0.93


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
    with Progress(total=steps * len(configs), enabled=progress) as bar:
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
    _, images = evaluate(copy.deepcopy(initial), data, limit=EVALUATION_BATCH, device=device)
    image_seconds = (time.perf_counter() - before) / images
    test_images = len(data.test_images)
    per_run = test_images + (evaluations - 1) * min(test_images, QUICK_TEST_IMAGES)
    reserved = len(configs) * per_run * image_seconds + time.perf_counter() - started
    steps = int((budget * _BUDGET_SHARE_FOR_RUNS - reserved) / step_seconds)
    if steps < 1:
        needed = (reserved + step_seconds) / _BUDGET_SHARE_FOR_RUNS
        raise ValueError(f"a budget of {budget:g} s is too small: one step needs {needed:.1f} s")
    return min(steps, _MAX_EPOCHS * len(data.train_images) // batch_size)


def _describe_device(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{device} ({torch.backends.cpu.get_cpu_capability()})"
