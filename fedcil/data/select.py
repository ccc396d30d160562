"""Which images of a full set a run uses: first classes, fixed hold-out, a drawn number per class. None is copied."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fedcil.data.dataset import Dataset, Labels, Split, new_hasher
from fedcil.errors import ScenarioError
from fedcil.keys import Key

Index = Labels  # row numbers, increasing


def select(data: Dataset, *, classes: int | None, validation: float, per_class: int | None, seed: int) -> Dataset:
    """``data`` reduced to what is asked for; where nothing is, as it is.

    1. ``classes``: the first n by the set's own numbering.
    2. ``validation``: that share of each class's training images becomes the test split; the real test
       split is then not used at all. The choice is fixed: it does not depend on ``seed``.
    3. ``per_class``: n of the remaining training images of each class, drawn by ``seed``; a smaller n
       draws a part of what a larger n draws.
    """
    kept = _class_count(data, classes)
    train, test = _of_first(data.train.labels, kept), _of_first(data.test.labels, kept)
    source = data.test
    if validation > 0:
        train, test = _hold_out(data, train, kept, validation)
        source = data.train
    if per_class is not None:
        train = _draw(data, train, kept, per_class, seed)
    chosen = replace(data, train=_take(data.train, train), test=_take(source, test))
    if kept == len(data.class_names) and chosen.train is data.train and chosen.test is data.test:
        return data
    digest = _digest(data.digest, train, test, held_out=validation > 0)
    return replace(chosen, class_names=data.class_names[:kept], digest=digest)


def _class_count(data: Dataset, classes: int | None) -> int:
    available = len(data.class_names)
    if classes is not None and classes > available:
        raise ScenarioError(
            f"data.classes = {classes}, but {data.name} has {available} classes",
            where="data.classes",
            allowed=f"1 to {available}",
        )
    return available if classes is None else classes


def _of_first(labels: Labels, classes: int) -> Index:
    return np.flatnonzero(labels < classes)


def _hold_out(data: Dataset, rows: Index, classes: int, share: float) -> tuple[Index, Index]:
    """Rows to train on and rows to measure on, each increasing."""
    held = [_held_of_class(data, rows, label, share) for label in range(classes)]
    measured = np.sort(np.concatenate(held))
    return np.setdiff1d(rows, measured, assume_unique=True), measured


def _held_of_class(data: Dataset, rows: Index, label: int, share: float) -> Index:
    """At least one image, and never all of them."""
    own = rows[data.train.labels[rows] == label]
    count = max(1, round(share * len(own)))
    if count >= len(own):
        raise ScenarioError(
            f"validation = {share} leaves no training image of {_named(data, label)}, which has {len(own)}",
            where="data.validation",
            allowed="a smaller share; a class needs at least 2 training images",
        )
    return Key(0).at("validation", label).numpy().permutation(own)[:count]


def _draw(data: Dataset, rows: Index, classes: int, count: int, seed: int) -> Index:
    drawn = [_draw_of_class(data, rows, label, count, seed) for label in range(classes)]
    return np.sort(np.concatenate(drawn))


def _draw_of_class(data: Dataset, rows: Index, label: int, count: int, seed: int) -> Index:
    own = rows[data.train.labels[rows] == label]
    if len(own) < count:
        raise ScenarioError(
            f"data.samples_per_class = {count}, but {_named(data, label)} has {len(own)} training images",
            where="data.samples_per_class",
            allowed=f"1 to {len(own)}" if len(own) else "classes that have training images",
        )
    return Key(seed).at("subset", label).numpy().permutation(own)[:count]


def _named(data: Dataset, label: int) -> str:
    return f"class {label} ({data.class_names[label]}) of {data.name}"


def _take(split: Split, rows: Index) -> Split:
    """The rows of a whole split; all of them is the split itself."""
    return split if len(rows) == len(split.labels) else Split(split.stored, split.labels[rows], rows)


def _digest(source: str, train: Index, test: Index, *, held_out: bool) -> str:
    """Names the chosen data without reading any image: the full set's digest and the chosen rows."""
    hasher = new_hasher()
    hasher.update(f"{source} {len(train)} {len(test)} {held_out}".encode())
    for rows in (train, test):
        hasher.update(rows.astype("<i8").data)
    return hasher.hexdigest()
