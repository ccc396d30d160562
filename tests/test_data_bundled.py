"""Data sets that come with the program: the digits of scikit-learn, and the synthetic one."""

from __future__ import annotations

import builtins
import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_files import assert_same, assert_well_formed, load

from fedcil.data import LOADERS, ROOTLESS, digits, load_dataset
from fedcil.errors import DataMissing
from fedcil.tables import DATASETS, DataSection

pytestmark = pytest.mark.usefixtures("array_cache")


def test_every_name_of_a_scenario_has_a_loader() -> None:
    assert tuple(LOADERS) == DATASETS


def test_digits() -> None:
    data = load(name="digits")
    assert_well_formed(data)
    assert data.train.images.shape == (1437, 8, 8, 1)
    assert data.test.images.shape == (360, 8, 8, 1)
    assert data.train.images.max() == 240
    assert data.mean[0] == pytest.approx(data.train.images.mean() / 255)
    share = np.bincount(data.test.labels) / (np.bincount(data.test.labels) + np.bincount(data.train.labels))
    assert np.abs(share - 0.2).max() < 0.005


def test_digits_are_all_of_the_bundled_ones() -> None:
    """Counts by class as scikit-learn's documentation of the set has them."""
    data = load(name="digits")
    counts = np.bincount(np.concatenate([data.train.labels, data.test.labels]))
    assert counts.tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_digits_do_not_import_scikit_learn_or_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    imported: list[str] = []
    real_import = builtins.__import__

    def watched(name: str, *rest: Any, **named: Any) -> Any:
        imported.append(name.partition(".")[0])
        return real_import(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", watched)
    load_dataset(DataSection(), 0)
    importlib.reload(digits)
    assert "numpy" in imported
    assert not {"sklearn", "torchvision"} & set(imported)


def test_digits_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedcil.data.digits.find_spec", lambda name: None)
    with pytest.raises(DataMissing, match="scikit-learn"):
        load(name="digits")


def test_synthetic_defaults_and_options() -> None:
    data = load(name="synthetic")
    assert_well_formed(data)
    assert data.train.images.shape == (1000, 8, 8, 1)
    assert data.test.images.shape == (200, 8, 8, 1)
    small = load(name="synthetic", classes=3, samples_per_class=7, test_per_class=2, image_size=12)
    assert small.train.images.shape == (21, 12, 12, 1)
    assert np.bincount(small.test.labels).tolist() == [2, 2, 2]
    assert_same(data, load(seed=9, name="synthetic"))


def test_synthetic_is_drawn_in_pieces_to_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = load(name="synthetic")
    monkeypatch.setattr("fedcil.data.synthetic.PIECE", 7)
    assert_same(whole, load(name="synthetic"))


def test_synthetic_separation_is_the_distance_of_centres_in_deviations() -> None:
    """With 3,000 images a mean is off by 1 / sqrt(3000) of a deviation per pixel; 64 pixels make 0.15."""
    data = load(name="synthetic", classes=4, samples_per_class=3000, separation=3.0)
    means = [data.train.images[data.train.labels == label].mean(0) / 32 for label in range(4)]
    for one in range(4):
        for other in range(one):
            assert np.linalg.norm(means[one] - means[other]) == pytest.approx(3.0, abs=0.3)


def test_synthetic_with_more_classes_than_pixels_and_a_hold_out() -> None:
    data = load(name="synthetic", classes=30, image_size=5, samples_per_class=10, validation=0.2)
    assert np.bincount(data.train.labels).tolist() == [8] * 30
    assert np.bincount(data.test.labels).tolist() == [2] * 30


@pytest.mark.usefixtures("no_home")
@pytest.mark.parametrize("name", ROOTLESS)
def test_who_has_no_home_needs_no_data_root(name: str) -> None:
    assert len(load(name=name).train.labels) == len(load(name=name, root=Path("/nowhere")).train.labels)
