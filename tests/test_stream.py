"""The class stream: orders, sizes and labels."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcil.errors import ScenarioError
from fedcil.keys import Key
from fedcil.stream import Stream, Task, make_stream
from fedcil.tables import StreamSection

KEY = Key(0)


def test_natural_order_in_equal_tasks() -> None:
    """10 classes in 5 tasks: [0, 2), [2, 4), ..."""
    stream = make_stream(StreamSection(tasks=5), 10, KEY)
    assert stream.order == tuple(range(10))
    assert stream.tasks == tuple(Task(index, 2 * index, 2 * index + 2) for index in range(5))
    assert list(stream.tasks[1].classes) == [2, 3]
    assert [stream.last(task) for task in stream.tasks] == [False, False, False, False, True]


def test_listed_sizes() -> None:
    """Half of the classes first: 5, then 2, then 3."""
    stream = make_stream(StreamSection(tasks=3, sizes=(5, 2, 3)), 10, KEY)
    assert [(task.old, task.seen) for task in stream.tasks] == [(0, 5), (5, 7), (7, 10)]


def test_a_listed_order_relabels() -> None:
    """Class 2 comes first and gets label 0, class 0 gets 1, class 1 gets 2; class 3 is not in the stream."""
    stream = make_stream(StreamSection(tasks=3, class_order=(2, 0, 1)), 3, KEY)
    assert stream.relabel(np.array([0, 1, 2, 3, 2])).tolist() == [1, 2, 0, -1, 0]
    assert stream.relabel(np.array([], dtype=np.int64)).tolist() == []
    assert stream.relabel(np.array([1])).tolist() == [2]


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(1, 6), min_size=1, max_size=6), seed=st.integers(0, 10**6))
def test_every_stream_has_each_class_once(sizes: list[int], seed: int) -> None:
    """Tasks cut the labels without gap, and ``order`` takes labels back to the data set's classes."""
    section = StreamSection(tasks=len(sizes), class_order="seeded", sizes=tuple(sizes))
    stream = make_stream(section, sum(sizes), Key(seed))
    assert [label for task in stream.tasks for label in task.classes] == list(range(sum(sizes)))
    assert [len(task.classes) for task in stream.tasks] == sizes
    classes = np.arange(sum(sizes))
    assert np.array(stream.order)[stream.relabel(classes)].tolist() == classes.tolist()


def test_the_seeded_order_is_decided_by_the_seed() -> None:
    section = StreamSection(tasks=5, class_order="seeded")
    orders = [make_stream(section, 100, Key(seed)).order for seed in (0, 0, 1)]
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]
    assert orders[0] != tuple(range(100))


def failure(section: StreamSection, classes: int) -> dict[str, str]:
    with pytest.raises(ScenarioError) as caught:
        make_stream(section, classes, KEY)
    return caught.value.as_dict()


def test_tasks_that_do_not_divide_the_classes() -> None:
    """The divisors of 10 are named; so is the way out."""
    error = failure(StreamSection(tasks=3), 10)
    assert error["what"] == "10 classes cannot be cut into 3 equal tasks"
    assert error["where"] == "stream.tasks"
    assert error["allowed"] == "one of [1, 2, 5, 10], or a list in stream.sizes"
    assert "data.classes" in error["next"]


def test_more_tasks_than_classes() -> None:
    assert "2 classes cannot be cut into 5" in failure(StreamSection(tasks=5), 2)["what"]


@pytest.mark.parametrize("sizes", [(5, 4), (5, 5, 5), (10,)])
def test_sizes_that_do_not_fit(sizes: tuple[int, ...]) -> None:
    error = failure(StreamSection(tasks=2, sizes=sizes), 10)
    assert error["what"] == f"stream.sizes = {list(sizes)} does not cut 10 classes into 2 tasks"
    assert error["allowed"] == "2 sizes of at least 1 that sum to 10"


@pytest.mark.parametrize("order", [(0, 1), (0, 1, 1), (0, 1, 3), (-1, 0, 1)])
def test_an_order_that_is_no_permutation(order: tuple[int, ...]) -> None:
    error = failure(StreamSection(tasks=1, class_order=order), 3)
    assert error["where"] == "stream.class_order"
    assert "each of 0..2 exactly once" in error["allowed"]


def test_a_stream_is_a_value() -> None:
    assert Stream((0, 1), (Task(0, 0, 2),)) == make_stream(StreamSection(tasks=1), 2, KEY)
