"""The field's metrics, all derived from two records: the accuracy matrix and the per-round trace.

Notation (Chaudhry et al., arXiv 1801.10112): ``a[t][j]`` is the accuracy on the test images of task j after
task t, with every class seen so far as a candidate; tasks count from 0 here; entries with j > t are NaN.
``n[j]`` are the test images of task j. Accuracies are fractions in [0, 1] everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


def pooled_accuracy(accuracies: Sequence[float] | NDArray[np.float64], n: Sequence[int]) -> float:
    """Accuracy on the test images of several tasks together: the mean of theirs, weighted by their images."""
    return float(np.average(accuracies, weights=n))


def accuracy_after(a: Matrix, n: Sequence[int], t: int) -> float:
    """A_t: accuracy on the pooled test images of all classes seen after task t."""
    return pooled_accuracy(a[t, : t + 1], n[: t + 1])


def average_incremental_accuracy(a: Matrix, n: Sequence[int]) -> float:
    """Mean of A_t over all tasks, the first included (iCaRL, arXiv 1611.07725)."""
    return float(np.mean([accuracy_after(a, n, t) for t in range(len(a))]))


def final_accuracy(a: Matrix, n: Sequence[int]) -> float:
    """A_T."""
    return accuracy_after(a, n, len(a) - 1)


def forgetting(a: Matrix) -> float | None:
    """F_T = mean over j < T of (max over l in j..T-1 of a[l][j]) - a[T][j]; None for one task (1801.10112)."""
    last = len(a) - 1
    if last == 0:
        return None
    return float(np.mean([np.max(a[j:last, j]) - a[last, j] for j in range(last)]))


def forgetting_authors(a: Matrix) -> float:
    """The MFCL authors' form, unit slip mended: mean over all T tasks of a[j][j] - a[T][j]."""
    return float(np.mean(np.diag(a) - a[-1]))


def backward_transfer(a: Matrix) -> float | None:
    """BWT = mean over j < T of a[T][j] - a[j][j] (arXiv 1706.08840); None for one task."""
    return None if len(a) == 1 else float(np.mean(a[-1, :-1] - np.diag(a)[:-1]))


def learning_accuracy(a: Matrix) -> float:
    """LA: how well each task was known right after it was learned."""
    return float(np.mean(np.diag(a)))


def min_accuracy(trace: Matrix, ends: Sequence[int]) -> float | None:
    """min-ACC (arXiv 2205.13452): mean over old tasks of the worst accuracy seen after they were learned.

    ``trace[g][j]`` is the accuracy on task j at the g-th evaluation; ``ends[j]`` the index of the last
    evaluation inside task j. None for one task.
    """
    old = range(len(ends) - 1)
    if not old:
        return None
    return float(np.mean([np.min(trace[ends[j] + 1 : ends[-1] + 1, j]) for j in old]))


def worst_case_accuracy(trace: Matrix, ends: Sequence[int]) -> float | None:
    """WC-ACC (arXiv 2205.13452): (1/T) A(last task, now) + (1 - 1/T) min-ACC; None for one task."""
    worst = min_accuracy(trace, ends)
    if worst is None:
        return None
    share = 1 / len(ends)
    return float(share * trace[ends[-1], len(ends) - 1] + (1 - share) * worst)


def windowed_forgetting(trace: Matrix, window: int) -> float:
    """WF (arXiv 2205.13452): mean over tasks of the largest drop among ``window`` evaluations in a row."""
    return float(np.mean([_largest_drop(trace[:, j], window) for j in range(trace.shape[1])]))


def windowed_plasticity(trace: Matrix, window: int) -> float:
    """WP (arXiv 2205.13452): the same for the largest rise."""
    return float(np.mean([_largest_drop(-trace[:, j], window) for j in range(trace.shape[1])]))


def _largest_drop(series: NDArray[np.float64], window: int) -> float:
    seen = series[~np.isnan(series)]
    drops = [0.0, *(seen[i] - seen[i + 1 : i + window].min() for i in range(len(seen) - 1) if window > 1)]
    return float(max(drops))
