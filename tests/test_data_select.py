"""The choice of images: classes, a hold-out for validation, samples per class."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from data_files import assert_same, load

from fedcil.data import Split
from fedcil.data.select import select
from fedcil.data.store import StoredSplit
from fedcil.errors import ScenarioError

pytestmark = pytest.mark.usefixtures("array_cache")


def rows(split: Split) -> set[bytes]:
    return {image.tobytes() for image in split.images}


def test_first_classes() -> None:
    data, full = load(name="digits", classes=3), load(name="digits")
    keep = full.train.labels < 3
    np.testing.assert_array_equal(data.train.images, full.train.images[keep])
    assert data.class_names == ("0", "1", "2")
    assert data.test.labels.max() == 2
    assert data.digest != full.digest


def test_classes_without_an_image_can_be_left_out() -> None:
    data = load(name="synthetic", classes=4)
    empty = replace(data, class_names=(*data.class_names, "nobody has seen one"))
    assert select(empty, classes=4, validation=0.0, per_class=None, seed=0).class_names == data.class_names


def test_too_many_classes() -> None:
    with pytest.raises(ScenarioError, match="digits has 10 classes") as error:
        load(name="digits", classes=11)
    assert error.value.allowed == "1 to 10"


def test_validation_is_disjoint_fixed_and_stratified() -> None:
    data, full = load(seed=1, name="digits", validation=0.1), load(name="digits")
    assert_same(data, load(seed=2, name="digits", validation=0.1))
    assert len(data.train.labels) + len(data.test.labels) == len(full.train.labels)
    assert rows(data.train) | rows(data.test) == rows(full.train)
    # digits has a few equal images; apart from those the three sets share nothing.
    assert len(rows(data.train) & rows(data.test)) <= len(full.train.labels) - len(rows(full.train))
    assert not rows(data.test) & rows(full.test)
    expected = [round(0.1 * count) for count in np.bincount(full.train.labels)]
    assert np.bincount(data.test.labels).tolist() == expected


def test_validation_holds_out_the_same_images_for_fewer_classes() -> None:
    few, all_ = load(name="digits", validation=0.1, classes=4), load(name="digits", validation=0.1)
    np.testing.assert_array_equal(few.test.images, all_.test.images[all_.test.labels < 4])


def test_validation_takes_at_least_one_and_never_all() -> None:
    data = load(name="synthetic", samples_per_class=4, validation=0.01)
    assert np.bincount(data.test.labels).tolist() == [1] * 10
    with pytest.raises(ScenarioError, match=r"no training image of class 0 \(blob 0\)"):
        load(name="synthetic", samples_per_class=1, validation=0.5)


def test_samples_per_class_are_drawn_by_the_seed_and_nest() -> None:
    one, other = (load(seed=seed, name="digits", samples_per_class=20) for seed in (1, 2))
    assert np.bincount(one.train.labels).tolist() == [20] * 10
    assert one.digest != other.digest
    assert rows(one.train) != rows(other.train)
    np.testing.assert_array_equal(one.test.images, other.test.images)
    assert_same(one, load(seed=1, name="digits", samples_per_class=20))
    assert rows(load(seed=1, name="digits", samples_per_class=5).train) < rows(one.train)


def test_samples_come_from_what_validation_left() -> None:
    data = load(seed=3, name="digits", samples_per_class=100, validation=0.2)
    held = load(name="digits", validation=0.2)
    np.testing.assert_array_equal(data.test.images, held.test.images)
    assert rows(data.train) <= rows(held.train)


@pytest.mark.parametrize("kind", ["cpu", "meta"])
def test_a_part_of_a_set_is_read_where_the_set_lies(kind: str) -> None:
    """Nothing is copied, so that processes share one memory-mapped file; a GPU gets the part alone."""
    full = load(name="digits")
    part = select(full, classes=4, validation=0.2, per_class=30, seed=5)
    assert np.shares_memory(part.train.stored, full.train.stored)
    assert np.shares_memory(part.test.stored, full.train.stored)
    assert part.train.nbytes == part.train.images.nbytes == 120 * 64
    stored = StoredSplit(part, part.train, part.train.labels, torch.device(kind))
    images = stored.images(torch.tensor([7, 0, 119], device=kind))
    assert images.shape == (3, 8, 8, 1)
    if kind == "cpu":
        np.testing.assert_array_equal(images.numpy(), part.train.images[[7, 0, 119]])


def test_too_many_samples_name_the_class() -> None:
    with pytest.raises(ScenarioError, match=r"class 0 \(0\) of digits has \d+ training images"):
        load(name="digits", samples_per_class=5000)
