"""A preconditioner under the Trainer of transformers: `python -m examples.with_transformers`.

    Trainer(model, args, train_dataset=..., callbacks=[PreconditionerCallback(mk.KFAC(model, ...))])

Gradients are clipped before callbacks see them: TrainingArguments(max_grad_norm=0) leaves them as they are. Under
gradient_accumulation_steps=k the preconditioner is made with accumulation_steps=k. Checkpoints of the Trainer have the
preconditioner's state with them.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import mfac_kernels as mk
from mfac_kernels.preconditioners.base import Preconditioner


class PreconditionerCallback(TrainerCallback):
    """Preconditions before each step of the optimizer; saves and resumes with the Trainer's checkpoints."""

    def __init__(self, preconditioner: Preconditioner) -> None:
        self.preconditioner = preconditioner

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step:
            self.preconditioner.load_state_dict(torch.load(self._file(args, state)))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.preconditioner.step()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        torch.save(self.preconditioner.state_dict(), self._file(args, state))

    def _file(self, args: Any, state: Any) -> Path:
        return Path(args.output_dir, f"checkpoint-{state.global_step}", "preconditioner.pt")


class Classifier(nn.Module):
    """A model as the Trainer wants one: it returns its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.net(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def samples(count: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 8, generator=generator)
    return [{"x": row, "labels": row[:3].argmax()} for row in x]


def train(folder: str, steps: int, resume: bool = False) -> tuple[Classifier, mk.KFAC]:
    torch.manual_seed(0)
    model = Classifier()
    preconditioner = mk.KFAC(model, damping=0.01, kl_clip=None)
    args = TrainingArguments(
        folder,
        max_steps=steps,
        save_steps=10,
        per_device_train_batch_size=32,
        learning_rate=0.05,
        max_grad_norm=0,
        lr_scheduler_type="constant",
        optim="sgd",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        logging_strategy="no",
    )
    trainer = Trainer(model, args, train_dataset=samples(256), callbacks=[PreconditionerCallback(preconditioner)])
    trainer.train(resume_from_checkpoint=resume)
    return model, preconditioner


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        _, preconditioner = train(folder, 20)
    print(f"{preconditioner.steps} steps: {preconditioner.diagnostics()}")


if __name__ == "__main__":
    main()
