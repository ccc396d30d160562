"""The 1,797 handwritten digits that come with scikit-learn: 8 x 8 pixels, 10 classes, nothing to download.

The file is read where scikit-learn has it; importing scikit-learn would cost a second and 100 MB.
"""

from __future__ import annotations

import gzip
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedcil.data.dataset import Bytes, Dataset, Labels, Split, digest_of
from fedcil.errors import DataMissing
from fedcil.keys import Key

if TYPE_CHECKING:
    from fedcil.tables import DataSection

CLASSES = 10
TEST_IMAGES = 360  # a fifth, rounded up
GREY_LEVEL = 15  # the file counts ink from 0 to 16; 16 * 15 = 240


def load(section: DataSection, root: Path, show_progress: bool) -> Dataset:  # noqa: ARG001
    """1,437 training and 360 test images, (n, 8, 8, 1); the split is stratified and always the same."""
    images, labels = _read(_file())
    test = _test_rows(labels)
    train = np.setdiff1d(np.arange(len(labels)), test)
    splits = Split(images[train], labels[train]), Split(images[test], labels[test])
    scaled = splits[0].images / 255
    return Dataset(
        name="digits",
        train=splits[0],
        test=splits[1],
        mean=(float(scaled.mean()),),
        std=(float(scaled.std()),),
        class_names=tuple(str(digit) for digit in range(CLASSES)),
        digest=digest_of(*splits),
    )


def _file() -> Path:
    spec = find_spec("sklearn")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    paths = [Path(folder) / "datasets" / "data" / "digits.csv.gz" for folder in folders]
    for path in paths:
        if path.is_file():
            return path
    raise DataMissing(
        "the data set 'digits' is part of scikit-learn, which is not installed here",
        where=", ".join(str(path) for path in paths) or "sklearn/datasets/data/digits.csv.gz",
        next="install scikit-learn into this environment",
    )


def _read(path: Path) -> tuple[Bytes, Labels]:
    with gzip.open(path, "rt", encoding="ascii") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.int64)
    images = (table[:, :64] * GREY_LEVEL).astype(np.uint8).reshape(-1, 8, 8, 1)
    return images, table[:, 64].copy()


def _test_rows(labels: Labels) -> Labels:
    """A fifth of each class; the classes with the largest remainders make the total exact."""
    counts = np.bincount(labels, minlength=CLASSES)
    quota = counts * TEST_IMAGES / len(labels)
    taken = np.floor(quota).astype(np.int64)
    taken[np.argsort(taken - quota, kind="stable")[: TEST_IMAGES - taken.sum()]] += 1
    drawn = [_draw(np.flatnonzero(labels == label), label, taken[label]) for label in range(CLASSES)]
    return np.sort(np.concatenate(drawn))


def _draw(rows: Labels, label: int, count: int) -> Labels:
    return Key(0).at("digits", "test", label).numpy().permutation(rows)[:count]
