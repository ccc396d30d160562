"""A data set of a person's own: how it is found, what it must be."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_files import assert_same, assert_well_formed, load

from fedcil.data import Dataset, Split, digest_of
from fedcil.errors import ScenarioError
from fedcil.tables import DataSection

pytestmark = pytest.mark.usefixtures("array_cache")


def own_set(**changes: Any) -> Dataset:
    split = Split(np.arange(6 * 16, dtype=np.uint8).reshape(6, 4, 4, 1), np.array([0, 1, 2] * 2, np.int64))
    fields: dict[str, Any] = {
        "name": "own",
        "train": split,
        "test": split,
        "mean": (0.5,),
        "std": (0.5,),
        "class_names": ("a", "b", "c"),
        "digest": digest_of(split, split),
    }
    return Dataset(**{**fields, **changes})


def part(rows: Any) -> Split:
    """Two images of the six."""
    return Split(own_set().train.stored, np.array([0, 1], np.int64), rows)


GIVEN: object = None


def given(section: DataSection, root: Path) -> object:
    return GIVEN


@pytest.fixture
def give(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make this module importable under its name, and let ``given`` return a value."""
    monkeypatch.setitem(sys.modules, "own_data_set", sys.modules[__name__])

    def set_given(value: object, **options: Any) -> Dataset:
        monkeypatch.setattr(sys.modules["own_data_set"], "GIVEN", value)
        return load(name="own_data_set:given", **options)

    return set_given


def test_own_set(give: Any) -> None:
    assert_same(give(own_set()), own_set())
    assert give(own_set(digest="")).digest == own_set().digest


def test_nothing_chosen_copies_nothing(give: Any) -> None:
    data = own_set()
    full = give(data, classes=3)
    assert full.train.images is data.train.images
    assert full.digest == data.digest
    assert give(data, classes=2).digest != data.digest


def test_the_example_of_the_documentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = Path(__file__).parent.parent / "docs" / "data.md"
    example = page.read_text(encoding="utf-8").partition("```python\n")[2].partition("```")[0]
    (tmp_path / "mysets.py").write_text(example)
    monkeypatch.syspath_prepend(tmp_path)
    data = load(name="mysets:stripes", samples_per_class=10)
    assert_well_formed(data)
    assert np.bincount(data.train.labels).tolist() == [10, 10]
    assert data.digest


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (7, "it is a int, not a Dataset"),
        (own_set(class_names=("a", "b")), "labels are 0 to 2, but there are 2 class names"),
        (own_set(mean=(0.5, 0.5)), "mean is"),
        (own_set(std=(0.0,)), "not above 0"),
        (own_set(train=Split(np.zeros((6, 4, 4)), np.zeros(6, np.int64))), "train images are float64"),
        (
            own_set(test=Split(np.zeros((2, 4, 4, 1), np.uint8), np.zeros(3, np.int64))),
            "test labels are int64",
        ),
        (own_set(test=Split(np.zeros((2, 5, 4, 1), np.uint8), np.zeros(2, np.int64))), "in train and"),
        (own_set(test=Split(np.zeros((0, 4, 4, 1), np.uint8), np.zeros(0, np.int64))), "test has no images"),
        (own_set(train=None), "train is a NoneType"),
        (own_set(train=part([[1], [1, 2]])), "train rows are list"),
        (own_set(train=part("x")), "train rows are str"),
        (own_set(train=part(np.array([0, 6]))), "train rows are 0 to 6, but there are 6 images"),
        (own_set(train=part(np.array([-1, 0]))), "train rows are -1 to 0"),
        (own_set(train=Split([[1], [1, 2]], np.zeros(2, np.int64))), "train images are list"),
        (own_set(mean=[[1], [1, 2]]), "mean is"),
        (own_set(mean=None), "mean is"),
        (own_set(class_names=None), "class_names is None, not a tuple of texts"),
        (own_set(class_names=(0, 1, 2)), "class_names is"),
        (own_set(class_names="abc"), "class_names is"),
        (own_set(notes=None), "notes is None, not a tuple of texts"),
        (own_set(notes="abc"), "notes is"),
        (own_set(digest=b"abc"), "digest is b'abc', not a text"),
        (own_set(name=None), "name is None"),
    ],
)
def test_own_set_that_does_not_fit(give: Any, value: object, problem: str) -> None:
    with pytest.raises(ScenarioError, match=problem):
        give(value)


def test_all_that_does_not_fit_is_listed(give: Any) -> None:
    with pytest.raises(ScenarioError, match=r"class_names is.*; notes is.*; train rows are.*; std is"):
        give(own_set(class_names=None, notes=7, train=part(np.array([9, 9])), std=(0.5, 0.5)))


def test_own_set_that_is_a_part(give: Any) -> None:
    rows = np.array([4, 1])
    data = give(own_set(train=part(rows), digest=""))
    np.testing.assert_array_equal(data.train.images, own_set().train.images[rows])


@pytest.mark.parametrize("name", ["no_such_module:f", "json:no_such_function", "json:__name__", ":f"])
def test_own_set_that_is_not_there(name: str) -> None:
    with pytest.raises(ScenarioError, match=r"cannot be imported|has no|is not a function"):
        load(name=name)
