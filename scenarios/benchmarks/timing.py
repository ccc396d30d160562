"""Timing that holds on a busy machine: cases in turn, process CPU seconds beside wall seconds, medians of ratios."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Cost:
    """CPU seconds (user + system, of all processes that take part) and wall seconds of one unit of work."""

    cpu: float
    wall: float


Case = Callable[[], Cost]
"""Does one repeat and says what it cost."""


def timed(work: Callable[[], object], units: int = 1, elsewhere: Callable[[], float] = lambda: 0.0) -> Case:
    """A case in this process: ``work`` does ``units`` of whatever is counted. ``elsewhere``: CPU seconds so far of
    other processes that take part.
    """

    def case() -> Cost:
        gc.collect()
        others, wall, cpu = elsewhere(), time.perf_counter(), time.process_time()
        work()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        return Cost((cpu + elsewhere() - others) / units, wall / units)

    return case


def times_in_a_second(work: Callable[[], object], most: int = 200) -> int:
    """How often ``work`` can be done in one, by its second time: the first starts what is started once. So much can be
    told from the ticks of CPU clocks, and a core that was idle before is awake for most of it.
    """
    work()
    started = time.perf_counter()
    work()
    return max(1, min(most, round(1 / (time.perf_counter() - started))))


def for_a_while(case: Case, seconds: float = 0.5) -> Case:
    """As many times as take so long, and the mean of them: caches are warm then, as in a run."""
    case()
    times = max(1, round(seconds / case().wall))

    def many() -> Cost:
        costs = [case() for _ in range(times)]
        return Cost(statistics.fmean(cost.cpu for cost in costs), statistics.fmean(cost.wall for cost in costs))

    return many


def in_turn(
    cases: Mapping[str, Case], repeats: int, warm_up: int = 1, limit_s: float = float("inf")
) -> dict[str, list[Cost]]:
    """A, B, C, then B, C, A, ...: a slow minute of the machine hits all cases alike. After ``limit_s`` seconds of
    repeats no other is begun; there is one at least.
    """
    names = list(cases)
    for _ in range(warm_up):
        for name in names:
            cases[name]()
    costs: dict[str, list[Cost]] = {name: [] for name in names}
    started = time.perf_counter()
    for repeat in range(repeats):
        if repeat and time.perf_counter() - started > limit_s:
            break
        start = repeat % len(names)
        for name in names[start:] + names[:start]:
            costs[name].append(cases[name]())
    return costs


@dataclass(frozen=True, slots=True)
class Figure:
    """Ours against a baseline: ``ratio`` and ``wall_ratio`` are medians of ours / baseline, pair by pair (smaller is
    better), ``median_s`` our CPU seconds, ``spread`` the range of the ratios over their median, of
    ``repeats`` pairs; one pair has none.
    """

    ratio: float | None
    wall_ratio: float | None
    median_s: float | None
    spread: float | None
    repeats: int | None

    def plus(self, added_s: float, baseline_s: float) -> Figure:
        """With a cost of ``added_s`` CPU seconds that the timed part left out."""
        extra = added_s / baseline_s
        assert self.ratio is not None
        assert self.wall_ratio is not None
        assert self.median_s is not None
        return replace(
            self, ratio=self.ratio + extra, wall_ratio=self.wall_ratio + extra, median_s=self.median_s + added_s
        )


NOT_MEASURED = Figure(None, None, None, None, None)


def against(ours: Sequence[Cost], baseline: Sequence[Cost] | None) -> Figure:
    """Without a baseline (a peer that could not be had) there are no ratios."""
    if baseline is None:
        return Figure(None, None, median_cpu(ours), None, len(ours))
    ratios = [a.cpu / b.cpu for a, b in zip(ours, baseline, strict=True)]
    walls = [a.wall / b.wall for a, b in zip(ours, baseline, strict=True)]
    ratio = statistics.median(ratios)
    spread = (max(ratios) - min(ratios)) / ratio if len(ratios) > 1 else None
    return Figure(ratio, statistics.median(walls), median_cpu(ours), spread, len(ratios))


def median_cpu(costs: Sequence[Cost]) -> float:
    return statistics.median(cost.cpu for cost in costs)
