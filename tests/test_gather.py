"""The replies of a round, in any order: each client counts once, and who says nothing missed the deadline."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given as examples
from hypothesis import strategies as st

from fedcil.fold import Fold
from fedcil.gather import Gathered, cut
from fedcil.messages import Broadcast, Failure, Job, Reply, Report, Request
from fedcil.tensors import Contribution, content_hash

CLIENTS = (3, 5, 8, 9)
REQUEST = Request(
    Broadcast(task=0, phase=0, round=0, tensors={}),
    tuple(Job(client, place) for place, client in enumerate(CLIENTS)),
    len(CLIENTS),
)


def given(client: int) -> Contribution:
    return Contribution({"x": torch.tensor([0.1, 1e8]) * client}, 1.0 + client)


def report(client: int) -> Report:
    return Report(client=client, samples=client)


def reply(*clients: int, failed: tuple[int, ...] = ()) -> Reply:
    """What a worker says that had these clients: a partial sum, reports, failures."""
    fold = Fold.empty(len(CLIENTS))
    for client in clients:
        fold.add(CLIENTS.index(client), given(client))
    for client in failed:
        fold.absent(CLIENTS.index(client))
    failures = tuple(Failure(client, "training", "broke") for client in failed)
    return Reply(fold, tuple(report(client) for client in clients), failures)


class Done(list[int]):
    """Collects the clients whose answer is in."""

    def __call__(self, client: int) -> None:
        self.append(client)


def test_what_processes_took_is_added_up() -> None:
    gathered = Gathered(REQUEST, Done())
    for client, cost in ((3, 0.5), (5, 0.25)):
        gathered.add(replace(reply(client), cpu_elsewhere=cost))
    assert gathered.outcome().cpu_elsewhere == 0.75


def test_every_order_and_grouping_gives_the_same_outcome() -> None:
    """Whole replies, single answers and failures in all 24 orders: the same bits, reports and failures by id."""
    seen = set()
    for order in itertools.permutations(range(4)):
        done = Done()
        gathered = Gathered(REQUEST, done)
        steps = [
            lambda to: to.add(reply(3)),
            lambda to: to.answer(report(5), given(5)),
            lambda to: to.fail(8, "node", "lost"),
            lambda to: to.add(reply(9)),
        ]
        for step in order:
            steps[step](gathered)
        outcome = gathered.outcome()
        assert outcome.total is not None
        assert [answer.client for answer in outcome.reports] == [3, 5, 9]
        assert outcome.failures == (Failure(8, "node", "lost"),)
        assert sorted(done) == list(CLIENTS)
        seen.add((content_hash(outcome.total.tensors), outcome.total.weight))
    assert len(seen) == 1


def test_who_did_not_answer_missed_the_deadline() -> None:
    done = Done()
    gathered = Gathered(REQUEST, done)
    gathered.add(reply(5, failed=(8,)))
    assert gathered.open_clients == [3, 9]
    outcome = gathered.outcome()
    assert outcome.total is not None
    assert outcome.total.weight == 6.0
    late = Failure(3, "deadline", "no answer in time"), Failure(9, "deadline", "no answer in time")
    assert outcome.failures == (late[0], Failure(8, "training", "broke"), late[1])
    assert done == [5, 8, 3, 9]


def test_nobody_answered() -> None:
    outcome = Gathered(REQUEST, Done()).outcome()
    assert outcome.total is None
    assert outcome.reports == ()
    assert [failure.client for failure in outcome.failures] == list(CLIENTS)


def test_a_report_without_a_contribution_is_an_answer() -> None:
    gathered = Gathered(REQUEST, Done())
    gathered.answer(report(3), None)
    outcome = gathered.outcome()
    assert outcome.total is None
    assert outcome.reports == (report(3),)


@pytest.mark.parametrize(
    "again",
    [
        reply(3),
        reply(3, 5),
        reply(failed=(3,)),
        Reply(Fold.empty(4), (report(3),)),
        Reply(Fold.empty(4), (), (Failure(3, "training", "broke"),)),
        Reply(Fold.empty(4), (report(4),)),
        Reply(Fold.empty(4), (report(5), report(5))),
        Reply(Fold.empty(4), (report(5),), (Failure(5, "training", "broke"),)),
    ],
    ids=["same", "with another", "as a failure", "no sum", "no sum, failure", "not asked", "twice in one", "both"],
)
def test_a_reply_that_would_count_somebody_twice_is_refused_as_a_whole(again: Reply) -> None:
    done = Done()
    gathered = Gathered(REQUEST, done)
    gathered.add(reply(3))
    with pytest.raises(ValueError, match=r"answered already|counted already"):
        gathered.add(again)
    assert done == [3]
    assert gathered.open_clients == [5, 8, 9]
    outcome = gathered.outcome()
    assert outcome.total is not None
    assert outcome.total.weight == 4.0
    assert outcome.reports == (report(3),)
    assert len(outcome.failures) == 3


def test_an_answer_or_a_failure_after_an_answer_is_refused() -> None:
    gathered = Gathered(REQUEST, Done())
    gathered.answer(report(3), given(3))
    with pytest.raises(ValueError, match="client 3 was not asked, or has answered already"):
        gathered.answer(report(3), given(3))
    with pytest.raises(ValueError, match="client 3"):
        gathered.fail(3, "node", "lost")
    with pytest.raises(ValueError, match="client 4"):
        gathered.answer(report(4), given(4))


@examples(jobs=st.integers(1, 70), workers=st.integers(1, 12), least=st.integers(1, 20))
def test_a_request_falls_apart_into_aligned_runs_of_the_same_tree(jobs: int, workers: int, least: int) -> None:
    """Each run of a power of two is one partial sum, but for the last; none is much more than a worker's share."""
    request = request_of(jobs)
    parts = cut(request, workers, least)
    assert tuple(job for part in parts for job in part.jobs) == request.jobs
    share = math.ceil(jobs / workers)
    assert workers == 1 or max(len(part.jobs) for part in parts) <= 4 / 3 * share
    assert all(len(part.jobs) >= min(least, 2 / 3 * share) for part in parts[:-1])
    for part in parts:
        fold = Fold.empty(part.cohort)
        for job in part.jobs:
            fold.add(job.position, given_one())
        assert part is parts[-1] or len(fold.sums) == 1
        assert part.broadcast is REQUEST.broadcast


@examples(jobs=st.integers(1, 400), workers=st.integers(1, 40))
def test_workers_with_equal_jobs_end_together(jobs: int, workers: int) -> None:
    """10 clients on 2 workers are 5 and 5, not 6 and 4: whoever is free takes the next run."""
    busy = [0] * workers
    for part in cut(request_of(jobs), workers):
        busy[busy.index(min(busy))] += len(part.jobs)
    assert max(busy) == math.ceil(jobs / workers)


@pytest.mark.parametrize(
    ("jobs", "workers", "least", "sizes"),
    [
        (5, 2, 3, [2, 2, 1]),
        (9, 4, 9, [2, 2, 2, 2, 1]),
        (17, 4, 17, [4, 4, 4, 4, 1]),
        (100, 2, 100, [64, 36]),
        (10, 1, 10, [10]),
    ],
)
def test_small_jobs_are_shared_out_all_the_same(jobs: int, workers: int, least: int, sizes: list[int]) -> None:
    assert [len(part.jobs) for part in cut(request_of(jobs), workers, least)] == sizes


def request_of(jobs: int) -> Request:
    return Request(REQUEST.broadcast, tuple(Job(client, client) for client in range(jobs)), jobs)


def given_one() -> Contribution:
    return Contribution({"w": torch.ones(1)}, 1.0)
