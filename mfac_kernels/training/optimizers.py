"""The optimizers that are compared, their settings, and the grid that the default settings were chosen from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from mfac_kernels import KFAC, MFAC, TwoLevelKFAC

__all__ = [
    "CHOSEN",
    "GRID",
    "GRID_STEPS",
    "AdamConfig",
    "KFACConfig",
    "MFACConfig",
    "OptimizerConfig",
    "SGDConfig",
    "TwoLevelConfig",
]

_Normalize = Literal["ngrads", "seen"]
Built = tuple[torch.optim.Optimizer, Callable[[], object] | None]


@dataclass(frozen=True)
class OptimizerConfig:
    """Settings that every optimizer has; a subclass adds its own and builds itself."""

    name: ClassVar[str]  # on the command line and in files
    label: ClassVar[str]  # in tables and figures
    origin: ClassVar[str]  # of the default settings

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
    origin = "the best of its grid (benchmarks/results/cifar10_grid.md)"

    def build(self, model: nn.Module) -> Built:
        optimizer = torch.optim.SGD(
            model.parameters(), lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay
        )
        return optimizer, None


@dataclass(frozen=True)
class AdamConfig(OptimizerConfig):
    """torch's Adam; momentum is its first beta."""

    name = "adam"
    label = "Adam"
    origin = "the best of its grid (benchmarks/results/cifar10_grid_adam.md)"

    def build(self, model: nn.Module) -> Built:
        betas = (self.momentum, 0.999)
        return torch.optim.Adam(model.parameters(), lr=self.lr, betas=betas, weight_decay=self.weight_decay), None


@dataclass(frozen=True)
class MFACConfig(OptimizerConfig):
    """Plain SGD on the gradients that M-FAC preconditions."""

    name = "mfac"
    label = "M-FAC"
    origin = "the best of its grid (benchmarks/results/cifar10_grid.md)"

    ngrads: int = 128
    damping: float = 1e-4
    normalize: _Normalize = "ngrads"

    def build(self, model: nn.Module) -> Built:
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
    origin = "the best of its grid (benchmarks/results/cifar10_grid_kfac.md)"

    damping: float = 0.03
    inv_update_steps: int = 10
    spatial: Literal["full", "sua"] = "full"
    group_size: int | None = None

    def build(self, model: nn.Module) -> Built:
        optimizer = torch.optim.SGD(
            model.parameters(), lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay
        )
        return optimizer, self.preconditioner(model).step

    def preconditioner(self, model: nn.Module) -> KFAC:
        return KFAC(model, self.damping, **self._options())

    def _options(self) -> dict[str, Any]:
        return {
            "inv_update_steps": self.inv_update_steps,
            "spatial": self.spatial,
            "group_size": self.group_size,
            "kl_clip": None,
            "normalization": "skip",
        }


@dataclass(frozen=True)
class TwoLevelConfig(KFACConfig):
    """K-FAC whose steps are corrected in a coarse space."""

    name = "kfac-two-level"
    label = "two-level K-FAC"
    origin = "those of K-FAC, with no grid of its own"

    coarse_space: str = "nicolaides"
    omega: float = 1.0

    def preconditioner(self, model: nn.Module) -> TwoLevelKFAC:
        return TwoLevelKFAC(model, self.damping, coarse_space=self.coarse_space, omega=self.omega, **self._options())


_NORMALIZATIONS: tuple[tuple[int, _Normalize], ...] = ((128, "seen"), (512, "ngrads"), (512, "seen"))
GRID: dict[str, tuple[OptimizerConfig, ...]] = {
    "sgd": tuple(SGDConfig(lr=lr) for lr in (0.03, 0.1, 0.3)),
    "adam": tuple(AdamConfig(lr=lr) for lr in (3e-4, 1e-3, 3e-3, 1e-2)),
    "mfac": (
        *(MFACConfig(lr=lr, damping=damping) for damping in (1e-4, 3e-5) for lr in (5e-4, 1e-3, 2e-3)),
        # A wide window is slow to start if the sum is divided by its size from the first gradient on.
        *(MFACConfig(lr=1e-3, ngrads=ngrads, normalize=normalize) for ngrads, normalize in _NORMALIZATIONS),
    ),
    "kfac": tuple(KFACConfig(lr=lr, damping=damping) for damping in (0.01, 0.03, 0.1) for lr in (0.003, 0.01, 0.03)),
    "kfac-two-level": (TwoLevelConfig(lr=0.01, damping=0.03),),  # K-FAC's best
}
GRID_STEPS = 240
# The best of GRID on CIFAR-10 with ResNet-20, batch 128, by the mean loss of the last 40 of 240
# steps (benchmarks/results/cifar10_grid*.md); `mfac-kernels train --grid` repeats the search.
CHOSEN: dict[str, OptimizerConfig] = {
    "sgd": SGDConfig(lr=0.1),
    "adam": AdamConfig(lr=3e-3),
    "mfac": MFACConfig(lr=1e-3, damping=1e-4),
    "kfac": KFACConfig(lr=0.01, damping=0.03),
    "kfac-two-level": TwoLevelConfig(lr=0.01, damping=0.03),
}
