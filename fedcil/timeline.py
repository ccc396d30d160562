"""The rounds of a run in one row: what a trace, a chain or a sine is counted in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Self


@dataclass(frozen=True, slots=True)
class Timeline:
    """Numbers rounds from 0 through all tasks and phases, as their lines stand in ``metrics.jsonl``.

    ``starts[task]`` holds the number of each phase's first round and, last, of the first round after the task.
    """

    starts: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, lengths: Sequence[Sequence[int]]) -> Self:
        """From the rounds of each phase of each task."""
        starts: list[tuple[int, ...]] = []
        for task in lengths:
            starts.append(tuple(accumulate(task, initial=starts[-1][-1] if starts else 0)))
        return cls(tuple(starts))

    @property
    def rounds(self) -> int:
        return self.starts[-1][-1]

    def round_number(self, task: int, phase: int, round: int) -> int:
        """Of a place; behind a task's last phase stands its successor's first round, behind the last task the end."""
        return self.starts[task][phase] + round if task < len(self.starts) else self.rounds

    def places(self) -> Iterator[tuple[int, int, int]]:
        """(task, phase, round) of every round."""
        for task in range(len(self.starts)):
            for phase, rounds in enumerate(self.lengths(task)):
                yield from ((task, phase, round_) for round_ in range(rounds))

    def span(self, task: int) -> range:
        """The rounds of a task."""
        return range(self.starts[task][0], self.starts[task][-1])

    def lengths(self, task: int) -> list[int]:
        """Rounds of each phase of a task."""
        starts = self.starts[task]
        return [after - start for start, after in pairwise(starts)]
