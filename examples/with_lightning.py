"""A preconditioner under Lightning: `python -m examples.with_lightning`.

    Trainer(callbacks=[PreconditionerCallback(lambda module: mk.KFAC(module, damping=0.01))])

It is made when the model is on its device, steps before the optimizer, and is part of the checkpoints.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

import mfac_kernels as mk
from mfac_kernels.preconditioners.base import Preconditioner


class PreconditionerCallback(pl.Callback):
    """Of the preconditioner that ``make(module)`` returns."""

    def __init__(self, make: Callable[[nn.Module], Preconditioner]) -> None:
        self.make, self.loaded = make, None
        self.preconditioner: Preconditioner | None = None

    def on_fit_start(self, trainer: Any, pl_module: nn.Module) -> None:
        self.preconditioner = self.make(pl_module)
        if self.loaded is not None:
            self.preconditioner.load_state_dict(self.loaded)

    def on_before_optimizer_step(self, trainer: Any, pl_module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.preconditioner.step()

    def state_dict(self) -> dict[str, Any]:
        return {} if self.preconditioner is None else self.preconditioner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.loaded = state_dict or None  # the model may not be on its device yet


class Classifier(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def train(folder: str, epochs: int, checkpoint: str | None = None) -> tuple[Classifier, mk.KFAC, pl.Trainer]:
    torch.manual_seed(0)
    model = Classifier()
    callback = PreconditionerCallback(lambda module: mk.KFAC(module, damping=0.01, kl_clip=None))
    x = torch.randn(256, 8, generator=torch.Generator().manual_seed(1))
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, x[:, :3].argmax(1)), batch_size=32)
    trainer = pl.Trainer(
        max_epochs=epochs,
        callbacks=[callback],
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, data, ckpt_path=checkpoint)
    return model, callback.preconditioner, trainer


def main() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        _, preconditioner, _ = train(folder, 3)
    print(f"{preconditioner.steps} steps: {preconditioner.diagnostics()}")


if __name__ == "__main__":
    main()
