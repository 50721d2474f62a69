"""A small network with batch normalization, a loss, and batches for it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def network(channels: int, classes: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, channels, 3),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * channels, classes),
    ).eval()


def loss(model: nn.Module, batch: list[Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def batches(count: int, size: int, classes: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, size, 1, 4, 4, generator=generator)
    labels = torch.randint(classes, (count, size), generator=generator)
    return list(zip(images, labels, strict=True))
