"""What the tests of data sets share: a set by its keys, and what every set must be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fedcil.data import Dataset, load_dataset
from fedcil.tables import DataSection


def load(seed: int = 0, root: Path | None = None, **options: Any) -> Dataset:
    return load_dataset(DataSection(**options), seed, root=root)


def assert_same(one: Dataset, other: Dataset) -> None:
    assert one.digest == other.digest
    for split, twin in ((one.train, other.train), (one.test, other.test)):
        np.testing.assert_array_equal(split.images, twin.images)
        np.testing.assert_array_equal(split.labels, twin.labels)


def assert_well_formed(data: Dataset) -> None:
    for split in (data.train, data.test):
        assert split.images.dtype == np.uint8
        assert split.images.ndim == 4
        assert split.images.flags.c_contiguous
        assert split.images.flags.writeable  # torch.from_numpy would warn
        assert split.labels.dtype == np.int64
        assert split.labels.shape == split.images.shape[:1]
        assert set(np.unique(split.labels)) <= set(range(len(data.class_names)))
    assert len(data.mean) == len(data.std) == data.train.images.shape[3]
