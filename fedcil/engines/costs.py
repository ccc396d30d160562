"""What clients cost, so that work is passed on longest first and in pieces that are worth it, and who did harm."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from fedcil.messages import Job, Report


class Costs:
    """Seconds of each client's work, learned from the rounds before."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}
        self._total = 0.0  # of all of them
        self._late: set[int] = set()
        self._deadly: set[int] = set()

    def missed(self, clients: Iterable[int]) -> None:
        """These had a worker and no answer when their round's deadline was up."""
        self._late |= set(clients)

    def killed(self, client: int) -> None:
        """Its worker died as often as it was tried."""
        self._deadly.add(client)

    def deadly(self, jobs: Iterable[Job]) -> bool:
        """Whether one of them killed its workers and has not answered since: it should be alone, and tried once."""
        return any(job.client in self._deadly for job in jobs)

    def harmful(self, jobs: Iterable[Job]) -> bool:
        """Whether one of them missed a deadline, or killed its workers, and has not answered since: others should not
        wait behind it.
        """
        return any(job.client in self._late or job.client in self._deadly for job in jobs)

    def learn(self, reports: Iterable[Report]) -> None:
        """What these clients took. Who answers is neither late nor deadly any more."""
        for report in reports:
            self._total += report.seconds - self._seconds.get(report.client, 0.0)
            self._seconds[report.client] = report.seconds
            self._late.discard(report.client)
            self._deadly.discard(report.client)

    def of(self, jobs: Iterable[Job]) -> float:
        """Seconds; a client that was never asked counts as the mean of those that were."""
        mean = self._total / max(1, len(self._seconds))
        return sum(self._seconds.get(job.client, mean) for job in jobs)

    def jobs_worth(self, seconds: float, jobs: Sequence[Job]) -> int:
        """How many of these jobs take so long together; 1 before anything is known."""
        whole = self.of(jobs)
        return math.ceil(len(jobs) / max(1.0, whole / seconds)) if self._seconds else 1
