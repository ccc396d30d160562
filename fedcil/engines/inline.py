"""Clients as calls in this process: the reference, for laptops, one GPU and tests.

``engine.workers`` threads train clients side by side, each with its own networks; a round's result does not
depend on how many there are.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from concurrent.futures import TimeoutError as FuturesTimeout
from typing import TypeVar

from client.handle import Shared, Worker, handle
from client.states import StateStore
from fedcil.engines import Setting
from fedcil.engines.workers import worker_count
from fedcil.gather import Gathered, one_job_each
from fedcil.messages import Outcome, Reply, Request
from fedcil.port import ClientDone, Port, remaining

T = TypeVar("T")


def serve(setting: Setting, loop: Callable[[Port], T]) -> T:
    port = InlinePort(setting)
    try:
        return loop(port)
    finally:
        port.close()


class InlinePort:
    """The port over threads of this process."""

    def __init__(self, setting: Setting) -> None:
        scenario = setting.experiment.scenario
        self._clients = frozenset(range(scenario.clients.count))
        self._shared = Shared(setting.experiment, StateStore(setting.states))
        self._abandoned = threading.Event()
        self._stop = setting.stop
        self._workers = worker_count(scenario)
        self._local = threading.local()
        self._threads: ThreadPoolExecutor | None = None
        if self._workers > 1:
            self._threads = ThreadPoolExecutor(self._workers, thread_name_prefix="client")

    def reachable(self) -> frozenset[int]:
        return self._clients

    def run(self, request: Request, deadline_s: float | None, done: ClientDone) -> Outcome:
        gathered = Gathered(request, done)
        started = time.monotonic()
        if self._threads is None:
            for single in one_job_each(request):
                if deadline_s is not None and time.monotonic() - started >= deadline_s:
                    break
                gathered.add(handle(single, self._worker()))
        else:
            self._in_threads(request, deadline_s, gathered, started)
        return gathered.outcome()

    def close(self) -> None:
        self._abandoned.set()
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)

    def _in_threads(self, request: Request, deadline_s: float | None, gathered: Gathered, started: float) -> None:
        """As they come; what is late is not waited for, and its thread gives up at its next step."""
        assert self._threads is not None
        self._abandoned = threading.Event()
        futures: list[Future[Reply]] = [
            self._threads.submit(self._handle, single, self._abandoned) for single in one_job_each(request)
        ]
        try:
            for future in as_completed(futures, remaining(deadline_s, started)):
                gathered.add(future.result())
        except FuturesTimeout:
            pass
        finally:
            self._abandoned.set()
            for future in futures:
                future.cancel()

    def _handle(self, request: Request, abandoned: threading.Event) -> Reply:
        worker = self._worker()
        worker.check = lambda: self._check(abandoned)
        return handle(request, worker)

    def _check(self, abandoned: threading.Event) -> None:
        self._stop.check()
        if abandoned.is_set():
            raise Abandoned

    def _worker(self) -> Worker:
        """This thread's worker."""
        if not hasattr(self._local, "worker"):
            self._local.worker = Worker(self._shared, self._stop.check)
        worker: Worker = self._local.worker
        return worker


class Abandoned(BaseException):
    """Ends a client whose round is over; nobody waits for what it would have said."""
