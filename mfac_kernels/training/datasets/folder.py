"""Datasets from a folder: torchvision's layouts, or what a package unpacks to."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

from mfac_kernels.training.datasets.dataset import Arrays, DatasetUnavailable
from mfac_kernels.training.datasets.decoder import (
    IDX_FILES,
    Reader,
    decode_cifar10_batches,
    decode_cifar10_strips,
    decode_idx_files,
)

__all__ = ["cifar10_from_folder", "idx_from_folder"]


def cifar10_from_folder(folder: Path) -> tuple[Arrays, str]:
    """The arrays, and where they were found: torchvision's pickles, or the strips of the unpacked package."""
    for candidate in (folder, folder / "cifar-10-batches-py"):
        if (candidate / "data_batch_1").is_file():
            return decode_cifar10_batches(_folder_reader(candidate)), str(candidate)
    if (folder / "data_batch_1.png").is_file():
        return decode_cifar10_strips(_folder_reader(folder)), str(folder)
    raise DatasetUnavailable(
        f"cifar10: {folder} holds neither torchvision's cifar-10-batches-py "
        "(data_batch_1, ..., test_batch) nor data_batch_1.png, ..., test_batch.png"
    )


def idx_from_folder(name: str, candidates: list[Path]) -> tuple[Arrays, str]:
    """The arrays, and where they were found: four idx files, plain or gzipped, in the first candidate that has them."""
    for candidate in candidates:
        if any((candidate / f"{IDX_FILES[0]}{suffix}").is_file() for suffix in ("", ".gz")):
            return decode_idx_files(name, _folder_reader(candidate)), str(candidate)
    raise DatasetUnavailable(f"{name}: {candidates[0]} does not hold {', '.join(IDX_FILES)} (plain or .gz)")


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
