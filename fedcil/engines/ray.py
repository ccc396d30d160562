"""Clients in Ray actors: many processes, many GPUs, one machine or a cluster.

Each actor is one worker; a cluster that grows brings more, one that dies is replaced, and its jobs go to others.
The broadcast is put into the object store once a round and the payload once a task; actors read them without a
copy and answer with partial sums.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import ObjectLostError, RayActorError, RayError, RayTaskError

from fedcil.engines import Setting, ray_head
from fedcil.engines.costs import Costs
from fedcil.engines.flat import flatten_tensors, row_of_job
from fedcil.engines.ray_cluster import cluster, share_of_worker, store_bytes
from fedcil.engines.ray_crew import Crew
from fedcil.engines.ray_room import free_cpus
from fedcil.engines.workers import worker_count
from fedcil.errors import RunFailed
from fedcil.fold import Misfit
from fedcil.gather import Gathered, cut
from fedcil.messages import Job, Outcome, Payload, Request
from fedcil.port import ClientDone, Port, remaining

ATTEMPTS = 3  # how often a client is tried when workers die under it
LOOK_S = 0.2  # how long to wait before looking at the stop signal again
START_S = 120.0  # how long to wait for the first worker: a full cluster may have no room for one
MORE_S = 20.0  # and then for the others that were asked for
LEAST_PIECE_S = 0.05  # seconds of work that are worth a request of their own
LEAST_SHARED_S = 0.01  # seconds of a round's work that are worth a second worker


def serve(setting: Setting, loop: Callable[[Port], None]) -> None:
    """Attach to ``engine.address`` or start Ray here; what was started is ended."""
    engine = setting.experiment.scenario.engine
    workers = worker_count(setting.experiment)
    share = share_of_worker(setting.experiment, workers)
    # A cluster, or GPUs whose shares were measured, may have room for fewer than there are cores here.
    least = workers if engine.workers or not (engine.address or share.gpus) else 1
    memory = store_bytes(setting.experiment, workers)
    with cluster(setting.stop, engine.address, workers, least, share, memory):
        port = RayPort(setting, Crew(setting, share))
        try:
            loop(port)
        except RayError:
            time.sleep(2 * ray_head.LOOK_S)  # whatever Ray says after its head has died, that is the reason
            setting.stop.check()
            raise
        finally:
            port.close()


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive jobs of a round, and how often they were tried."""

    jobs: tuple[Job, ...]
    attempts: int = 0

    def apart(self) -> list[Piece]:
        """Each client by itself, to be tried again: who breaks a worker must take no other along."""
        return [Piece((job,), self.attempts + 1) for job in self.jobs]


class Lull:
    """A time in which nobody works although there is work: said every START_S seconds, since a node may come back."""

    def __init__(self) -> None:
        self._since, self._said = time.monotonic(), 0

    def look(self, working: bool) -> None:
        now = time.monotonic()
        if working:
            self._since, self._said = now, 0
        elif now - self._since > (self._said + 1) * START_S:
            self._said += 1  # a warning in the same words would be shown once
            lonely = f"no Ray worker has been there for {self._said * START_S:g} s ({free_cpus()})"
            warnings.warn(f"{lonely}: the run waits for one; Ctrl-C saves it", stacklevel=1)


