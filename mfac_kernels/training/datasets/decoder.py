"""The formats that datasets come in: PNG strips, pickled batches, idx files. Nothing here knows where files lie."""

from __future__ import annotations

import codecs
import io
import json
import math
import pickle
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

from mfac_kernels.training._extra import require
from mfac_kernels.training.datasets.dataset import Arrays, Bytes, DatasetUnavailable, Labels

__all__ = ["IDX_FILES", "Reader", "decode_cifar10_batches", "decode_cifar10_strips", "decode_idx_files"]

Reader = Callable[[str], bytes]  # a file's name -> its content

IDX_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
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


def decode_cifar10_strips(read: Reader) -> Arrays:
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


def decode_cifar10_batches(read: Reader) -> Arrays:
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


def decode_idx_files(name: str, read: Reader) -> Arrays:
    train_images, train_labels, test_images, test_labels = (_decode_idx(file, read(file)) for file in IDX_FILES)
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
