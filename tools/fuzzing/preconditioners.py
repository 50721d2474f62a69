"""Preconditioners: of right or wrong options, then trained, saved, resumed and disturbed at random."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import mfac_kernels as mk
from fuzzing.draw import Arguments, Draw, Work
from fuzzing.fisher import reload
from fuzzing.outcome import Stateful, attempt
from fuzzing.surface import surface

Make = Callable[[Draw], tuple[nn.Module, Tensor]]

NETWORKS: dict[str, Make] = {
    "linear": lambda draw: (nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), draw.normal(draw.int(0, 6), 3)),
    "positions": lambda draw: (nn.Sequential(nn.Linear(3, 2, bias=False), nn.LayerNorm(2)), draw.normal(4, 5, 3)),
    "convolutions": lambda draw: (
        nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 2, groups=2)),
        draw.normal(draw.int(2, 4), 2, 4, 5),
    ),
    "strided": lambda draw: (
        nn.Sequential(nn.Conv1d(2, 3, 3, stride=2), nn.Flatten(), nn.Linear(9, 2)),
        draw.normal(draw.int(0, 3), 2, 7),
    ),
    "transposed": lambda draw: (nn.Sequential(nn.ConvTranspose2d(2, 3, 2)), draw.normal(2, 2, 3, 3)),
    "indices": lambda draw: (
        nn.Sequential(nn.Embedding(7, 3, padding_idx=0), nn.Linear(3, 2)),
        torch.tensor([[draw.int(0, 6) for _ in range(4)] for _ in range(3)]),
    ),
    "shared": lambda draw: (nn.Sequential(*[nn.Linear(3, 3)] * 2), draw.normal(4, 3)),
    "one bfloat16": lambda draw: (nn.Sequential(nn.Linear(3, 2)).bfloat16(), draw.normal(4, 3).bfloat16()),
}
WORK = (math.nan, 1e30, 1.0, 1.0, 1.0, 1.0)  # what the loss is multiplied by


def backward(draw: Draw, net: nn.Module, x: Tensor) -> None:
    """Of a loss that is not always finite. A batch without samples is as good as another."""
    net.zero_grad(set_to_none=draw.bool())
    (net(x).float().square().sum() * draw.pick(WORK)).backward()


def trained(draw: Draw, net: nn.Module, x: Tensor, p: Any, *closure: Callable[[], object]) -> None:
    """Backward passes, steps and others in any order; a step that is refused changes nothing but for its batch."""

    def state() -> Any:
        try:
            return p.state_dict()
        except RuntimeError:  # some have none between a backward pass and its step
            return p.steps

    def damp() -> None:
        p.damping = draw.pick((0.1, 1.0, 0.0, -1.0, math.nan, math.inf, 1e-300, 1e30))

    actions: dict[str, Callable[[], Any]] = {
        "step": lambda: p.step(*closure),
        "state_dict": lambda: p.state_dict(),
        "reload": lambda: reload(draw, p.state_dict(), p.load_state_dict),
        "diagnostics": lambda: p.diagnostics(),
        "damping": damp,
        "no gradient": lambda: net.zero_grad(),
    }
    for _ in range(draw.int(1, 10)):
        net.train(not draw.chance(5))
        if draw.int(0, 2):
            attempt(lambda: backward(draw, net, x), keeps=False)
        attempt(actions[draw.pick(("step", "step", "step", *actions))], Stateful(state))


def options_of(draw: Draw) -> Arguments:
    """Those that K-FAC and its relatives share."""
    options: Arguments = {"damping": draw.positive(), "kl_clip": draw.pick((None, 1e-3)), "lr": 0.1}
    options["inv_update_steps"] = draw.int(1, 2)
    options["factor_decay"] = draw.pick((0.0, 0.95))
    options["accumulation_steps"] = draw.int(1, 2)
    options["loss_average"] = draw.pick(("batch", "sum", "positions"))
    options["fisher_type"] = draw.pick(("empirical", "empirical", "mc"))
    options["normalization"] = draw.pick(("unit", "diagonal", "skip"))
    options["batch_size"] = draw.pick((None, None, 4))
    options["include"] = draw.pick((None, None, ["0"], ["none of them"]))
    return options


def of_kfac(draw: Draw) -> Arguments:
    options = options_of(draw)
    options["factor_update_steps"] = draw.int(1, 2)
    options["spatial"] = draw.pick(("full", "uncorrelated"))
    options["group_size"] = draw.pick((None, None, 1, 2, (1, None)))
    options["approximation"] = draw.pick(("expand", "reduce"))
    options["approximate"] = draw.pick(("kfac", "kfac", "tkfac", "kpsvd", "deflation"))
    options["damping_style"] = draw.pick(("factored", "factored", "exact"))
    options["eigen_correction"] = draw.chance(4)
    return options


@surface("KFAC")
def _(draw: Draw) -> None:
    net, x = NETWORKS[draw.pick(NETWORKS)](draw)
    options = draw.flawed(of_kfac(draw))
    made = attempt(lambda: mk.KFAC(net, **options), net)
    if isinstance(made, mk.KFAC):
        attempt(lambda: str(made))
        trained(draw, net, x, made)


@surface("TwoLevelKFAC", "CoarseSpace")
def _(draw: Draw) -> None:
    net, x = NETWORKS[draw.pick(NETWORKS)](draw)
    options = {**of_kfac(draw), "omega": draw.pick((1.0, 1.0, 0.5)), "fisher_batch": draw.pick((1.0, 0.4))}
    spaces = ("nicolaides", "residual", "spectral", "krylov_nicolaides", "krylov_residual", "tselepidis")
    options["coarse_space"] = draw.pick((*spaces, Signs()))
    options["combination"] = draw.pick(("corrected", "corrected", "additive", "deflated", "balanced"))
    options = draw.flawed(options)
    made = attempt(lambda: mk.TwoLevelKFAC(net, **options), net)
    if isinstance(made, mk.TwoLevelKFAC):
        trained(draw, net, x, made)


class Signs(mk.CoarseSpace):
    """A user's: the signs of the gradient."""

    def rows(self, step: Any) -> list[list[Tensor]]:
        return [[g.sign() for g in step.gradients]]


