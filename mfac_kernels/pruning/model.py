"""Pruning of a model along a schedule, with fresh gradients at every step."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mfac_kernels.fisher import _checks
from mfac_kernels.fisher.static import StaticFisher
from mfac_kernels.pruning.collect import Each, Gradients, Loss, collect
from mfac_kernels.pruning.masks import Masks
from mfac_kernels.pruning.obs import candidates, check_sparsity, choose, targets, update
from mfac_kernels.pruning.patterns import parse
from mfac_kernels.pruning.schedule import sparsities

__all__ = ["Pruned", "Step", "prunable", "prune"]


@dataclass(frozen=True)
class Step:
    """One recomputation.

    Attributes:
        sparsity: of the prunable weights, after it.
        gradients, skipped: used, and refused as not finite.
        cost: the sum of rho over what was dropped, in units of the loss.
        collecting, solving: seconds, for the gradients; for the Fisher, the scores and the update.
    """

    sparsity: float
    gradients: int
    skipped: int
    cost: float
    collecting: float
    solving: float


@dataclass(frozen=True)
class Pruned:
    """What :func:`prune` did: the masks, and a record of each step."""

    masks: Masks
    steps: list[Step] = field(default_factory=list)


def prune(
    model: nn.Module,
    sparsity: float,
    loss: Loss,
    batches: Iterable[Any],
    *,
    ngrads: int = 256,
    damping: float = 1e-5,
    block_size: int | None = None,
    each: Each = "batch",
    joint: bool = False,
    pattern: str = "unstructured",
    group_size: int | None = None,
    scope: Literal["global", "layer"] = "global",
    recomputations: int = 16,
    exclude: Sequence[str] = (),
    masks: Mapping[str, Tensor] | None = None,
    after_step: Callable[[nn.Module], object] | None = None,
    gradients: Gradients | None = None,
    dry_run: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    memory: int | None = None,
    path: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Pruned:
    """Prune the weights of a model, in place, by the optimal brain surgeon on an M-FAC Fisher.

    Pruned are the parameters of two or more dimensions that require a gradient; biases and normalisation stay as they
    are. At each of the ``recomputations`` sparsities of :func:`sparsities` gradients of the weights that are left are
    collected, and these weights take the step of :func:`obs_prune`.

    Args:
        sparsity: of all prunable weights, in [0, 1).
        loss, each, dtype, memory, progress: see :func:`collect`. The model is in the mode that it is given in.
        batches: see :func:`collect`; iterated anew for every step.
        ngrads, damping, block_size: of the Fisher; one over all weights left, in the order of the model. Blocks
            of 1 are the diagonal Fisher; no gradients at all, F = damping I, is pruning by magnitude.
        joint, pattern, group_size: see :func:`obs_prune`. Groups do not cross the rows of ``weight.flatten(1)``.
        scope: ``"global"``: one threshold; ``"layer"``: the sparsity holds in each parameter.
        recomputations: steps of the schedule; 1 is one shot.
        exclude: names of parameters, or patterns of names such as ``"*.fc.*"``, that are not pruned.
        masks: of an earlier call: what they drop stays dropped, and the schedule starts there.
        after_step: called with the model after each step, for example to estimate batch statistics again
            (``torch.optim.swa_utils.update_bn``).
        gradients: for the first step, in place of collecting them: those of all prunable parameters, at the present
            weights.
        dry_run: change nothing: the masks of a single step to ``sparsity`` from the present weights.
        device: of the Fisher's arithmetic; default that of the gradients, the CPU's memory.
        path: a folder for gradients (see :func:`collect`) and for the model between steps: a call that was interrupted
            goes on from there. It is the caller's to delete.

    Returns:
        the masks of all prunable parameters, and a record of the steps.

    Raises:
        TypeError, ValueError: an argument outside these ranges; a pattern in ``exclude`` that fits nothing.
        torch.linalg.LinAlgError: a block that is not positive definite. The model is as it was, after any exception.
    """
    parameters = prunable(model, exclude)
    kind = parse(pattern, group_size)
    check_sparsity(sparsity, kind)
    _checks.positive_int("recomputations", recomputations)
    if ngrads != 0:
        _checks.positive_int("ngrads", ngrads)
    if gradients is not None and gradients.names != tuple(parameters):
        raise ValueError(f"gradients: expected those of {list(parameters)}, got {list(gradients.names)}")
    if scope not in ("global", "layer"):
        raise ValueError(f"scope: expected 'global' or 'layer', got {scope!r}")
    given = Masks({} if masks is None else masks)
    given._parameters(model)
    unknown = [name for name in given if name not in parameters]
    if unknown:
        raise ValueError(f"masks: expected prunable parameters, got {unknown[0]!r}")
    flat = _Flat(parameters)
    kept = flat.join({n: given[n] if n in given else torch.ones_like(p) for n, p in parameters.items()}).bool()
    index = kind.groups(flat.rows)
    layers = flat.sizes if scope == "layer" else [sum(flat.sizes)]
    place = torch.empty(0, device=device).device
    folder = None if path is None else Path(path)

    before = {name: value.detach().clone() for name, value in model.state_dict().items()}
    steps: list[Step] = []
    schedule = sparsities(sparsity, 1 if dry_run else recomputations, min(sparsity, _dropped(kept)))
    if folder is not None and (folder / "model.pt").exists():
        state = torch.load(folder / "model.pt", map_location="cpu", weights_only=True)
        if state["schedule"] != schedule:
            raise ValueError(f"path: expected a schedule of {schedule}, got {state['schedule']} in {folder}")
        steps = [Step(*values) for values in state["steps"]]
        model.load_state_dict(state["model"])
        kept = state["kept"]
    try:
        for number in range(len(steps), len(schedule)):
            started = time.perf_counter()
            if gradients is None and ngrads:
                gradients = collect(
                    model,
                    loss,
                    batches,
                    ngrads,
                    each=each,
                    names=tuple(parameters),
                    masks=flat.split(kept),
                    dtype=dtype,
                    memory=memory,
                    path=None if folder is None else folder / "gradients",
                    progress=progress,
                )
            collected = time.perf_counter()
            weights = flat.join(parameters)[kept].to(place)
            if gradients is None:
                fisher = StaticFisher(weights.new_empty(0, len(weights)), damping, block_size=1, ngrads=1)
            else:
                fisher = gradients.fisher(damping, block_size=block_size, device=place)
            position = torch.where(kept, kept.cumsum(0) - 1, -1)
            found = candidates(weights, fisher, kind, torch.where(index < 0, index, position[index]).to(place))
            left = [int(part.sum()) for part in torch.split(kept, layers)]
            chosen = choose(found, left, targets(kept, schedule[number], layers))
            moved, mask = update(
                weights, fisher, found, chosen, torch.ones_like(weights, dtype=torch.bool), joint=joint
            )
            cost = float(found.rho[chosen].sum())
            new = torch.zeros(len(kept), dtype=moved.dtype)
            new[kept] = moved.cpu()
            kept = kept.masked_scatter(kept, mask.cpu())
            if not dry_run:
                flat.write(new)
                if after_step is not None:
                    after_step(model)
            spent = collected - started, time.perf_counter() - collected
            used, skipped = (0, 0) if gradients is None else (len(gradients.rows), gradients.skipped)
            steps.append(Step(_dropped(kept), used, skipped, cost, *spent))
            gradients = None
            del fisher, found
            if folder is not None:
                content = [[*vars(step).values()] for step in steps]
                state = {"model": model.state_dict(), "kept": kept, "schedule": schedule, "steps": content}
                torch.save(state, folder / "model.partial")
                (folder / "model.partial").replace(folder / "model.pt")  # whole or not at all
                shutil.rmtree(folder / "gradients", ignore_errors=True)
    except BaseException:
        model.load_state_dict(before)
        raise
    return Pruned(Masks({name: mask.to(parameters[name].device) for name, mask in flat.split(kept).items()}), steps)


def prunable(model: nn.Module, exclude: Sequence[str] = ()) -> dict[str, nn.Parameter]:
    """The parameters that :func:`prune` prunes: of two or more dimensions, that require a gradient, not excluded."""
    if isinstance(exclude, str):
        raise TypeError(f"exclude: expected a sequence of names, got the string {exclude!r}")
    found = {n: p for n, p in model.named_parameters() if p.requires_grad and p.dim() >= 2 and p.numel()}
    for pattern in exclude:
        fitting = [name for name in found if fnmatchcase(name, pattern)]
        if not fitting:
            raise ValueError(f"exclude: expected patterns that fit prunable parameters, got {pattern!r}")
        for name in fitting:
            del found[name]
    if not found:
        raise ValueError("model: expected parameters of two or more dimensions that require a gradient, got none")
    return found


def _dropped(kept: Tensor) -> float:
    return 1 - int(kept.sum()) / len(kept)


class _Flat:
    """Parameters as one vector on the CPU, and back."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters = parameters
        self.sizes = [p.numel() for p in parameters.values()]
        self.rows = [(len(p), p[0].numel()) for p in parameters.values()]

    def join(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([tensors[name].detach().reshape(-1).cpu() for name in self._parameters])

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        parts = torch.split(flat, self.sizes)
        return {name: part.view(p.shape) for (name, p), part in zip(self._parameters.items(), parts, strict=True)}

    @torch.no_grad()
    def write(self, flat: Tensor) -> None:
        for name, part in self.split(flat).items():
            self._parameters[name].copy_(part)
