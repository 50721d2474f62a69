"""The problems of Koroko et al. 2023 at a size for two cores: networks, data, losses and what their models draw."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from paper_data import faces, fashion_mnist
from torch import Tensor, nn

from mfac_kernels.training import datasets
from mfac_kernels.training.models import vgg11


class Likelihood(ABC):
    """A model's output as the parameters of a distribution of the targets."""

    @abstractmethod
    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Minus the log-likelihood up to a constant: summed over a sample, averaged over samples."""

    @abstractmethod
    def draw(self, output: Tensor) -> Tensor:
        """Targets drawn from the model."""

    scale = 1.0
    """Of the loss as papers report it."""


class Categorical(Likelihood):
    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target)

    def draw(self, output: Tensor) -> Tensor:
        return torch.distributions.Categorical(logits=output).sample()


class Bernoulli(Likelihood):
    """Of each pixel."""

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(output, target, reduction="sum") / len(output)

    def draw(self, output: Tensor) -> Tensor:
        return torch.bernoulli(output.sigmoid())


class Normal(Likelihood):
    """Of each pixel, with variance 1; shown as the mean squared error."""

    scale = 2.0

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return 0.5 * (output - target).square().sum() / len(output)

    def draw(self, output: Tensor) -> Tensor:
        return output + torch.randn_like(output)


@dataclass(frozen=True)
class Data:
    inputs: Tensor
    targets: Tensor
    source: str

    def first(self, count: int) -> Data:
        return Data(self.inputs[:count], self.targets[:count], self.source)


@dataclass(frozen=True)
class Problem:
    """``images``: how many are trained on; ``grid_steps``: of each run of the search; ``published``: minimum losses;
    ``pixels``: that the loss is a mean over.
    """

    title: str
    network: Callable[[], nn.Module]
    data: Callable[[], Data]
    likelihood: Likelihood
    images: int
    batch: int
    epochs: int
    grid_steps: int
    loss: str
    published: str = ""
    pixels: int = 1
    inv_update_steps: int = 1

    def loss_of(self, output: Tensor, target: Tensor) -> Tensor:
        return self.likelihood.loss(output, target) / self.pixels

    def drawn(self, output: Tensor) -> Tensor:
        """A loss whose gradients make the Fisher matrix, that of the whole likelihood divided by ``pixels`` as well."""
        return self.likelihood.loss(output, self.likelihood.draw(output.detach())) / self.pixels**0.5

    def shown(self, loss: float) -> float:
        return loss * self.likelihood.scale

    @property
    def steps_per_epoch(self) -> int:
        return self.images // self.batch

    @property
    def steps(self) -> int:
        return self.epochs * self.steps_per_epoch


def autoencoder(widths: Sequence[int]) -> nn.Sequential:
    """Mirrored, with ReLU but for the code and the outputs."""
    sizes = [*widths, *reversed(widths[:-1])]
    layers: list[nn.Module] = []
    for i, (inputs, outputs) in enumerate(pairwise(sizes), 1):
        layers.append(nn.Linear(inputs, outputs))
        nn.init.xavier_uniform_(layers[-1].weight)
        nn.init.zeros_(layers[-1].bias)
        if i not in (len(widths) - 1, len(sizes) - 1):
            layers.append(nn.ReLU())
    return nn.Sequential(*layers)


def deep_linear(inputs: int, classes: int, depth: int = 64, width: int = 10) -> nn.Sequential:
    """Linear layers with batch normalization and nothing between (Tselepidis et al. 2020).

    Without its scale and shift, which the next layer has.
    """
    layers: list[nn.Module] = [nn.Flatten()]
    for a, b in pairwise([inputs, *[width] * (depth - 1)]):
        layers += [nn.Linear(a, b, bias=False), nn.BatchNorm1d(b, affine=False)]
    return nn.Sequential(*layers, nn.Linear(width, classes))


def mnist_autoencoder() -> nn.Sequential:
    return autoencoder([784, 1000, 500, 250, 30])


def cifar10_network() -> nn.Sequential:
    return vgg11(3, 10, 8)


def _reconstruction(images: Tensor, source: str) -> Data:
    x = images.flatten(1) / 255
    return Data(x, x, source)


def _mnist() -> Data:
    data = datasets.load("mnist")
    return _reconstruction(data.train_images, data.source)


def _faces() -> Data:
    images, source = faces()
    return _reconstruction(F.avg_pool2d(images.float(), 4), f"{source}, means of 4 x 4 pixels")


def _classes(data: datasets.Dataset) -> Data:
    return Data(datasets.normalize(data.train_images, data.mean, data.std), data.train_labels, data.source)


PROBLEMS: dict[str, Problem] = {
    "mnist": Problem(
        "MNIST autoencoder 784-1000-500-250-30, mirrored",
        mnist_autoencoder,
        _mnist,
        Bernoulli(),
        images=5120,
        batch=512,
        epochs=4,
        grid_steps=20,
        inv_update_steps=3,
        loss="cross-entropy of a pixel",
        pixels=784,
        published="K-FAC .0683, two-level .0676 to .0684, Adam .0732, SGD .0768",
    ),
    "faces": Problem(
        "ORL faces autoencoder 644-500-250-100-30, mirrored",
        lambda: autoencoder([644, 500, 250, 100, 30]),
        _faces,
        Normal(),
        images=400,
        batch=200,
        epochs=30,
        grid_steps=20,
        inv_update_steps=2,
        loss="squared error of a pixel",
        pixels=644,
    ),
    "linear": Problem(
        "64 linear layers of width 10 with batch normalization on Fashion-MNIST",
        lambda: deep_linear(784, 10),
        lambda: _classes(fashion_mnist()),
        Categorical(),
        images=5120,
        batch=512,
        epochs=10,
        grid_steps=40,
        loss="cross-entropy",
        published="K-FAC .541, two-level .498 to .519",
    ),
    "cifar10": Problem(
        "VGG-11 with batch normalization, an eighth as wide, on CIFAR-10",
        cifar10_network,
        lambda: _classes(datasets.load("cifar10")),
        Categorical(),
        images=4000,
        batch=100,
        epochs=1,
        grid_steps=20,
        inv_update_steps=2,
        loss="cross-entropy",
    ),
}
