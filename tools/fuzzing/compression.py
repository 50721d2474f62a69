"""mfac_kernels.pruning: of small networks, with arguments that are right or not."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import mfac_kernels as mk
from fuzzing.draw import Arguments, Draw, Work
from fuzzing.outcome import REFUSED, attempt, expect, expect_finite
from fuzzing.surface import surface
from mfac_kernels import pruning

PATTERNS = ("unstructured", "unstructured", "2:4", "1:3", "1x4", "block", "4:2", "0x3")


def network(draw: Draw) -> tuple[nn.Module, list[Tensor]]:
    """A network, and batches for it."""
    if draw.bool():
        net: nn.Module = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
        size: tuple[int, ...] = (4,)
    else:
        net, size = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2)), (2, 4, 4)
    return net, [draw.normal(draw.int(2, 3), *size) for _ in range(draw.int(0, 3))]


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


@surface("pruning.obs_prune")
def _(draw: Draw) -> None:
    d = draw.int(1, 24)
    fisher = mk.StaticFisher(draw.normal(draw.int(1, 5), d), 0.1, block_size=draw.pick((None, 3, 8)))
    options: Arguments = {"weights": draw.tensor(d), "sparsity": draw.pick((0.0, 0.3, 0.5, 0.9)), "joint": draw.bool()}
    options["pattern"] = draw.pick(PATTERNS)
    options["group_size"] = draw.pick((None, None, 3))
    options["layers"] = draw.pick((None, None, [d], [1, d - 1]))
    options["mask"] = draw.normal(d) > -1 if draw.bool() else None
    options = draw.flawed(options)
    found = attempt(lambda: pruning.obs_prune(fisher=fisher, **options), options["weights"])
    if found is not REFUSED:
        weights, mask = found
        expect(bool((weights[~mask] == 0).all()), "obs_prune: expected weights of zero where the mask is false")
        if draw.tame:
            expect_finite("obs_prune", weights)


@surface("pruning.prune", "pruning.prunable", "pruning.Masks")
def _(draw: Draw) -> None:
    net, batches = network(draw)
    options: Arguments = {"sparsity": draw.pick((0.0, 0.5, 0.9)), "ngrads": Work(draw.int(1, 4))}
    options["damping"] = draw.positive()
    options["block_size"] = draw.pick((None, 8))
    options["each"] = draw.pick(("batch", "sample"))
    options["joint"] = draw.bool()
    options["pattern"] = draw.pick(PATTERNS)
    options["scope"] = draw.pick(("global", "layer"))
    options["recomputations"] = Work(draw.int(1, 2))
    options["exclude"] = draw.pick(((), ("0",), ("none",)))
    options["dry_run"] = draw.bool()
    options["memory"] = draw.pick((None, 1, 10_000))
    options = draw.flawed(options)
    pruned = attempt(lambda: pruning.prune(net, loss=loss, batches=batches, **options), net, keeps=False)
    if not isinstance(pruned, pruning.Pruned):
        return
    other = attempt(lambda: pruning.Masks(draw.flawed({"masks": dict(pruned.masks)})["masks"]))
    if isinstance(other, pruning.Masks):
        attempt(lambda: other.apply(net), net)
        attempt(lambda: (other.sparsity, other.sparsities()), net)
        attempt(lambda: other.to_torch(net), keeps=False)
        attempt(lambda: pruning.Masks.of(net))


@surface("pruning.collect")
def _(draw: Draw) -> None:
    net, batches = network(draw)
    options: Arguments = {"count": Work(draw.int(1, 5)), "each": draw.pick(("batch", "sample"))}
    options["names"] = draw.pick((None, None, ["0.weight"], ["nothing"], []))
    options["dtype"] = draw.dtype()
    options["memory"] = draw.pick((None, 1, 10_000))
    options = draw.flawed(options)
    found = attempt(lambda: pruning.collect(net, loss, batches, **options), net)
    if isinstance(found, pruning.Gradients):
        attempt(lambda: found.fisher(draw.positive()))


@surface("pruning.sparsities")
def _(draw: Draw) -> None:
    options = {"target": draw.pick((0.0, 0.5, 0.95)), "steps": Work(draw.int(1, 9)), "start": draw.pick((0.0, 0.3))}
    options = draw.flawed(options)
    found = attempt(lambda: pruning.sparsities(**options))
    if found is not REFUSED:
        expect(found == sorted(found), f"sparsities: expected an ascending list, got {found}")


@surface("pruning.LayerHessian", "pruning.gptq", "pruning.sparsegpt", "pruning.round_to_nearest")
def _(draw: Draw) -> None:
    net, batches = network(draw)
    options: Arguments = {"include": draw.pick((None, None, ["0"], ["nothing"])), "scale": "hessian", "memory": None}
    options = draw.flawed(options)
    made = attempt(lambda: pruning.LayerHessian(net, **options), net)
    if not isinstance(made, pruning.LayerHessian):
        return
    with torch.no_grad(), made:
        for x in batches:
            attempt(partial(net, draw.valued(x)), keeps=False)
    attempt(lambda: made.load_state_dict(draw.flawed({"s": made.state_dict()})["s"]), keeps=False)
    for name in list(made):
        change(draw, made.layer(name), draw.changed(made[name]) if draw.chance(4) else made[name])


def change(draw: Draw, layer: Any, hessian: Tensor) -> None:
    """Quantise or prune a layer."""
    chosen = draw.pick(("gptq", "sparsegpt", "round_to_nearest"))
    settings: Arguments = {"layer": layer}
    if chosen == "sparsegpt":
        settings |= {"sparsity": draw.pick((0.0, 0.5)), "pattern": draw.pick(PATTERNS)}
    else:
        settings |= {"bits": Work(draw.int(1, 8)), "group_size": draw.pick((None, 2, 3)), "symmetric": draw.bool()}
    if chosen != "round_to_nearest":
        settings |= {"hessian": hessian, "damping": draw.positive(), "block_size": draw.pick((1, 3, 128))}
    settings = draw.flawed(settings, sound=("layer",))
    attempt(lambda: getattr(pruning, chosen)(**settings), layer)
