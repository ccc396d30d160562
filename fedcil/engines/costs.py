"""What clients cost, so that work is passed on longest first and in pieces that are worth it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from fedcil.messages import Job, Report


class Costs:
    """Seconds of each client's work, learned from the rounds before."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}
        self._mean = 0.0

    def learn(self, reports: Iterable[Report]) -> None:
        self._seconds |= {report.client: report.seconds for report in reports}
        self._mean = sum(self._seconds.values()) / max(1, len(self._seconds))

    def of(self, jobs: Iterable[Job]) -> float:
        """Seconds; a client that was never asked counts as the mean of those that were."""
        return sum(self._seconds.get(job.client, self._mean) for job in jobs)

    def jobs_worth(self, seconds: float, jobs: Sequence[Job]) -> int:
        """How many of these jobs take so long together; 1 before anything is known."""
        whole = self.of(jobs)
        return math.ceil(len(jobs) / max(1.0, whole / seconds)) if self._seconds else 1
