"""What a dataset is: images and labels, checked, with the statistics that normalise them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["Arrays", "Bytes", "Dataset", "DatasetUnavailable", "Labels"]

Bytes = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]
# Training images (N, C, H, W), training labels (N,), then the test set's.
Arrays = tuple[Bytes, Labels, Bytes, Labels]


class DatasetUnavailable(RuntimeError):
    """A dataset could not be had; the message says what failed and what to do."""


@dataclass(frozen=True)
class Dataset:
    """Images and labels in memory, with what is needed to feed them to a network."""

    name: str
    train_images: Tensor  # (N, C, H, W) uint8
    train_labels: Tensor  # (N,) int64
    test_images: Tensor  # (M, C, H, W) uint8
    test_labels: Tensor  # (M,) int64
    mean: tuple[float, ...]  # per channel, of the training images scaled to [0, 1]
    std: tuple[float, ...]
    classes: tuple[str, ...]
    source: str  # where the data came from, for reports
    pad: int = 0  # pixels of zero padding before the random crop of the standard augmentation
    flip: bool = False  # whether the standard augmentation mirrors images

    @classmethod
    def from_arrays(
        cls, name: str, arrays: Arrays, classes: tuple[str, ...], source: str, *, pad: int = 0, flip: bool = False
    ) -> Dataset:
        """Check the arrays against each other and measure the channels.

        Raises:
            DatasetUnavailable: images and labels differ in number, there are none, or a label is out of range.
        """
        for part, images, labels in (("train", *arrays[:2]), ("test", *arrays[2:])):
            if len(images) != len(labels) or len(images) == 0:
                raise DatasetUnavailable(
                    f"{name}: expected as many {part} images as labels, at least one; "
                    f"got {len(images)} and {len(labels)}"
                )
            if labels.min() < 0 or labels.max() >= len(classes):
                raise DatasetUnavailable(
                    f"{name}: expected {part} labels from 0 to {len(classes) - 1}, got {labels.min()} to {labels.max()}"
                )
        mean, std = _channel_statistics(arrays[0])
        train_images, train_labels, test_images, test_labels = map(torch.from_numpy, arrays)
        return cls(name, train_images, train_labels, test_images, test_labels, mean, std, classes, source, pad, flip)


def _channel_statistics(images: Bytes) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of images / 255, from exact histograms."""
    levels = np.arange(256) / 255.0
    means, stds = [], []
    for channel in range(images.shape[1]):
        counts = np.zeros(256, dtype=np.int64)
        for start in range(0, len(images), 4096):  # bincount widens its input to 64 bits: keep that copy small
            counts += np.bincount(images[start : start + 4096, channel].ravel(), minlength=256)
        weights = counts / counts.sum()
        mean = float(weights @ levels)
        means.append(mean)
        stds.append(max(float(weights @ (levels - mean) ** 2) ** 0.5, 1e-3))  # a constant channel has no scale
    return tuple(means), tuple(stds)
