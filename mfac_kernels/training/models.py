"""Small image classifiers: enough network to compare optimizers on."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["MODELS", "ResNet20", "build_model", "cnn", "mlp", "vgg11"]


class _Block(nn.Module):
    """Two 3x3 convolutions around a shortcut without parameters (option A of the ResNet paper)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.stride = stride
        self.new_channels = out_channels - in_channels

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W)
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.new_channels or self.stride > 1:
            # Subsample, then fill the new channels with zeros.
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))
        return F.relu(x + y)


class ResNet20(nn.Module):
    """ResNet-20 for small images (He et al., 2015, section 4.2): 269,722 parameters on CIFAR-10.

    Any image size is taken: (N, in_channels, H, W) -> (N, num_classes).
    """

    def __init__(self, in_channels: int = 3, num_classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(in_channels, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        blocks: list[nn.Module] = []
        channels = 16
        for width, first_stride in ((16, 1), (32, 2), (64, 2)):
            for stride in (first_stride, 1, 1):
                blocks.append(_Block(channels, width, stride))
                channels = width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        features = self.blocks(self.stem(x)).mean(dim=(2, 3))
        logits: Tensor = self.head(features)
        return logits


def vgg11(in_channels: int, num_classes: int, width: int = 64) -> nn.Module:
    """VGG-11 for images of 32 x 32, with batch normalization (Simonyan, Zisserman, 2014, configuration A).

    ``width``: channels of the first layer; the others have 2, 4 and 8 times as many.
    """
    layers: list[nn.Module] = []
    channels = in_channels
    for factor in (1, 0, 2, 0, 4, 4, 0, 8, 8, 0, 8, 8, 0):
        if factor == 0:
            layers.append(nn.MaxPool2d(2))
            continue
        layers += [
            nn.Conv2d(channels, factor * width, 3, padding=1, bias=False),
            nn.BatchNorm2d(factor * width),
            nn.ReLU(),
        ]
        channels = factor * width
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels, num_classes))
    for module in model:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


def cnn(in_channels: int, num_classes: int, image_size: tuple[int, int]) -> nn.Module:
    """Two convolutions and a linear layer, for digits and MNIST; ``image_size`` is (H, W)."""
    height, width = (-(-side // 4) for side in image_size)  # two strides of 2, rounded up
    return nn.Sequential(
        nn.Conv2d(in_channels, 16, 3, 2, 1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, 2, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * height * width, num_classes),
    )


def mlp(in_channels: int, num_classes: int, image_size: tuple[int, int]) -> nn.Module:
    """Two hidden layers of 64; ``image_size`` is (H, W)."""
    height, width = image_size
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(in_channels * height * width, 64),
        nn.ReLU(),
        nn.Linear(64, 64),
        nn.ReLU(),
        nn.Linear(64, num_classes),
    )


MODELS: dict[str, Callable[[int, int, tuple[int, int]], nn.Module]] = {
    "resnet20": lambda in_channels, num_classes, _: ResNet20(in_channels, num_classes),
    "cnn": cnn,
    "mlp": mlp,
}


def build_model(name: str, in_channels: int, num_classes: int, image_size: tuple[int, int]) -> nn.Module:
    """Build one of ``MODELS`` for images (in_channels, *image_size), from torch's global generator.

    Raises:
        ValueError: unknown name.
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}: expected one of {', '.join(MODELS)}")
    return MODELS[name](in_channels, num_classes, image_size)
