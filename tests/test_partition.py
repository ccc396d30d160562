"""Sharing a task's samples among clients: invariants of every partitioner, the statistics of MFCL's, and errors."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import ValidationError

from fedcil.errors import InputError, ScenarioError
from fedcil.keys import Key
from fedcil.partition import TaskPartition, load_partition, make_partition, save_partition
from fedcil.partitioners import PARTITIONERS, _draw_until_empty
from fedcil.stream import Stream, Task
from fedcil.tables import PARTITIONS, PartitionSection

Ints = NDArray[np.int64]


def stream_of(*sizes: int) -> Stream:
    ends = np.cumsum(sizes).tolist()
    tasks = tuple(Task(i, end - size, end) for i, (size, end) in enumerate(zip(sizes, ends, strict=True)))
    return Stream(tuple(range(ends[-1])), tasks)


def share(clients: int, labels: Ints, seed: int = 0, **options: Any) -> TaskPartition:
    """One task that has all classes."""
    stream = stream_of(int(labels.max(initial=0)) + 1)
    (part,) = make_partition(PartitionSection(**options), clients, stream, labels, Key(seed))
    return part


def balanced(classes: int, each: int) -> Ints:
    return np.repeat(np.arange(classes), each)


def class_counts(part: TaskPartition, labels: Ints) -> Ints:
    """(clients, classes)"""
    classes = int(labels.max()) + 1
    return np.stack([np.bincount(labels[part.of(c)], minlength=classes) for c in range(len(part.counts()))])


def failure(clients: int, labels: Ints, **options: Any) -> dict[str, str]:
    with pytest.raises(ScenarioError) as caught:
        share(clients, labels, **options)
    return caught.value.as_dict()


# Every partitioner


def test_every_name_of_a_scenario_has_a_partitioner() -> None:
    assert tuple(PARTITIONERS) == PARTITIONS


@st.composite
def cases(draw: st.DrawFn) -> tuple[PartitionSection, int, Stream, Ints]:
    """One to three tasks of unequal classes, each class with 1 to 30 samples; some samples in no task."""
    sizes = draw(st.lists(st.integers(2, 5), min_size=1, max_size=3))
    each = draw(st.lists(st.integers(1, 30), min_size=sum(sizes), max_size=sum(sizes)))
    labels = np.concatenate([np.repeat(np.arange(sum(sizes)), each), np.full(draw(st.integers(0, 9)), -1)])
    section = PartitionSection(
        name=draw(st.sampled_from(PARTITIONS)),
        alpha=draw(st.sampled_from([0.01, 0.3, 1.0, 100.0])),
        remainder="spread",
        shards_per_client=draw(st.integers(1, 2)),  # the smallest task has two samples
        classes_per_client=2,
        sigma=draw(st.sampled_from([0.1, 2.0])),
        allow_empty=True,
    )
    shuffled = np.random.default_rng(draw(st.integers(0, 99))).permutation(labels)
    return section, draw(st.integers(3, 12)), stream_of(*sizes), shuffled


@settings(max_examples=150, deadline=None)
@given(case=cases(), seed=st.integers(0, 10**6))
def test_each_sample_of_a_task_goes_to_exactly_one_client(
    case: tuple[PartitionSection, int, Stream, Ints], seed: int
) -> None:
    section, clients, stream, labels = case
    parts = make_partition(section, clients, stream, labels, Key(seed))
    again = make_partition(section, clients, stream, labels, Key(seed))
    assert len(parts) == len(stream.tasks)
    for task, part, same in zip(stream.tasks, parts, again, strict=True):
        members = np.flatnonzero((labels >= task.old) & (labels < task.seen))
        assert sorted(part.indices.tolist()) == members.tolist()
        assert part.counts().sum() == len(members)
        assert np.concatenate([part.of(c) for c in range(clients)]).tolist() == part.indices.tolist()
        assert part.indices.tolist() == same.indices.tolist()
        assert part.offsets.tolist() == same.offsets.tolist()


@settings(max_examples=60, deadline=None)
@given(case=cases(), seed=st.integers(0, 10**6))
def test_nobody_is_without_samples_unless_that_is_allowed(
    case: tuple[PartitionSection, int, Stream, Ints], seed: int
) -> None:
    """Either every client has a sample, or the error says how to go on."""
    section, clients, stream, labels = case
    strict = section.model_copy(update={"allow_empty": False})
    try:
        parts = make_partition(strict, clients, stream, labels, Key(seed))
    except ScenarioError as error:
        problem = error.as_dict()
    else:
        assert min(part.counts().min() for part in parts) >= 1
        return
    assert problem["what"].startswith("task ")
    assert "allow_empty" in problem["allowed"]


@pytest.mark.parametrize("name", PARTITIONS)
def test_seeds_and_tasks_draw_afresh(name: str) -> None:
    """Two tasks with the same number of samples, and two seeds: four different draws."""
    labels = balanced(10, 40)
    section = PartitionSection(name=name)
    draws = [make_partition(section, 10, stream_of(5, 5), labels, Key(seed)) for seed in (0, 1)]
    shares = {tuple(part.indices - part.indices.min()) for parts in draws for part in parts}
    assert len(shares) == 4


@pytest.mark.parametrize("name", PARTITIONS)
def test_a_task_does_not_depend_on_the_tasks_before_it(name: str) -> None:
    labels = balanced(10, 40)
    section = PartitionSection(name=name)
    second = make_partition(section, 10, stream_of(5, 5), labels, Key(0))[1]
    without_first = np.where(labels < 5, -1, labels)
    only = Stream(tuple(range(10)), (Task(1, 5, 10),))
    (alone,) = make_partition(section, 10, only, without_first, Key(0))
    assert alone.indices.tolist() == second.indices.tolist()


@pytest.mark.parametrize("name", PARTITIONS)
def test_one_client_gets_everything(name: str) -> None:
    part = share(1, balanced(2, 7), name=name)
    assert sorted(part.of(0).tolist()) == list(range(14))


def test_no_global_generator_is_touched() -> None:
    before = np.random.get_state()[1].tolist()  # type: ignore[index]
    for name in PARTITIONS:
        share(5, balanced(5, 20), name=name)
    assert np.random.get_state()[1].tolist() == before  # type: ignore[index]


@pytest.mark.parametrize("name", PARTITIONS)
def test_ten_thousand_clients_take_seconds(name: str) -> None:
    """10,000 clients with 50 samples each; measured below half a second."""
    start = time.perf_counter()
    part = share(10_000, balanced(10, 50_000), name=name)
    assert len(part.counts()) == 10_000
    assert time.perf_counter() - start < 5


# dirichlet_equal


def label_statistics(alpha: float) -> tuple[float, float, float]:
    """Mean over 10 seeds x 50 clients: entropy / ln 10, classes, largest share; 10 classes x 500 images."""
    labels = balanced(10, 500)
    counts = np.concatenate([class_counts(share(50, labels, seed, alpha=alpha), labels) for seed in range(10)])
    shares = counts / 100
    entropy = -(shares * np.log(np.where(shares > 0, shares, 1))).sum(axis=1) / np.log(10)
    return entropy.mean(), (shares > 0).sum(axis=1).mean(), shares.max(axis=1).mean()


@pytest.mark.parametrize(
    ("alpha", "entropy", "classes", "largest"),
    [
        (0.1, 0.356, 4.04, 0.669),
        (0.5, 0.671, 7.43, 0.410),
        (1.0, 0.789, 8.77, 0.320),
        (10.0, 0.945, 9.73, 0.185),
        (100.0, 0.967, 9.83, 0.162),
    ],
)
def test_mixes_are_those_of_the_authors_code(alpha: float, entropy: float, classes: float, largest: float) -> None:
    """Values measured with the MFCL authors' draw, one sample after another.

    One of our draws deviates by at most 0.024 / 0.25 / 0.029, the mean of ten by a third of that. A plain
    Dirichlet(100) for each client would have the entropy 0.99: running out of classes is part of it.
    """
    ours = label_statistics(alpha)
    assert ours[0] == pytest.approx(entropy, abs=0.025)
    assert ours[1] == pytest.approx(classes, abs=0.3)
    assert ours[2] == pytest.approx(largest, abs=0.025)


def test_a_class_that_ran_empty_is_drawn_no_more() -> None:
    """One A and three B, two clients with two samples each, equal chances (alpha huge).

    Client 0 has A if its first draw is A (1/2; the second must then be B) or if BA is drawn (1/4): 3/4.
    Drawing samples instead of classes would give it A in 1/2 of all cases. 600 draws deviate by 0.018.
    """
    labels = np.array([0, 1, 1, 1])
    has_a = [0 in share(2, labels, seed, alpha=1e6).of(0) for seed in range(600)]
    assert np.mean(has_a) == pytest.approx(0.75, abs=0.055)


def test_samples_of_a_class_are_drawn_at_random() -> None:
    """One class, two clients: each sample is with client 0 in half of the draws (400: deviation 0.025)."""
    owned = np.zeros(6)
    for seed in range(400):
        owned[share(2, np.zeros(6, dtype=np.int64), seed).of(0)] += 1
    assert owned / 400 == pytest.approx(np.full(6, 0.5), abs=0.1)


def test_late_clients_take_what_is_left() -> None:
    """At alpha = 10 the last client finds few classes: its largest share is 1.5 times that of the first."""
    labels = balanced(10, 500)
    largest = np.mean(
        [class_counts(share(50, labels, seed, alpha=10.0), labels).max(axis=1) for seed in range(5)], axis=0
    )
    assert largest[-1] > 1.5 * largest[:10].mean()


@pytest.mark.parametrize("many", [13, 2**62])
def test_more_shards_for_each_than_there_are_samples(many: int) -> None:
    error = failure(3, balanced(2, 6), name="shards", shards_per_client=many)
    assert (error["where"], error["allowed"]) == ("partition.shards_per_client", "1 to 12")


@settings(max_examples=40, deadline=None)
@given(clients=st.integers(1, 9), each=st.integers(1, 20), classes=st.integers(1, 6))
def test_equal_sizes_or_a_refusal(clients: int, each: int, classes: int) -> None:
    """N / P samples for each client if P divides N; otherwise an error, or one more for the first N mod P."""
    labels = balanced(classes, each)
    size, rest = divmod(len(labels), clients)
    if size == 0:
        assert "cannot share" in failure(clients, labels)["what"]
        return
    if rest:
        assert "cannot be shared equally" in failure(clients, labels)["what"]
    spread = share(clients, labels, remainder="spread").counts().tolist()
    assert spread == [size + 1] * rest + [size] * (clients - rest)


def test_the_refusal_says_what_would_do() -> None:
    """100 = 2 * 2 * 5 * 5: around 30 the divisors are 25 and 50; 100 mod 30 = 10."""
    error = failure(30, balanced(10, 10))
    assert error["what"] == "task 1: 100 samples cannot be shared equally among 30 clients"
    assert error["where"] == "partition.remainder"
    assert "clients.count that divides 100 (nearest: 25 or 50)" in error["allowed"]
    assert 'partition.remainder = "spread"' in error["allowed"]
    assert 'partition.remainder = "spread": 10 clients get one sample more' in error["next"]


# dirichlet


def test_dirichlet_cuts_each_class_by_its_own_draw() -> None:
    """Two clients, alpha = 1: a class's share is uniform on [0, 1]: mean 1/2, deviation 1/sqrt(12) = 0.289.

    500 draws: the mean deviates by 0.013. The two classes are independent: correlation 0 +- 0.045.
    """
    labels = balanced(2, 1000)
    shares = np.array([class_counts(share(2, labels, seed, name="dirichlet"), labels)[0] / 1000 for seed in range(500)])
    assert shares.mean() == pytest.approx(0.5, abs=0.04)
    assert shares.std() == pytest.approx(0.289, abs=0.03)
    assert abs(np.corrcoef(shares.T)[0, 1]) < 0.15


def test_dirichlet_with_a_huge_alpha_is_even() -> None:
    """Share deviation of alpha = 1e6 and 4 clients is 2e-4: 250 +- 2 of 1000."""
    labels = balanced(3, 1000)
    counts = class_counts(share(4, labels, name="dirichlet", alpha=1e6), labels)
    assert np.abs(counts - 250).max() <= 3


@pytest.mark.parametrize("name", ["dirichlet", "dirichlet_equal"])
def test_the_largest_alpha_is_even_for_many_clients(name: str) -> None:
    """100 clients, 10 samples of each of 10 classes for everyone; beyond, sums of alphas are no numbers any more."""
    counts = class_counts(share(100, balanced(10, 1_000), name=name, alpha=1e6), balanced(10, 1_000))
    sizes = counts.sum(axis=1)
    assert sizes.min() >= 80
    assert sizes.max() <= 120
    with pytest.raises(ValidationError):
        PartitionSection(name=name, alpha=1e308)


def test_dirichlet_redraws_until_all_have_enough() -> None:
    labels = balanced(5, 100)
    smallest = [share(10, labels, seed, name="dirichlet", min_size=20).counts().min() for seed in range(10)]
    assert min(smallest) >= 20


def test_dirichlet_gives_up_with_advice() -> None:
    """50 samples of 5 classes at alpha = 0.01 are nearly always with 5 clients at most, never with 50."""
    error = failure(50, balanced(5, 10), name="dirichlet", alpha=0.01)
    assert error["what"].startswith("task 1: 1000 draws never gave each of 50 clients at least 1")
    assert error["where"] == "partition.alpha"
    assert "allow_empty = true" in error["next"]
    part = share(50, balanced(5, 10), name="dirichlet", alpha=0.01, allow_empty=True)
    assert part.counts().min() == 0


def test_dirichlet_gives_up_at_once_where_hundreds_go_without() -> None:
    """A thousand draws for 100,000 clients took half a minute."""
    error = failure(2_000, balanced(5, 400), name="dirichlet", alpha=0.1)
    assert error["what"].startswith("task 1: 10 draws never gave each of 2000 clients at least 1")


@pytest.mark.parametrize("name", ["dirichlet", "quantity"])
def test_a_min_size_that_cannot_be(name: str) -> None:
    """10 clients with 11 samples each need 110 of 100."""
    error = failure(10, balanced(5, 20), name=name, min_size=11)
    assert error["where"] == "partition.min_size"
    assert "up to 10" in error["allowed"]


# iid, shards, classes, quantity


def test_iid_sizes_and_mixes() -> None:
    """103 samples among 10: three times 11, seven times 10. 5,000 of each of two classes: about even."""
    assert share(10, np.zeros(103, dtype=np.int64), name="iid").counts().tolist() == [11] * 3 + [10] * 7
    labels = balanced(2, 5000)
    counts = class_counts(share(10, labels, name="iid"), labels)
    assert np.abs(counts - 500).max() < 5 * np.sqrt(250)


def test_shards_hold_few_labels() -> None:
    """10 classes x 20 in 20 shards of 10: a shard has one label, so a client with two has one or two."""
    labels = balanced(10, 20)
    part = share(10, labels, name="shards", shards_per_client=2)
    kinds = (class_counts(part, labels) > 0).sum(axis=1)
    assert part.counts().tolist() == [20] * 10
    assert set(kinds.tolist()) <= {1, 2}
    assert kinds.max() == 2


def test_more_shards_than_samples_leave_somebody_empty() -> None:
    """12 samples in 40 shards for 10 clients: 28 shards are empty; with seed 0 so is somebody."""
    error = failure(10, balanced(2, 6), name="shards", shards_per_client=4)
    assert error["what"].startswith("task 1: client ")
    assert "of 10 would be without samples" in error["what"]
    assert error["where"] == "partition"
    assert "allow_empty" in error["allowed"]
    assert "clients.count" in error["next"]


@settings(max_examples=40, deadline=None)
@given(classes=st.integers(1, 8), each=st.integers(1, 8), clients=st.integers(1, 12), seed=st.integers(0, 999))
def test_each_client_has_its_classes_and_each_class_an_owner(classes: int, each: int, clients: int, seed: int) -> None:
    """24 samples of a class are at least one for each of up to 12 owners, in sizes that differ by one."""
    labels = balanced(classes, 24)
    options = {"name": "classes", "classes_per_client": each}
    if each > classes or clients * each < classes:
        assert failure(clients, labels, **options)["where"] == "partition.classes_per_client"
        return
    counts = class_counts(share(clients, labels, seed, **options), labels)
    assert ((counts > 0).sum(axis=1) == each).all()
    for column in counts.T:
        owned = column[column > 0]
        assert owned.max() - owned.min() <= 1


def test_classes_are_covered_without_luck() -> None:
    """10 clients with 1 of 10 classes each make a permutation: chance 10!/10**10 = 0.0004 for free draws."""
    labels = balanced(10, 4)
    for seed in range(20):
        counts = class_counts(share(10, labels, seed, name="classes", classes_per_client=1), labels)
        assert (counts.sum(axis=0) == 4).all()
        assert (counts.max(axis=1) == 4).all()


def test_the_odd_sample_of_a_class_goes_to_any_owner() -> None:
    """Two clients own a class of three: each has two of them in about half of 40 draws (never: 2**-39)."""
    labels = np.zeros(3, dtype=np.int64)
    sizes = [share(2, labels, seed, name="classes", classes_per_client=1).counts() for seed in range(40)]
    assert {tuple(size) for size in sizes} == {(1, 2), (2, 1)}


def test_classes_that_cannot_be_owned() -> None:
    error = failure(2, balanced(10, 4), name="classes", classes_per_client=3)
    assert "2 clients with 3 classes each cannot own the 10 classes" in error["what"]
    assert error["allowed"] == "5 to 10"


def test_quantity_sizes_are_log_normal() -> None:
    """A thousand clients, a thousand samples each on average: the log sizes deviate by sigma +- 0.011."""
    counts = share(1000, np.zeros(1_000_000, dtype=np.int64), name="quantity", sigma=0.5).counts()
    assert np.log(counts).std() == pytest.approx(0.5, abs=0.05)


def test_quantity_gives_everyone_the_least() -> None:
    """Ten of each class; a few clients have nearly all of the rest at sigma = 5."""
    counts = share(20, balanced(10, 100), name="quantity", sigma=5.0, min_size=10).counts()
    assert counts.min() >= 10
    assert counts.max() > 300


def test_quantity_sizes_that_are_no_numbers() -> None:
    assert failure(5, balanced(2, 50), name="quantity", sigma=1000.0)["where"] == "partition.sigma"
    assert share(5, balanced(2, 50), name="quantity", sigma=100.0).counts().sum() == 100


# Errors and partitioners of one's own


@pytest.mark.parametrize("name", PARTITIONS)
def test_a_task_that_nobody_shares(name: str) -> None:
    stream = stream_of(2, 2)
    with pytest.raises(ScenarioError, match="task 1: nobody gets samples of this task") as caught:
        make_partition(PartitionSection(name=name), 3, stream, balanced(4, 6), Key(0), lambda _: np.arange(0))
    assert caught.value.where == "population"


@pytest.mark.parametrize("name", PARTITIONS)
def test_more_clients_than_samples(name: str) -> None:
    error = failure(11, balanced(2, 5), name=name)
    assert error["what"] == "task 1: 11 clients cannot share 10 samples"
    assert error["allowed"] == "1 to 10 clients, or partition.allow_empty = true"
    part = share(11, balanced(2, 5), name=name, allow_empty=True, remainder="spread")
    assert part.counts().sum() == 10


def test_a_task_without_samples_is_named() -> None:
    with pytest.raises(ScenarioError, match="task 2: no training sample"):
        make_partition(PartitionSection(name="iid"), 2, stream_of(2, 2), balanced(2, 5), Key(0))


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], str]:
    """Make a partitioner importable and give its name for a scenario."""

    def name_of(partitioner: Any) -> str:
        module = ModuleType("own_partitioners")
        module.partitioner = partitioner  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "own_partitioners", module)
        return "own_partitioners:partitioner"

    return name_of


def test_an_own_partitioner_is_used(own: Callable[[Any], str]) -> None:
    """Client c gets label 2 + c; positions count within the task, indices in the training set."""
    seen: list[Any] = []

    def by_label(labels: Ints, clients: int, section: PartitionSection, rng: np.random.Generator) -> list[Ints]:
        seen.append((labels.tolist(), clients, section.alpha, type(rng)))
        return [np.flatnonzero(labels == 2 + c) for c in range(clients)]

    labels = np.array([3, -1, 2, 0, 3, 1])
    section = PartitionSection(name=own(by_label), alpha=7.0)
    only = Stream((0, 1, 2, 3), (Task(1, 2, 4),))
    (part,) = make_partition(section, 2, only, labels, Key(0))
    assert [part.of(c).tolist() for c in range(2)] == [[2], [0, 4]]
    assert seen == [([3, 2, 3], 2, 7.0, np.random.Generator)]


BAD_SHARES = {
    "gives 1 shares for 2 clients": [[0, 1, 2, 3]],
    "gives NoneType for 2 clients": None,
    "gives 1 samples to several clients and 0 samples to none": [[0, 1, 2], [2, 3]],
    "gives 0 samples to several clients and 1 samples to none": [[0, 1], [3]],
    "gives 1 positions outside 0..3": [[0, 1, 2], [3, 4]],
    "gives 2 positions outside 0..3": [[0, 1, 2, 3], [-1, -2]],
    "no flat arrays of whole numbers": [[0.0, 1.0], [2.0, 3.0]],
    "flat arrays of whole numbers": [[True, True, False, False], [False, False, True, True]],
    "flat arrays of": [[[0, 1]], [[2, 3]]],
    "no flat arrays of": [[[0], [1, 2]], [3]],
    "that are no flat": [None, [0, 1, 2, 3]],
}


@pytest.mark.parametrize("what", BAD_SHARES)
def test_an_own_partitioner_that_is_no_partition(own: Callable[[Any], str], what: str) -> None:
    error = failure(2, balanced(2, 2), name=own(lambda *_: BAD_SHARES[what]))
    assert error["what"].startswith("task 1: the partitioner gives")
    assert what in error["what"]
    assert error["where"] == "partition.name"


def test_an_own_partitioner_that_ends_the_program(own: Callable[[Any], str]) -> None:
    name = own(lambda *_: sys.exit("enough"))
    error = failure(2, balanced(2, 2), name=name)
    assert error["what"].startswith(f"task 1: {name} raised SystemExit: enough")
    assert error["where"] == "partition.name"


def test_an_own_partitioner_that_leaves_a_client_empty(own: Callable[[Any], str]) -> None:
    name = own(lambda labels, *_: [np.arange(len(labels)), [], []])
    error = failure(3, balanced(2, 2), name=name)
    assert error["what"] == "task 1: client 1 and 1 more of 3 would be without samples"
    assert share(3, balanced(2, 2), name=name, allow_empty=True).counts().tolist() == [4, 0, 0]


@pytest.mark.parametrize("name", ["no_such_module:partitioner", "fedcil.partition:no_such_partitioner", ":partitioner"])
def test_an_own_partitioner_that_is_not_there(name: str) -> None:
    error = failure(2, balanced(2, 2), name=name)
    assert repr(name) in error["what"]
    assert error["where"] == "partition.name"
    assert "package.module:name" in error["allowed"]


# Files


def test_a_partition_survives_the_file(tmp_path: Path) -> None:
    parts = make_partition(PartitionSection(), 5, stream_of(2, 3), balanced(5, 10), Key(0))
    save_partition(tmp_path / "partition.npz", parts)
    loaded = load_partition(tmp_path / "partition.npz")
    assert len(loaded) == 2
    for part, same in zip(parts, loaded, strict=True):
        assert part.indices.tolist() == same.indices.tolist()
        assert part.offsets.tolist() == same.offsets.tolist()
        assert (same.indices.dtype, same.offsets.dtype) == (np.int32, np.int64)


def test_the_file_has_the_documented_arrays_and_name(tmp_path: Path) -> None:
    save_partition(tmp_path / "partition.tmp", [share(2, balanced(2, 2))])
    assert [path.name for path in tmp_path.iterdir()] == ["partition.tmp"]
    with np.load(tmp_path / "partition.tmp") as arrays:
        assert arrays.files == ["task0_indices", "task0_offsets"]


def test_the_same_partition_is_the_same_file(tmp_path: Path) -> None:
    for name in "ab":
        save_partition(tmp_path / name, [share(2, balanced(2, 2))])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_what_an_older_numpy_added_to_the_file_is_no_task(tmp_path: Path) -> None:
    """Before 2.2 ``savez(allow_pickle=False)`` stored an array of that name, in runs that are still there."""
    write_arrays(tmp_path / "a", task0_indices=np.arange(2), task0_offsets=np.array([0, 2]), more=np.array(0))
    (task,) = load_partition(tmp_path / "a")
    assert task.of(0).tolist() == [0, 1]
    save_partition(tmp_path / "b", [task])
    with np.load(tmp_path / "b") as arrays:
        assert sorted(arrays.files) == ["task0_indices", "task0_offsets"]


def test_half_a_file_is_never_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(file: Any, **arrays: Any) -> None:
        file.write(b"PK")
        raise OSError("no space left")

    monkeypatch.setattr(np, "savez", half)
    with pytest.raises(OSError, match="no space"):
        save_partition(tmp_path / "a", [share(2, balanced(2, 2))])
    assert not list(tmp_path.iterdir())


def write_array(path: Path, array: Ints) -> None:
    with path.open("wb") as file:
        np.save(file, array)


def write_arrays(path: Path, **arrays: Any) -> None:
    with path.open("wb") as file:
        np.savez(file, **arrays)


@pytest.mark.parametrize(
    "make",
    [
        lambda path: None,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"PK\x03\x04 cut off"),
        lambda path: path.write_text("no archive"),
        lambda path: write_array(path, np.arange(3)),
        lambda path: write_arrays(path, other=np.arange(3)),
        lambda path: write_arrays(path, other=np.arange(3), another=np.arange(3)),
        lambda path: write_arrays(path, task0_indices=np.arange(3), task0_offsets=np.array([0, 2])),
        lambda path: write_arrays(path, task0_indices=np.arange(3), task0_offsets=np.array([0, 4, 3])),
        lambda path: write_arrays(path, task0_indices=np.array([{}]), task0_offsets=np.array([0, 1])),
    ],
    ids=["missing", "empty", "cut", "text", "npy", "name", "names", "short", "backwards", "pickle"],
)
def test_a_broken_file_is_refused(tmp_path: Path, make: Callable[[Path], None]) -> None:
    path = tmp_path / "partition.npz"
    make(path)
    with pytest.raises(InputError, match="not a partition") as caught:
        load_partition(path)
    assert caught.value.where == str(path)


def test_no_class_is_drawn_beyond_what_is_left() -> None:
    """Two classes are emptied by the same draws: the first of them ends the draw."""
    left, mix = np.array([2, 2, 50]), np.array([0.4, 0.4, 0.2])
    for seed in range(50):
        drawn = _draw_until_empty(mix, 40, left, np.random.default_rng(seed))
        assert (np.bincount(drawn, minlength=3) <= left).all()