class RayPort:
    """The port over actors."""

    def __init__(self, setting: Setting, crew: Crew) -> None:
        self._at_once = setting.experiment.execution.at_once
        self._stop = setting.stop
        self._crew = crew
        self._costs = Costs()
        self._payload: tuple[str, list[Any]] | None = None
        # Workers that have not said yet who they are, or are being restarted, by the answer that they owe.
        self._asleep: dict[Any, Any] = {}
        self._wait_for(crew.newcomers())

    def reachable(self) -> None:
        """All of them."""

    def run(self, request: Request, deadline_s: float | None, done: ClientDone) -> Outcome:
        gathered, lull, begun = Gathered(request, done), Lull(), False
        place = replace(request.broadcast, tensors={}, payload=None)
        model = ray.put(flatten_tensors(request.broadcast.tensors))
        payload = self._put_payload(request.broadcast.payload)
        # A piece answers as a whole, and who is late must take no other along.
        parts = self._cut(request) if deadline_s is None else cut(request, len(request.jobs))
        todo = self._longest_first(piece for part in parts for piece in self._pieces(part.jobs))
        asleep = list(self._asleep.values())
        idle = [worker for worker in self._crew.workers if worker not in asleep]
        busy: dict[Any, tuple[Any, Piece | None]] = {}
        started = time.monotonic()
        while (todo or any(piece for _, piece in busy.values())) and remaining(deadline_s, started) != 0.0:
            self._stop.check()
            lull.look(any(piece for _, piece in busy.values()))
            self._greet(self._crew.newcomers())
            busy |= {answer: (worker, None) for answer, worker in self._asleep.items()}
            self._asleep.clear()
            while todo and idle:
                piece, worker = todo.pop(0), idle.pop(0)
                jobs = [row_of_job(job) for job in piece.jobs]
                answer = worker.run.remote(place, model, payload, jobs, request.cohort, request.rule)
                busy[answer] = (worker, piece)
                begun = True
            if not begun:  # all workers are being restarted: the round's time begins with the first that is there
                started = time.monotonic()
            ready, _ = ray.wait(list(busy), num_returns=1, timeout=LOOK_S)
            for reference in ready:
                worker, given = busy.pop(reference)
                if again := self._collect(reference, worker, given, gathered, idle):
                    todo = self._longest_first([*todo, *again])
        late = [(worker, piece) for worker, piece in busy.values() if piece]
        self._costs.missed(job.client for _, piece in late for job in piece.jobs)
        self._restart([worker for worker, _ in late])
        self._asleep |= {answer: worker for answer, (worker, piece) in busy.items() if not piece}
        return gathered.outcome()

    def close(self) -> None:
        for worker in [] if self._stop.problem else self._crew.workers:
            ray.kill(worker)

    def _cut(self, request: Request) -> list[Request]:
        """What costs less than passing it on stays together."""
        shared = self._costs.jobs_worth(LEAST_SHARED_S, request.jobs) < len(request.jobs)
        least = self._costs.jobs_worth(LEAST_PIECE_S, request.jobs)
        return cut(request, len(self._crew.workers) if shared else 1, max(self._at_once, least))

    def _pieces(self, jobs: tuple[Job, ...]) -> list[Piece]:
        """One, or each client by itself where one of them would take others along."""
        return [Piece((job,)) for job in jobs] if self._costs.deadly(jobs) else [Piece(jobs)]

    def _longest_first(self, pieces: Iterable[Piece]) -> list[Piece]:
        """By what their clients took in earlier rounds; where nothing is known, as they are. Last those who may hold a
        worker until the deadline again, or kill it.
        """
        return sorted(pieces, key=lambda piece: (self._costs.harmful(piece.jobs), -self._costs.of(piece.jobs)))

    def _collect(
        self, reference: Any, worker: Any, piece: Piece | None, gathered: Gathered, idle: list[Any]
    ) -> list[Piece]:
        """Take in what a worker gave; returns what must be tried again because it died, with its answer or before.

        A worker that died is asked for a sign of life (``piece`` None) before it gets work again.
        """
        try:
            answer = ray.get(reference)
        except (RayActorError, ObjectLostError) as error:
            if getattr(error, "actor_init_failed", False):
                self._go_on_without(worker, could_not_start(error))
            else:  # it is being restarted
                self._ask_again(worker)
            return self._again(piece, gathered) if piece else []
        except RayError as error:
            if not piece:
                if isinstance(error, RayTaskError):  # its own code raised; others pass, as a lack of memory does
                    self._go_on_without(worker, could_not_start(error))
                else:
                    self._ask_again(worker)
                return []
            idle.append(worker)
            return self._raised(error, piece, gathered)
        if piece:
            reply = answer.reply()
            gathered.add(reply)
            self._costs.learn(reply.reports)
        else:
            try:
                self._crew.refuse_stranger(answer)
            except RunFailed as problem:
                self._go_on_without(worker, problem)
                return []
        idle.append(worker)
        return []

    def _raised(self, error: RayError, piece: Piece, gathered: Gathered) -> list[Piece]:
        """A worker lives, but gave an error instead of this piece."""
        cause = getattr(error, "cause", error)
        if isinstance(cause, Misfit):  # no worker's problem, but the round's
            raise cause from None
        if len(piece.jobs) > 1:
            return piece.apart()
        for job in piece.jobs:
            gathered.fail(job.client, "worker", str(cause))
        return []

    def _ask_again(self, worker: Any) -> None:
        """For a sign of life; without a pause that would spin."""
        time.sleep(LOOK_S)
        self._greet([worker])

    def _go_on_without(self, worker: Any, problem: RunFailed) -> None:
        """Others can do its work; where there are none, its problem is the run's."""
        if len(self._crew.workers) == 1:
            raise problem from None
        self._crew.dismiss(worker)
        warnings.warn(f"the run goes on without one of its workers: {problem.what}", stacklevel=1)

    def _again(self, piece: Piece, gathered: Gathered) -> list[Piece]:
        known = self._costs.deadly(piece.jobs)
        if piece.attempts + 1 < ATTEMPTS and not known:
            return piece.apart()
        for job in piece.jobs:
            gathered.fail(job.client, "worker", f"its worker died {'again' if known else f'{ATTEMPTS} times'}")
            self._costs.killed(job.client)
        return []

    def _put_payload(self, payload: Payload | None) -> tuple[str, list[Any]] | None:
        """Once per task; the reference travels inside a list, so that it is not resolved on the way."""
        if payload is None:
            self._payload = None
        elif self._payload is None or self._payload[0] != payload.hash:
            self._payload = (payload.hash, [ray.put(flatten_tensors(payload.tensors))])
        return self._payload

    def _restart(self, late: list[Any]) -> None:
        """A worker that missed the deadline is restarted rather than waited for."""
        for worker in late:
            ray.kill(worker, no_restart=False)
        self._greet(late)

    def _greet(self, workers: Iterable[Any]) -> None:
        """Ask for a sign of life."""
        self._asleep |= {worker.identity.remote(): worker for worker in workers}

    def _wait_for(self, workers: list[Any]) -> None:
        """Until each of the first workers has said who it is. One is enough to begin; others join when they are ready:
        their CPUs may not be free.
        """
        self._greet(workers)
        end = time.monotonic() + START_S
        while self._asleep and time.monotonic() < end:
            self._stop.check()
            came, _ = ray.wait(list(self._asleep), num_returns=len(self._asleep), timeout=LOOK_S)
            if came and len(self._asleep) == len(workers):
                end = time.monotonic() + MORE_S
            for answer in came:
                del self._asleep[answer]
                try:
                    there = ray.get(answer)
                except RayError as error:
                    raise could_not_start(error) from None
                self._crew.refuse_stranger(there)
        if self._asleep and len(self._asleep) == len(workers):
            raise nobody_started()
        if self._asleep:
            there = f"{len(workers) - len(self._asleep)} of {len(workers)} Ray workers are there ({free_cpus()})"
            warnings.warn(f"{there}: the run begins, and others join when they are ready", stacklevel=1)


def could_not_start(error: RayError) -> RunFailed:
    """What went wrong stands at the margin, after the lines of where, in the worker's code."""
    lines = [line for line in str(error).splitlines() if line[:1].strip()]
    problem = lines[-1] if lines else type(error).__name__
    return RunFailed(
        f"a Ray worker could not start: {problem}",
        where="engine",
        next="check that each node has the same fedcil and the data under the same path, then `fedcil resume RUN`",
    )


def nobody_started() -> RunFailed:
    return RunFailed(
        f"no Ray worker has started in {START_S:g} s: {free_cpus()}",
        where="engine",
        next="wait until others have given back what they hold, then `fedcil resume RUN`",
    )
