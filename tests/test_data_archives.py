"""Published archives, made by hand: MNIST's and CIFAR's files, damaged and missing ones, downloads."""

from __future__ import annotations

import gzip
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_files import assert_well_formed, load

from fedcil.data import cifar, default_root, download
from fedcil.data.mnist import read_idx
from fedcil.data.pickles import read_pickle
from fedcil.errors import DataMissing, InputError
from fedcil.keys import Key
from fedcil.tables import DataSection

pytestmark = pytest.mark.usefixtures("array_cache")


def write_idx(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes()
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wb") as file:
        file.write(header + array.tobytes())


def write_mnist(root: Path, suffix: str = "") -> np.ndarray:
    images = Key(0).at("mnist").numpy().integers(0, 256, (20, 28, 28)).astype(np.uint8)
    for prefix, part in (("train", slice(0, 15)), ("t10k", slice(15, 20))):
        write_idx(root / f"MNIST/raw/{prefix}-images-idx3-ubyte{suffix}", images[part])
        write_idx(root / f"MNIST/raw/{prefix}-labels-idx1-ubyte{suffix}", np.arange(20, dtype=np.uint8)[part] % 10)
    return images


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_mnist_files(tmp_path: Path, suffix: str) -> None:
    images = write_mnist(tmp_path, suffix)
    data = load(name="mnist", root=tmp_path)
    assert_well_formed(data)
    np.testing.assert_array_equal(data.train.images[..., 0], images[:15])
    np.testing.assert_array_equal(data.test.images[..., 0], images[15:])
    assert data.test.labels.tolist() == [5, 6, 7, 8, 9]


def test_damaged_idx_files(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    path = tmp_path / "MNIST/raw/train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match="its header promises"):
        read_idx(path)
    path.write_bytes(b"no idx file at all")
    with pytest.raises(InputError, match="does not begin"):
        load(name="mnist", root=tmp_path)
    packed = path.with_name(path.name + ".gz")
    packed.write_bytes(gzip.compress(b"abc")[:-9])
    with pytest.raises(InputError, match="cannot be read"):
        read_idx(packed)


def test_idx_files_of_different_counts(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    write_idx(tmp_path / "MNIST/raw/t10k-images-idx3-ubyte", np.zeros((4, 28, 28), np.uint8))
    with pytest.raises(InputError, match="5 labels for 4 images") as error:
        load(name="mnist", root=tmp_path)
    assert error.value.where.endswith("t10k-labels-idx1-ubyte")


@pytest.fixture
def cifar_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small archive of the official form; its checksums are taken as the official ones."""
    folder = tmp_path / "data" / "cifar-100-python"
    folder.mkdir(parents=True)
    for name, count in (("train", 8), ("test", 4)):
        pixels = Key(0).at(name).numpy().integers(0, 256, (count, 3072)).astype(np.uint8)
        fine = [label % 4 for label in range(count)]
        table = {"data": pixels, "fine_labels": fine, "coarse_labels": [label // 2 for label in fine]}
        (folder / name).write_bytes(pickle.dumps(table, protocol=3))
    names = {"fine_label_names": ["a", "b", "c", "d"], "coarse_label_names": ["ab", "cd"]}
    (folder / "meta").write_bytes(pickle.dumps(names, protocol=2))
    monkeypatch.setattr(cifar, "_check", lambda path, md5: None)
    return tmp_path / "data"


def test_cifar_fine_and_coarse(cifar_root: Path) -> None:
    fine = load(name="cifar100", root=cifar_root)
    assert_well_formed(fine)
    table = pickle.loads((cifar_root / "cifar-100-python/train").read_bytes())
    assert fine.train.images[3, 5, 7].tolist() == [table["data"][3, c * 1024 + 5 * 32 + 7] for c in range(3)]
    assert fine.class_names == ("a", "b", "c", "d")
    coarse = load(name="cifar100_coarse", root=cifar_root)
    assert coarse.train.labels.tolist() == [0, 0, 1, 1, 0, 0, 1, 1]
    assert coarse.class_names == ("ab", "cd")
    np.testing.assert_array_equal(coarse.train.images, fine.train.images)
    assert coarse.digest != fine.digest


def test_cifar_checksum(cifar_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("FEDCIL_CACHE", str(cifar_root / "cache"))
    with pytest.raises(InputError, match="not the official file") as error:
        load(name="cifar100", root=cifar_root)
    assert error.value.where.endswith("train")


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("harm",)


@pytest.mark.parametrize("content", [{"data": Harmful()}, Harmful(), {"data": np.zeros}])
def test_pickles_that_name_anything_else_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: object
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "train"
    path.write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(InputError, match="asks for"):
        read_pickle(path)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("content", [b"", b"garbage", pickle.dumps([1, 2], protocol=2), pickle.dumps({"a": 1})[:-2]])
def test_damaged_pickles(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "train").write_bytes(content)
    with pytest.raises(InputError, match="cannot be read as a CIFAR file"):
        read_pickle(tmp_path / "train")


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10", "cifar100", "cifar100_coarse"])
def test_missing_sets_say_where_and_how(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataMissing, match=f"{name}.*no network") as error:
        load(name=name, root=tmp_path / "empty")
    assert str(tmp_path / "empty") in error.value.where
    assert not (tmp_path / "empty").exists(), "it may be misspelt"
    for word in ("--data-root", "data.root", "FEDCIL_DATA_ROOT"):
        assert word in error.value.next
    assert "data root that holds" in error.value.allowed


def test_download_brings_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def bring(torchvision_name: str, root: Path) -> None:
        asked.append(torchvision_name)
        write_mnist(root)

    monkeypatch.setattr(download, "refuse_silence", lambda _: None)
    monkeypatch.setattr(download, "download", bring)
    for _ in range(2):
        assert len(load(name="mnist", root=tmp_path / "new").train.labels) == 15
    assert asked == ["MNIST"]


def test_root_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare, named = DataSection(), DataSection(root="/named")
    assert default_root(bare, None) == Path.home() / ".cache/fedcil/data"
    monkeypatch.setenv("FEDCIL_DATA_ROOT", "/environment")
    assert default_root(bare, None) == Path("/environment")
    assert default_root(named, None) == Path("/named")
    assert default_root(named, tmp_path) == tmp_path


@pytest.mark.usefixtures("no_home")
def test_a_data_root_in_the_home_of_nobody() -> None:
    assert default_root(DataSection(root="/named"), None) == Path("/named")
    for root in (None, "~nosuchuser/data"):
        with pytest.raises(InputError, match="there is no home folder ~") as error:
            load(name="mnist", root=root and Path(root))
        assert "FEDCIL_DATA_ROOT" in error.value.next
