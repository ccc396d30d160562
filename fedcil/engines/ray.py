"""Clients in Ray actors: many processes, many GPUs, one machine or a cluster.

Each actor is one worker that lives as long as the run. The broadcast is put into the object store once a
round and the payload once a task; actors read them without a copy and answer with partial sums.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.exceptions import RayActorError, RayTaskError

from client.handle import Shared, Worker, handle
from client.states import StateStore
from fedcil.engines import Setting
from fedcil.engines.workers import worker_count
from fedcil.errors import RunFailed
from fedcil.experiment import open_experiment
from fedcil.gather import Gathered
from fedcil.messages import Broadcast, Job, Outcome, Payload, Reply, Request, Tensors
from fedcil.port import ClientDone, Port, remaining
from fedcil.scenario import Scenario

T = TypeVar("T")
ATTEMPTS = 3  # how often a client is tried when workers die under it
LOOK_S = 0.2  # how long to wait before looking at the stop signal again
PIECES = 4  # a worker's share of a round is cut into so many requests, for balance


def serve(setting: Setting, loop: Callable[[Port], T]) -> T:
    """Attach to ``engine.address`` or start Ray here; what was started is ended."""
    engine = setting.experiment.scenario.engine
    workers = worker_count(setting.experiment.scenario)
    with cluster(engine.address, workers):
        port = RayPort(setting, workers)
        try:
            return loop(port)
        finally:
            port.close()


@contextlib.contextmanager
def cluster(address: str | None, workers: int) -> Iterator[None]:
    quiet = {"log_to_driver": False, "logging_level": "ERROR", "include_dashboard": False}
    try:
        if address:
            ray.init(address=address, **{k: v for k, v in quiet.items() if k != "include_dashboard"})
        else:
            ray.init(num_cpus=workers, **quiet)
    except ConnectionError as error:
        raise RunFailed(
            f"no Ray cluster: {error}",
            where=f"engine.address = {address!r}",
            next="start one with `ray start --head`, or leave engine.address out",
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


class ClientWorker:
    """One actor: a worker with its own copy of everything that follows from the scenario."""

    def __init__(self, scenario: Scenario, data_root: Path | None, states: Path) -> None:
        self._worker = Worker(Shared(open_experiment(scenario, data_root), StateStore(states)), lambda: None)
        self._payload: Payload | None = None

    def numeric(self) -> dict[str, str | int]:
        return self._worker.shared.experiment.numeric()

    def run(self, broadcast: Broadcast, payload: tuple[str, list[Any]] | None, jobs: Any, cohort: int) -> Reply:
        """The jobs of one piece. ``payload`` is (hash, [reference]): read only when it is not held already."""
        if payload is not None and (self._payload is None or self._payload.hash != payload[0]):
            tensors: Tensors = ray.get(payload[1][0])
            self._payload = Payload(tensors, payload[0])
        held = self._payload if payload is not None else None
        return handle(Request(replace(broadcast, payload=held), jobs, cohort), self._worker)


@dataclass(slots=True)
class Piece:
    """Consecutive jobs of a round, and how often they were tried."""

    jobs: tuple[Job, ...]
    attempts: int = 0


class RayPort:
    """The port over actors."""

    def __init__(self, setting: Setting, workers: int) -> None:
        experiment = setting.experiment
        self._clients = frozenset(range(experiment.scenario.clients.count))
        self._stop = setting.stop
        self._payload: tuple[str, list[Any]] | None = None
        actor = ray.remote(
            num_cpus=1,
            num_gpus=experiment.scenario.engine.gpus_per_worker,
            max_restarts=-1,
            max_task_retries=0,
        )(ClientWorker)
        root = setting.data_root.absolute() if setting.data_root else None
        made = (actor.remote(experiment.scenario, root, setting.states.absolute()) for _ in range(workers))
        self._workers = list(made)
        self._check_workers(experiment.numeric())

    def reachable(self) -> frozenset[int]:
        return self._clients

    def run(self, request: Request, deadline_s: float | None, done: ClientDone) -> Outcome:
        gathered, started = Gathered(request, done), time.monotonic()
        broadcast = ray.put(replace(request.broadcast, payload=None))
        payload = self._put_payload(request.broadcast.payload)
        todo = cut(request.jobs, len(self._workers) * PIECES)
        idle = list(self._workers)
        busy: dict[Any, tuple[Any, Piece]] = {}
        while (todo or busy) and remaining(deadline_s, started) != 0.0:
            self._stop.check()
            while todo and idle:
                piece, worker = todo.pop(0), idle.pop(0)
                busy[worker.run.remote(broadcast, payload, piece.jobs, request.cohort)] = (worker, piece)
            ready, _ = ray.wait(list(busy), num_returns=1, timeout=LOOK_S)
            for reference in ready:
                worker, piece = busy.pop(reference)
                idle.append(worker)
                todo += self._collect(reference, piece, gathered)
        self._replace_late([worker for worker, _ in busy.values()])
        return gathered.outcome()

    def close(self) -> None:
        for worker in self._workers:
            ray.kill(worker)

    def _collect(self, reference: Any, piece: Piece, gathered: Gathered) -> list[Piece]:
        """Take in a piece's reply; returns what must be tried again because its worker died."""
        try:
            gathered.add(ray.get(reference))
        except RayActorError:
            if piece.attempts + 1 < ATTEMPTS:
                time.sleep(LOOK_S)  # the actor is being restarted
                return [Piece(piece.jobs, piece.attempts + 1)]
            for job in piece.jobs:
                gathered.fail(job.client, "worker", f"its worker died {ATTEMPTS} times")
        except RayTaskError as error:
            for job in piece.jobs:
                gathered.fail(job.client, "worker", str(error.cause))
        return []

    def _put_payload(self, payload: Payload | None) -> tuple[str, list[Any]] | None:
        """Once per task; the reference travels inside a list, so that it is not resolved on the way."""
        if payload is None:
            self._payload = None
        elif self._payload is None or self._payload[0] != payload.hash:
            self._payload = (payload.hash, [ray.put(dict(payload.tensors))])
        return self._payload

    def _replace_late(self, late: list[Any]) -> None:
        """A worker that missed the deadline is restarted rather than waited for."""
        for worker in late:
            ray.kill(worker, no_restart=False)

    def _check_workers(self, here: dict[str, str | int]) -> None:
        """All workers must compute as the server expects, or bits would depend on who did what."""
        for worker in self._workers:
            there = ray.get(worker.numeric.remote())
            if there != here:
                raise RunFailed(f"a Ray worker computes differently: {there}", where="engine", allowed=str(here))


def cut(jobs: tuple[Job, ...], pieces: int) -> list[Piece]:
    """Consecutive runs of a power of two, aligned, so that each comes back as one partial sum."""
    size = 1
    while size * pieces < len(jobs):
        size *= 2
    return [Piece(jobs[start : start + size]) for start in range(0, len(jobs), size)]
