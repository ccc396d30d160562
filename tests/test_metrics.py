"""The field's metrics on matrices small enough to work out by hand."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcil import metrics
from fedcil.metrics import Matrix

NAN = float("nan")


def matrix(*rows: list[float]) -> Matrix:
    return np.array(rows, dtype=np.float64)


THREE = matrix([0.9, NAN, NAN], [0.6, 0.8, NAN], [0.7, 0.4, 0.6])
IMAGES = [10, 10, 20]


def test_accuracy_after_a_task_pools_the_images() -> None:
    """9/10; (6 + 8)/20 = 0.7; (7 + 4 + 12)/40 = 0.575, where a plain mean over tasks would be 0.567."""
    after = [metrics.accuracy_after(THREE, IMAGES, t) for t in range(3)]
    assert after == pytest.approx([0.9, 0.7, 0.575])


def test_average_and_final_accuracy() -> None:
    """(0.9 + 0.7 + 0.575) / 3 = 0.725, the first task included; the last is 0.575."""
    assert metrics.average_incremental_accuracy(THREE, IMAGES) == pytest.approx(0.725)
    assert metrics.final_accuracy(THREE, IMAGES) == pytest.approx(0.575)


def test_forgetting_by_hand() -> None:
    """Task 0: max(0.9, 0.6) - 0.7 = 0.2; task 1: 0.8 - 0.4 = 0.4; mean 0.3. Authors: (0.2 + 0.4 + 0) / 3."""
    assert metrics.forgetting(THREE) == pytest.approx(0.3)
    assert metrics.forgetting_authors(THREE) == pytest.approx(0.2)


def test_forgetting_counts_from_the_best_not_from_the_first() -> None:
    """Task 0 rises to 0.95 after task 1: (0.25 + 0.4) / 2; the authors still start from 0.9."""
    later_best = THREE.copy()
    later_best[1, 0] = 0.95
    assert metrics.forgetting(later_best) == pytest.approx(0.325)
    assert metrics.forgetting_authors(later_best) == pytest.approx(0.2)


def test_learning_more_of_an_old_task_is_negative_forgetting() -> None:
    """The maximum leaves out the last row: 0.5 - 0.8 = -0.3."""
    assert metrics.forgetting(matrix([0.5, NAN], [0.8, 0.9])) == pytest.approx(-0.3)


def test_backward_transfer_and_learning_accuracy() -> None:
    """((0.7 - 0.9) + (0.4 - 0.8)) / 2 = -0.3; (0.9 + 0.8 + 0.6) / 3."""
    assert metrics.backward_transfer(THREE) == pytest.approx(-0.3)
    assert metrics.learning_accuracy(THREE) == pytest.approx(2.3 / 3)


@settings(max_examples=50, deadline=None)
@given(tasks=st.integers(2, 6), seed=st.integers(0, 10**6))
def test_relations_between_the_formulas(tasks: int, seed: int) -> None:
    """BWT is minus the mean drop from the diagonal, which is the authors' sum over T - 1 instead of T tasks.

    Chaudhry's starts from a maximum over the diagonal entry as well, so it is never below; equal if each task
    is best right after it was learned.
    """
    a = np.tril(np.random.default_rng(seed).random((tasks, tasks)))
    diagonal = metrics.forgetting_authors(a) * tasks / (tasks - 1)
    assert metrics.backward_transfer(a) == pytest.approx(-diagonal)
    assert metrics.forgetting(a) >= diagonal - 1e-12
    best_at_first = np.minimum(a, np.diag(a))
    expected = (tasks - 1) / tasks * metrics.forgetting(best_at_first)
    assert metrics.forgetting_authors(best_at_first) == pytest.approx(expected)
    assert metrics.forgetting(best_at_first) >= 0


def test_one_task() -> None:
    """Nothing old to forget: None where a mean over old tasks would be empty, the accuracy elsewhere."""
    one, trace = matrix([0.6]), matrix([0.4], [0.6])
    assert metrics.forgetting(one) is None
    assert metrics.backward_transfer(one) is None
    assert metrics.min_accuracy(trace, [1]) is None
    assert metrics.worst_case_accuracy(trace, [1]) is None
    assert metrics.forgetting_authors(one) == 0.0
    assert metrics.average_incremental_accuracy(one, [5]) == metrics.final_accuracy(one, [5]) == 0.6
    assert metrics.learning_accuracy(one) == 0.6


def test_the_stability_gap_example() -> None:
    """Task 1 goes 0.9 (its end) -> 0.2 -> 0.8, task 2 ends at 0.7 (arXiv 2205.13452).

    min-ACC 0.2, WC-ACC 0.7 / 2 + 0.2 / 2 = 0.45; the matrix sees 0.9 -> 0.8 only: F_2 = 0.1.
    """
    trace, ends = matrix([0.9, NAN], [0.2, 0.5], [0.8, 0.7]), [0, 2]
    assert metrics.min_accuracy(trace, ends) == pytest.approx(0.2)
    assert metrics.worst_case_accuracy(trace, ends) == pytest.approx(0.45)
    assert metrics.forgetting(trace[ends]) == pytest.approx(0.1)


def test_the_worst_accuracy_counts_only_after_a_task_was_learned() -> None:
    """Task 0 ends at row 1 (its 0.1 before does not count): worst 0.3; task 1 ends at row 3: worst 0.5.

    min-ACC (0.3 + 0.5) / 2 = 0.4; WC-ACC 0.6 / 3 + 0.4 * 2 / 3 = 1.4 / 3.
    """
    trace = matrix([0.1, NAN, NAN], [0.9, NAN, NAN], [0.3, 0.2, NAN], [0.6, 0.8, NAN], [0.4, 0.5, 0.3], [0.5, 0.7, 0.6])
    assert metrics.min_accuracy(trace, [1, 3, 5]) == pytest.approx(0.4)
    assert metrics.worst_case_accuracy(trace, [1, 3, 5]) == pytest.approx(1.4 / 3)


def test_a_task_that_only_rises_after_its_end() -> None:
    """Its end itself (0.2) is not "after it was learned": the worst of 0.5 and 0.6 is 0.5."""
    assert metrics.min_accuracy(matrix([0.2, NAN], [0.5, 0.1], [0.6, 0.7]), [0, 2]) == pytest.approx(0.5)


def test_windowed_forgetting_and_plasticity() -> None:
    """Task 0: 0.9, 0.6, 0.3, 0.7; task 1, after two evaluations without it: 0.2, 0.8.

    Two in a row: drops 0.3 and 0, rises 0.4 and 0.6. Three: drops 0.6 and 0, rises as before. One alone: nothing.
    """
    trace = matrix([0.9, NAN], [0.6, NAN], [0.3, 0.2], [0.7, 0.8])
    assert metrics.windowed_forgetting(trace, 1) == metrics.windowed_plasticity(trace, 1) == 0.0
    assert metrics.windowed_forgetting(trace, 2) == pytest.approx(0.15)
    assert metrics.windowed_forgetting(trace, 3) == pytest.approx(0.3)
    assert metrics.windowed_plasticity(trace, 2) == pytest.approx(0.5)
    assert metrics.windowed_plasticity(trace, 3) == pytest.approx(0.5)


@settings(deadline=None)
@given(series=st.lists(st.floats(0, 1), min_size=1, max_size=30), window=st.integers(1, 12))
def test_windowed_metrics_look_at_every_window(series: list[float], window: int) -> None:
    """By the definition: all pairs of evaluations, the earlier one first, of which one window holds both."""
    windows = [series[start : start + window] for start in range(len(series))]
    pairs = [pair for part in windows for pair in combinations(part, 2)]
    trace = matrix(*([value] for value in series))
    assert metrics.windowed_forgetting(trace, window) == max([0.0, *(first - later for first, later in pairs)])
    assert metrics.windowed_plasticity(trace, window) == max([0.0, *(later - first for first, later in pairs)])


def test_a_steady_accuracy_has_no_window() -> None:
    trace = matrix([0.5, NAN], [0.5, NAN], [0.5, 0.5])
    assert metrics.windowed_forgetting(trace, 10) == metrics.windowed_plasticity(trace, 10) == 0.0


def test_the_last_evaluation_counts_for_the_worst() -> None:
    assert metrics.min_accuracy(matrix([0.9, NAN], [0.5, 0.8], [0.2, 0.7]), [0, 2]) == pytest.approx(0.2)
