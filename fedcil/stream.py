"""The class stream: which classes arrive with which task.

Classes are renumbered in the order in which they appear, so task t owns the labels [old, seen) and a head
row is a label. ``order`` maps a label back to the data set's own class number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedcil.errors import ScenarioError

if TYPE_CHECKING:
    from fedcil.keys import Key
    from fedcil.tables import StreamSection


@dataclass(frozen=True, slots=True)
class Task:
    """One step of the stream: new labels are [old, seen); q_t and V_t in the MFCL paper."""

    index: int
    old: int
    seen: int

    @property
    def classes(self) -> range:
        return range(self.old, self.seen)


@dataclass(frozen=True, slots=True)
class Stream:
    """``order[label]`` is the data set's class with that label; ``tasks`` cut the labels in pieces."""

    order: tuple[int, ...]
    tasks: tuple[Task, ...]

    def relabel(self, labels: NDArray[np.int64]) -> NDArray[np.int64]:
        """Data set classes (n,) -> labels of the stream (n,); classes that are not in it become -1."""
        table = np.full(max(int(labels.max(initial=0)), *self.order) + 1, -1, dtype=np.int64)
        table[list(self.order)] = np.arange(len(self.order))
        return table[labels]

    def last(self, task: Task) -> bool:
        return task.index == len(self.tasks) - 1


def make_stream(section: StreamSection, classes: int, key: Key) -> Stream:
    """Cut ``classes`` classes into the tasks of the scenario.

    Raises ScenarioError if the sizes and the number of classes do not fit.
    """
    order = _order(section, classes, key)
    sizes = section.sizes or _equal_tasks(section.tasks, len(order))
    if len(sizes) != section.tasks or sum(sizes) != len(order):
        raise ScenarioError(
            f"stream.sizes = {list(sizes)} does not cut {len(order)} classes into {section.tasks} tasks",
            where="stream.sizes",
            allowed=f"{section.tasks} sizes of at least 1 that sum to {len(order)}",
            next="change stream.sizes, stream.tasks or data.classes",
        )
    ends = np.cumsum(sizes).tolist()
    starts = [0, *ends[:-1]]
    spans = enumerate(zip(starts, ends, strict=True))
    return Stream(order, tuple(Task(index, old, seen) for index, (old, seen) in spans))


def _order(section: StreamSection, classes: int, key: Key) -> tuple[int, ...]:
    if section.class_order == "natural":
        return tuple(range(classes))
    if section.class_order == "seeded":
        return tuple(key.at("class order").numpy().permutation(classes).tolist())
    order = tuple(section.class_order)
    if sorted(order) != list(range(classes)):
        raise ScenarioError(
            f"stream.class_order does not list each of the {classes} classes of the data once",
            where="stream.class_order",
            allowed=f"natural, seeded, or each of 0..{classes - 1} exactly once",
            next="list every class once, or set data.classes to the number of classes wanted",
        )
    return order


def _equal_tasks(tasks: int, classes: int) -> tuple[int, ...]:
    if classes % tasks:
        divisors = [n for n in range(1, classes + 1) if classes % n == 0]
        raise ScenarioError(
            f"{classes} classes cannot be cut into {tasks} equal tasks",
            where="stream.tasks",
            allowed=f"one of {divisors}, or a list in stream.sizes",
            next="change stream.tasks or data.classes, or list stream.sizes",
        )
    return (classes // tasks,) * tasks
