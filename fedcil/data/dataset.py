"""What a data set is: uint8 images and int64 labels of two splits, and how pixel values are scaled."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Labels = NDArray[np.int64]
Shape = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class Split:
    """Images and their classes, row by row. A part of a set keeps hold of all its images and says which are its own."""

    stored: Bytes  # (all, height, width, channels), C-contiguous; may be memory-mapped
    labels: Labels  # (n,), 0 .. classes - 1
    rows: Labels | None = None  # (n,), of ``stored``; None: all of them

    @property
    def images(self) -> Bytes:
        """(n, height, width, channels); a copy if the split is a part."""
        return self.stored if self.rows is None else self.stored[self.rows]

    @property
    def nbytes(self) -> int:
        """Of its own images."""
        return len(self.labels) * int(self.stored[:1].nbytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """A training and a test split with one numbering of classes.

    ``mean`` and ``std`` are per channel, of pixel values scaled to [0, 1].
    """

    name: str
    train: Split
    test: Split
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: tuple[str, ...]
    digest: str  # of the arrays as used: equal digests, equal data
    notes: tuple[str, ...] = ()  # what a person should know, for instance classes with too few images


def new_hasher() -> blake2b:
    """The hash behind every digest of data."""
    return blake2b(digest_size=16)


def digest_of(train: Split, test: Split) -> str:
    """Digest of images, labels and shapes of both splits. Reads every byte: about 1 s per GB."""
    hasher = new_hasher()
    for split in (train, test):
        hash_split(hasher, split.images.shape, [split.images], split.labels)
    return hasher.hexdigest()


def hash_split(hasher: blake2b, shape: tuple[int, ...], blocks: Iterable[Bytes], labels: Labels) -> None:
    """Add one split to ``hasher``; how its images are cut into ``blocks`` makes no difference."""
    hasher.update(repr(tuple(int(side) for side in shape)).encode())
    for block in blocks:
        hasher.update(np.ascontiguousarray(block).data)
    hasher.update(np.ascontiguousarray(labels, dtype="<i8").data)
