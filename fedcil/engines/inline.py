"""Clients as calls in this process: the reference, for laptops, one GPU and tests.

On a CPU ``engine.workers`` threads train clients side by side, each with its own networks; a round's result does not
depend on how many there are.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from concurrent.futures import TimeoutError as FuturesTimeout
from typing import TypeVar

from client.handle import Shared, Worker, handle
from client.states import StateStore
from fedcil.engines import Setting
from fedcil.engines.costs import Costs
from fedcil.engines.workers import worker_count
from fedcil.gather import Gathered, cut
from fedcil.messages import Outcome, Reply, Request
from fedcil.port import ClientDone, Port

T = TypeVar("T")
LEAST_RUN_S = 2e-3  # seconds of work that are worth waking a thread
SWITCH_S = 1e-3  # how long a thread may keep Python's lock while another waits: a twentieth less for small networks


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
        self._stop = setting.stop
        self._costs = Costs()
        self._local = threading.local()
        self._at_once, self._lanes = setting.experiment.execution.at_once, setting.experiment.execution.lanes
        self._workers = worker_count(setting.experiment)
        self._threads = ThreadPoolExecutor(self._workers, thread_name_prefix="client")
        self._switch_before = sys.getswitchinterval()
        if self._workers > 1:
            sys.setswitchinterval(SWITCH_S)

    def reachable(self) -> frozenset[int]:
        return self._clients

    def run(self, request: Request, deadline_s: float | None, done: ClientDone) -> Outcome:
        """As they come; what is late is not waited for, and its thread gives up at its next step."""
        gathered, abandoned = Gathered(request, done), threading.Event()
        count = len(request.jobs)
        if deadline_s is not None:  # each client stands for itself: who is late takes no other answer along
            runs = cut(request, count)
        elif self._lanes and self._workers == 1:  # filled best by all jobs at once
            runs = cut(request, self._workers, count)
        else:
            least = self._costs.jobs_worth(LEAST_RUN_S, request.jobs)
            runs = cut(request, self._workers, max(self._at_once, least))
        futures = [self._threads.submit(self._handle, run, abandoned) for run in runs]
        try:
            for future in as_completed(futures, deadline_s):
                reply = future.result()
                self._costs.learn(reply.reports)
                gathered.add(reply)
        except FuturesTimeout:
            pass
        finally:
            abandoned.set()
            for future in futures:
                future.cancel()
        return gathered.outcome()

    def close(self) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)
        sys.setswitchinterval(self._switch_before)

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