@surface("MiniBlockFisher")
def _(draw: Draw) -> None:
    net, x = NETWORKS[draw.pick(NETWORKS)](draw)
    options = draw.flawed({**options_of(draw), "linear": draw.pick(("neuron", "mean"))})
    made = attempt(lambda: mk.MiniBlockFisher(net, **options), net)
    if isinstance(made, mk.MiniBlockFisher):
        trained(draw, net, x, made)


@surface("KBFGS")
def _(draw: Draw) -> None:
    net, x = NETWORKS[draw.pick(NETWORKS)](draw)
    options = {**options_of(draw), "pair_decay": 0.9, "mu": 0.2}
    options["fisher_type"] = "empirical"
    options = draw.flawed(options)
    made = attempt(lambda: mk.KBFGS(net, **options), net)
    if isinstance(made, mk.KBFGS):
        trained(draw, net, x, made, lambda: backward(draw, net, x))


@surface("MFAC")
def _(draw: Draw) -> None:
    net, x = NETWORKS[draw.pick(NETWORKS)](draw)
    options: Arguments = {"ngrads": Work(draw.int(1, 5)), "damping": draw.positive(), "dtype": draw.dtype()}
    options["momentum"] = draw.pick((0.0, 0.9))
    options["momentum_mode"] = draw.pick(("decoupled", "coupled"))
    options["weight_decay"] = draw.pick((0.0, 0.1))
    options["weight_decay_mode"] = draw.pick(("decoupled", "coupled"))
    options["normalize"] = draw.pick(("ngrads", "seen"))
    options["per_group"] = draw.bool()
    options = draw.flawed({"params": list(net.parameters()), **options}, sound=("params",))
    made = attempt(lambda: mk.MFAC(**options), net)
    if isinstance(made, mk.MFAC):
        trained(draw, net, x, made)
