"""Networks from files of weights: the demonstration's own, and CIFAR ResNets with torchvision's names."""

from __future__ import annotations

import os
import pickle
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mfac_kernels.training.models import ResNet20

__all__ = ["Checkpoint", "CifarResNet", "load_checkpoint"]


class _Block(nn.Module):
    """Two 3x3 convolutions around a shortcut: a projection, or subsampling and zeros for new channels."""

    def __init__(self, channels: int, width: int, stride: int, projection: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        if projection:
            self.downsample = nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))
        self.projection, self.stride, self.new_channels = projection, stride, width - channels

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W)
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.projection:
            x = self.downsample(x)
        elif self.stride > 1 or self.new_channels:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))
        return F.relu(x + y)


class CifarResNet(nn.Module):
    """A ResNet for small images (He et al., 2015, section 4.2) in torchvision's names: conv1, bn1, layer1 .. 3, fc.

    Depth, widths and shortcuts are those of a state dict. (N, in_channels, H, W) -> (N, num_classes).
    """

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        width, in_channels = state["conv1.weight"].shape[:2]
        self.conv1 = nn.Conv2d(in_channels, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        channels, stages = width, []
        for stage in (1, 2, 3):
            blocks: list[nn.Module] = []
            while (name := f"layer{stage}.{len(blocks)}") + ".conv1.weight" in state:
                width = len(state[f"{name}.conv1.weight"])
                stride = 2 if stage > 1 and not blocks else 1
                blocks.append(_Block(channels, width, stride, f"{name}.downsample.0.weight" in state))
                channels = width
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3 = stages
        self.fc = nn.Linear(channels, len(state["fc.weight"]))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.fc(x.mean(dim=(2, 3)))
        return logits


@dataclass(frozen=True)
class Checkpoint:
    """A network in evaluation mode, and how its inputs are scaled: (pixel / 255 - mean) / std.

    ``scale`` is None for the demonstration's networks: the statistics of the dataset.
    """

    model: nn.Module
    scale: tuple[float, float] | None


def load_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a state dict (or a dict that has it as ``"state_dict"``) and build the network that it belongs to.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds something else, or a network of another kind.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError) as error:
        raise ValueError(f"{path}: expected a file of torch.save, got: {str(error).splitlines()[0]}") from error
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path}: expected a dict of tensors, a network's state_dict()")
    model: nn.Module
    if "stem.0.weight" in state and "head.weight" in state:
        model, scale = ResNet20(state["stem.0.weight"].shape[1], len(state["head.weight"])), None
    elif "conv1.weight" in state and "layer1.0.conv1.weight" in state and "fc.weight" in state:
        model, scale = CifarResNet(state), (0.5, 0.5)
    else:
        raise ValueError(
            f"{path}: expected a ResNet in the demonstration's names (stem, blocks, head) or in torchvision's (conv1, "
            f"layer1, fc), got {', '.join(list(state)[:3])}, ..."
        )
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{path}: {error}") from error
    return Checkpoint(model.eval(), scale)
