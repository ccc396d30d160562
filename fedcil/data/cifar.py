"""CIFAR-10 and CIFAR-100, the latter with its 100 fine or its 20 coarse classes (Krizhevsky 2009).

torchvision would unpickle freely and knows no coarse labels, so its part here is the download only.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedcil.data.cache import Blocks, Draft, cached, fingerprint
from fedcil.data.dataset import Dataset
from fedcil.data.download import obtain
from fedcil.data.pickles import read_pickle
from fedcil.errors import InputError

if TYPE_CHECKING:
    from fedcil.tables import DataSection


@dataclass(frozen=True, slots=True, kw_only=True)
class Archive:
    """Where a set's parts are and how they are called; files with the MD5 of the official archive."""

    torchvision_name: str
    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    meta: str
    labels: str
    names: str
    md5: dict[str, str]
    mean: tuple[float, ...]
    std: tuple[float, ...]


CIFAR10 = Archive(
    torchvision_name="CIFAR10",
    folder="cifar-10-batches-py",
    train=tuple(f"data_batch_{number}" for number in range(1, 6)),
    test=("test_batch",),
    meta="batches.meta",
    labels="labels",
    names="label_names",
    md5={
        "data_batch_1": "c99cafc152244af753f735de768cd75f",
        "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "data_batch_4": "634d18415352ddfa80567beed471001a",
        "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        "test_batch": "40351d587109b95175f43aff81a1287e",
        "batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
    },
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
)
CIFAR100 = Archive(
    torchvision_name="CIFAR100",
    folder="cifar-100-python",
    train=("train",),
    test=("test",),
    meta="meta",
    labels="fine_labels",
    names="fine_label_names",
    md5={
        "train": "16019d7e3df5f24257cddd939b257f8d",
        "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
        "meta": "7973b15100ade9c7d40fb424638fde48",
    },
    mean=(0.5071, 0.4865, 0.4409),
    std=(0.2673, 0.2564, 0.2762),
)
ARCHIVES = {
    "cifar10": CIFAR10,
    "cifar100": CIFAR100,
    "cifar100_coarse": replace(CIFAR100, labels="coarse_labels", names="coarse_label_names"),
}


def load(section: DataSection, root: Path, show_progress: bool) -> Dataset:  # noqa: ARG001
    """50,000 training and 10,000 test images, (n, 32, 32, 3), in the order of the archive."""
    archive = ARCHIVES[section.name]
    folder = root / archive.folder
    files = [folder / name for name in archive.md5]
    layout = f"{archive.folder}/ with {', '.join(archive.md5)} (the official python archive, unpacked)"
    obtain(section.name, root, files, layout, archive.torchvision_name)
    return cached(section.name, fingerprint(files), lambda: _draft(section.name, archive, folder))


def _draft(name: str, archive: Archive, folder: Path) -> Draft:
    for file, md5 in archive.md5.items():
        _check(folder / file, md5)
    return Draft(
        name=name,
        train=_read(folder, archive.train, archive.labels),
        test=_read(folder, archive.test, archive.labels),
        mean=archive.mean,
        std=archive.std,
        class_names=tuple(read_pickle(folder / archive.meta)[archive.names]),
    )


def _check(path: Path, md5: str) -> None:
    """Against a download that was cut off; the official sums are MD5."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if found != md5:
        raise InputError(
            f"not the official file: its MD5 is {found}",
            where=str(path),
            allowed=f"MD5 {md5}",
            next="delete it and unpack or download the archive again",
        )


def _read(folder: Path, files: tuple[str, ...], labels: str) -> Blocks:
    """Rows of 3 x 32 x 32 bytes, plane after plane, become (n, 32, 32, 3)."""
    tables = [read_pickle(folder / file) for file in files]
    pixels = [table["data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1) for table in tables]
    classes = np.concatenate([np.asarray(table[labels], np.int64) for table in tables])
    return Blocks((len(classes), 32, 32, 3), classes, pixels)
