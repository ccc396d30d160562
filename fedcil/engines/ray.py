"""Clients in Ray actors: many processes, many GPUs, one machine or a cluster.

Each actor is one worker that lives as long as the run. The broadcast is put into the object store once a
round and the payload once a task; actors read them without a copy and answer with partial sums.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.exceptions import RayActorError, RayError

from client.handle import Shared, Worker, handle
from client.states import StateStore
from fedcil.engines import Setting
from fedcil.engines.workers import worker_count
from fedcil.errors import RunFailed, ScenarioError
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
    with cluster(engine.address, workers, engine.gpus_per_worker):
        port = RayPort(setting, workers)
        try:
            return loop(port)
        finally:
            port.close()


@contextlib.contextmanager
def cluster(address: str | None, workers: int, gpus_per_worker: float) -> Iterator[None]:
    """Ray, started here or attached to; what was started is ended. Signals stay with whoever had them."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        if address:
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        else:
            ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    except ConnectionError as error:
        raise RunFailed(
            f"no Ray cluster: {error}",
            where=f"engine.address = {address!r}",
            next="start one with `ray start --head`, or leave engine.address out",
        ) from None
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():
            signal.signal(number, handler)
    try:
        refuse_too_little(workers, gpus_per_worker)
        yield
    finally:
        ray.shutdown()


def refuse_too_little(workers: int, gpus_per_worker: float) -> None:
    """Ray would wait for ever for a CPU or GPU that it does not have."""
    here = ray.cluster_resources()
    cpus, gpus = here.get("CPU", 0.0), here.get("GPU", 0.0)
    if workers > cpus or workers * gpus_per_worker > gpus:
        raise ScenarioError(
            f"{workers} workers with {gpus_per_worker:g} GPUs each do not fit into {cpus:g} CPUs and {gpus:g} GPUs",
            where="engine.workers, engine.gpus_per_worker",
            allowed="one CPU a worker, and no more GPUs than Ray has",
            next="lower engine.workers or engine.gpus_per_worker",
        )


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
        self._asleep: list[Any] = []  # workers that are being restarted
        self._check_workers(experiment.numeric())

    def reachable(self) -> frozenset[int]:
        return self._clients

    def run(self, request: Request, deadline_s: float | None, done: ClientDone) -> Outcome:
        gathered, started = Gathered(request, done), time.monotonic()
        broadcast = ray.put(replace(request.broadcast, payload=None))
        payload = self._put_payload(request.broadcast.payload)
        todo = cut(request.jobs, len(self._workers) * PIECES)
        idle = [worker for worker in self._workers if worker not in self._asleep]
        busy: dict[Any, tuple[Any, Piece | None]] = {}
        while (todo or any(piece for _, piece in busy.values())) and remaining(deadline_s, started) != 0.0:
            self._stop.check()
            busy |= {worker.numeric.remote(): (worker, None) for worker in self._asleep}
            self._asleep.clear()
            while todo and idle:
                piece, worker = todo.pop(0), idle.pop(0)
                busy[worker.run.remote(broadcast, payload, piece.jobs, request.cohort)] = (worker, piece)
            ready, _ = ray.wait(list(busy), num_returns=1, timeout=LOOK_S)
            for reference in ready:
                worker, given = busy.pop(reference)
                todo += self._collect(reference, worker, given, gathered, idle)
        self._restart([worker for worker, piece in busy.values() if piece])
        self._asleep += [worker for worker, piece in busy.values() if not piece]
        return gathered.outcome()

    def close(self) -> None:
        for worker in self._workers:
            ray.kill(worker)

    def _collect(
        self, reference: Any, worker: Any, piece: Piece | None, gathered: Gathered, idle: list[Any]
    ) -> list[Piece]:
        """Take in what a worker gave; returns what must be tried again because it died.

        A worker that died is asked for a sign of life (``piece`` None) before it gets work again.
        """
        try:
            answer = ray.get(reference)
        except RayActorError:
            self._asleep.append(worker)
            time.sleep(LOOK_S)  # it is being restarted; asking it without a pause would spin
            return self._again(piece, gathered) if piece else []
        except RayError as error:
            idle.append(worker)
            for job in piece.jobs if piece else ():
                gathered.fail(job.client, "worker", str(getattr(error, "cause", error)))
            return []
        idle.append(worker)
        if piece:
            gathered.add(answer)
        return []

    def _again(self, piece: Piece, gathered: Gathered) -> list[Piece]:
        if piece.attempts + 1 < ATTEMPTS:
            return [Piece(piece.jobs, piece.attempts + 1)]
        for job in piece.jobs:
            gathered.fail(job.client, "worker", f"its worker died {ATTEMPTS} times")
        return []

    def _put_payload(self, payload: Payload | None) -> tuple[str, list[Any]] | None:
        """Once per task; the reference travels inside a list, so that it is not resolved on the way."""
        if payload is None:
            self._payload = None
        elif self._payload is None or self._payload[0] != payload.hash:
            self._payload = (payload.hash, [ray.put(dict(payload.tensors))])
        return self._payload

    def _restart(self, late: list[Any]) -> None:
        """A worker that missed the deadline is restarted rather than waited for."""
        for worker in late:
            ray.kill(worker, no_restart=False)
        self._asleep += late

    def _check_workers(self, here: dict[str, str | int]) -> None:
        """All workers must compute as the server expects, or bits would depend on who did what."""
        answers = [worker.numeric.remote() for worker in self._workers]
        waiting = answers
        while waiting:
            self._stop.check()
            _, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=LOOK_S)
        for answer in answers:
            try:
                there = ray.get(answer)
            except RayError as error:
                raise RunFailed(
                    f"a Ray worker could not start: {getattr(error, 'cause', error)}",
                    where="engine",
                    next="check that each node has the same fedcil and the data under the same path",
                ) from None
            if there != here:
                raise RunFailed(f"a Ray worker computes differently: {there}", where="engine", allowed=str(here))


def cut(jobs: tuple[Job, ...], pieces: int) -> list[Piece]:
    """Consecutive runs of a power of two, aligned, so that each comes back as one partial sum."""
    size = 1
    while size * pieces < len(jobs):
        size *= 2
    return [Piece(jobs[start : start + size]) for start in range(0, len(jobs), size)]
