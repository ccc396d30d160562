"""Putting the replies of one round together, in whatever order they come."""

from __future__ import annotations

import math
from dataclasses import replace

from fedcil.fold import Fold, next_power_of_two
from fedcil.messages import Failure, Job, Outcome, Reply, Report, Request
from fedcil.port import ClientDone
from fedcil.tensors import Contribution


def cut(request: Request, workers: int, least: int = 1) -> list[Request]:
    """Consecutive runs of jobs, aligned so that each comes back as one partial sum, for ``workers`` side by side.

    Long ones first and then ever shorter ones, so that with equal jobs all workers end together (guided
    self-scheduling, Polychronopoulos and Kuck, 1987). ``least``: how many jobs are worth a request of their own,
    rounded up to a power of two, and no more than a worker's share, rounded to the nearest one.
    """
    jobs, start, runs = request.jobs, 0, []
    least = next_power_of_two(least)
    if workers > 1:
        share = math.ceil(len(jobs) / workers)
        least = min(least, next_power_of_two(math.ceil(2 * share / 3)))
    while start < len(jobs):
        half_a_share = (len(jobs) - start) // (2 * workers)
        size = max(least, 1 << max(0, half_a_share.bit_length() - 1))
        runs.append(replace(request, jobs=jobs[start : start + size]))
        start += size
    return runs


class Gathered:
    """The replies of one round, put together as they come."""

    def __init__(self, request: Request, done: ClientDone) -> None:
        self._jobs: dict[int, Job] = {job.client: job for job in request.jobs}
        self._fold = Fold.empty(request.cohort, request.rule)
        self._reports: list[Report] = []
        self._failures: list[Failure] = []
        self._done = done
        self.wire_bytes = 0
        self._cpu_elsewhere = 0.0

    def add(self, reply: Reply) -> None:
        """Take in a reply. ValueError, and nothing is taken, if something in it was counted already."""
        clients = [report.client for report in reply.reports] + [failure.client for failure in reply.failures]
        if len(set(clients)) < len(clients) or not self._jobs.keys() >= set(clients):
            raise ValueError(f"of the clients {clients} some were not asked, or have answered already")
        self._fold.merge(reply.fold)
        self._reports += reply.reports
        self._failures += reply.failures
        self._cpu_elsewhere += reply.cpu_elsewhere
        for client in clients:
            self._take(client)
            self._done(client)

    def answer(self, report: Report, contribution: Contribution | None) -> None:
        """Take in one client's report and what it gives, if anything."""
        job = self._take(report.client)
        if contribution is None:
            self._fold.absent(job.position)
        else:
            self._fold.add(job.position, contribution)
        self._reports.append(report)
        self._done(report.client)

    def _take(self, client: int) -> Job:
        if client not in self._jobs:
            raise ValueError(f"client {client} was not asked, or has answered already")
        return self._jobs.pop(client)

    @property
    def open_clients(self) -> list[int]:
        return sorted(self._jobs)

    def fail(self, client: int, stage: str, reason: str) -> None:
        """Give up on a client that has not answered."""
        job = self._take(client)
        self._fold.absent(job.position)
        self._failures.append(Failure(client, stage, reason))
        self._done(client)

    def outcome(self) -> Outcome:
        """Everything that came, sorted by client; what did not come missed the deadline."""
        for client in self.open_clients:
            self.fail(client, "deadline", "no answer in time")
        return Outcome(
            self._fold.total(),
            tuple(sorted(self._reports, key=lambda report: report.client)),
            tuple(sorted(self._failures, key=lambda failure: failure.client)),
            self.wire_bytes,
            self._cpu_elsewhere,
        )
