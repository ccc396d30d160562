"""A person's own data set: ``package.module:function``, called as ``function(section, root)``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedcil.data.dataset import Dataset, Split, digest_of
from fedcil.dotted import load_dotted, own_code
from fedcil.errors import ScenarioError

if TYPE_CHECKING:
    from fedcil.tables import DataSection


def load_own(section: DataSection, root: Path) -> Dataset:
    """What the function gives, checked. An empty ``digest`` is filled in.

    Raises ScenarioError that lists everything that is wrong.
    """
    function = _find(section.name)
    with own_code(section.name, "data.name", next="mend it; docs/data.md has an example"):
        given = function(section, root)
    problems = list(_problems(given))
    if problems:
        raise ScenarioError(
            f"{section.name} did not give a usable data set: " + "; ".join(problems),
            where="data.name",
            allowed="a fedcil.data.Dataset: uint8 images (n, height, width, channels), int64 labels (n,)",
            next="docs/data.md has an example",
        )
    train, test = _contiguous(given.train), _contiguous(given.test)
    digest = given.digest or digest_of(train, test)
    own: Dataset = replace(given, train=train, test=test, digest=digest)
    return own


def _find(target: str) -> Callable[..., Any]:
    found = load_dotted(target, "data.name")
    if not callable(found):
        raise ScenarioError(f"{target!r} is not a function", where="data.name", allowed="package.module:function")
    function: Callable[..., Any] = found
    return function


def _problems(given: object) -> Iterator[str]:
    if not isinstance(given, Dataset):
        yield f"it is a {type(given).__name__}, not a Dataset"
        return
    yield from _text_problems(given)
    classes = len(given.class_names) if _are_texts(given.class_names) else None
    for name, split in (("train", given.train), ("test", given.test)):
        yield from _split_problems(name, split, classes)
    shapes = [_sides(split) for split in (given.train, given.test)]
    if shapes[0] != shapes[1]:
        yield f"images are {shapes[0]} in train and {shapes[1]} in test"
    channels = shapes[0][-1] if shapes[0] else 0
    yield from _scale_problems(given, channels)


def _text_problems(given: Dataset) -> Iterator[str]:
    for name in ("name", "digest"):
        value = getattr(given, name)
        if not isinstance(value, str):
            yield f"{name} is {value!r:.100}, not a text"
    for name in ("class_names", "notes"):
        value = getattr(given, name)
        if not _are_texts(value):
            yield f"{name} is {value!r:.100}, not a tuple of texts"


def _are_texts(value: object) -> bool:
    return isinstance(value, tuple | list) and all(isinstance(each, str) for each in value)


def _sides(split: object) -> tuple[int, ...]:
    """(height, width, channels) of its images, as far as it has any."""
    stored = getattr(split, "stored", None)
    return stored.shape[1:] if isinstance(stored, np.ndarray) else ()


def _split_problems(name: str, split: object, classes: int | None) -> Iterator[str]:
    """``classes``: how many names there are, where that is known."""
    if not isinstance(split, Split):
        yield f"{name} is a {type(split).__name__}, not a Split"
        return
    stored, rows, labels = split.stored, split.rows, split.labels
    if not (isinstance(stored, np.ndarray) and stored.dtype == np.uint8 and stored.ndim == 4):
        yield f"{name} images are {_described(stored)}, not uint8 (n, height, width, channels)"
        return
    if rows is not None:
        if not (isinstance(rows, np.ndarray) and rows.dtype.kind in "iu" and rows.ndim == 1):
            yield f"{name} rows are {_described(rows)}, not whole numbers (n,)"
            return
        if rows.size and (rows.min() < 0 or rows.max() >= len(stored)):
            yield f"{name} rows are {rows.min()} to {rows.max()}, but there are {len(stored)} images"
            return
    count = len(stored if rows is None else rows)
    if not (isinstance(labels, np.ndarray) and labels.dtype == np.int64 and labels.shape == (count,)):
        yield f"{name} labels are {_described(labels)}, not int64 ({count},)"
    elif not (count and stored.size):
        yield f"{name} has no images"
    elif classes is not None and (labels.min() < 0 or labels.max() >= classes):
        yield f"{name} labels are {labels.min()} to {labels.max()}, but there are {classes} class names"


def _scale_problems(given: Dataset, channels: int) -> Iterator[str]:
    for name, values in (("mean", given.mean), ("std", given.std)):
        numbers = _numbers(values)
        if numbers.shape != (channels,) or numbers.dtype.kind not in "iuf" or not np.isfinite(numbers).all():
            yield f"{name} is {values!r:.100}, not {channels} finite numbers"
        elif name == "std" and (numbers <= 0).any():
            yield f"std is {values}, not above 0"


def _numbers(values: object) -> NDArray[Any]:
    try:
        return np.asarray(values)
    except (TypeError, ValueError):  # rows of several lengths
        return np.asarray(None)


def _described(value: object) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {value.shape}"
    return type(value).__name__


def _contiguous(split: Split) -> Split:
    return Split(np.ascontiguousarray(split.images), np.ascontiguousarray(split.labels))
