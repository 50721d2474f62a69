"""A preconditioner under accelerate: `python -m examples.with_accelerate`.

    model, optimizer, data = accelerator.prepare(model, optimizer, data)
    preconditioner = attach(accelerator, optimizer, mk.KFAC(model, ...))

accelerate has no callbacks. What it has is an optimizer that steps when gradients are accumulated and synchronised, and
a list of what belongs to a checkpoint; the loop stays as it is.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import nn

import mfac_kernels as mk
from mfac_kernels.preconditioners.base import Preconditioner


def attach(
    accelerator: Accelerator, optimizer: torch.optim.Optimizer, preconditioner: Preconditioner
) -> Preconditioner:
    """Precondition before each step that ``optimizer`` takes; saved by ``accelerator.save_state``."""
    inner = getattr(optimizer, "optimizer", optimizer)  # what prepare() has wrapped
    inner.register_step_pre_hook(lambda *_: preconditioner.step())
    accelerator.register_for_checkpointing(preconditioner)
    return preconditioner


def train(
    steps: int, accumulation: int = 1, accelerator: Accelerator | None = None
) -> tuple[nn.Module, Preconditioner]:
    torch.manual_seed(0)
    accelerator = accelerator or Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    x = torch.randn(32 * accumulation * steps, 8, generator=torch.Generator().manual_seed(1))
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, x[:, :3].argmax(1)), batch_size=32)
    model, optimizer, data = accelerator.prepare(model, optimizer, data)
    made = mk.KFAC(model, damping=0.01, kl_clip=None, accumulation_steps=accumulation)
    preconditioner = attach(accelerator, optimizer, made)
    for inputs, labels in data:
        with accelerator.accumulate(model):
            accelerator.backward(nn.functional.cross_entropy(model(inputs), labels))
            optimizer.step()
            optimizer.zero_grad()
    return model, preconditioner


def main() -> None:
    _, preconditioner = train(20, accumulation=2)
    print(f"{preconditioner.steps} steps: {preconditioner.diagnostics()}")


if __name__ == "__main__":
    main()
