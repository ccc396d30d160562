"""Clients as calls in this process: the reference, for laptops, one GPU and tests.

On a CPU ``engine.workers`` threads train clients side by side, each with its own networks; where these are small, all
threads but one hand their work to a process of their own (``forks.py``). A round's result depends on none of it.
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from concurrent.futures import TimeoutError as FuturesTimeout
from typing import TypeVar

from client.handle import Shared, Worker, handle
from client.states import StateStore
from fedcil.engines import Setting
from fedcil.engines.costs import Costs
from fedcil.engines.forks import Fork, Forks
from fedcil.engines.workers import in_processes, worker_count
from fedcil.gather import Gathered, cut
from fedcil.messages import Outcome, Reply, Request, count_bytes
from fedcil.port import ClientDone, Port

T = TypeVar("T")
LEAST_RUN_S = 2e-3  # seconds of work that are worth waking a thread
PAY_AFTER_S = 10.0  # seconds of clients' work: then a run is long enough for the 2 that it takes to start processes
START_S = 60.0  # how long to wait for processes that were asked for
SWITCH_S = 1e-3  # how long a thread may keep Python's lock while another waits: a twentieth less for small networks


def serve(setting: Setting, loop: Callable[[Port], T]) -> T:
    port = InlinePort(setting)
    try:
        return loop(port)
    finally:
        port.close()


class InlinePort:
    """The port over threads of this process, and over processes where those do better."""

    def __init__(self, setting: Setting) -> None:
        scenario = setting.experiment.scenario
        self._setting = setting
        self._clients = frozenset(range(scenario.clients.count))
        self._shared = Shared(setting.experiment, StateStore(setting.states))
        self._stop = setting.stop
        self._costs = Costs()
        self._local = threading.local()
        self._at_once, self._lanes = setting.experiment.execution.at_once, setting.experiment.execution.lanes
        self._workers = worker_count(setting.experiment)
        self._threads = ThreadPoolExecutor(self._workers, thread_name_prefix="client")
        self._asked = bool(scenario.engine.processes)
        self._settled = False  # whether there are to be processes
        self._forks: Forks | None = None
        self._worked_s = 0.0
        self._switch_before = sys.getswitchinterval()
        if self._workers > 1:
            sys.setswitchinterval(SWITCH_S)

    def reachable(self) -> frozenset[int]:
        return self._clients

    def run(self, request: Request, deadline_s: float | None, done: ClientDone) -> Outcome:
        """As they come; what is late is not waited for, and its thread gives up at its next step."""
        gathered, abandoned = Gathered(request, done), threading.Event()
        self._start_processes(request)
        if deadline_s is None:
            train, runs = self._handle, self._cut(request)
        else:  # who is late takes no other answer along; a thread gives up when it is told, a process is told nothing
            train, runs = self._handle_here, cut(request, len(request.jobs))
        futures = [self._threads.submit(train, run, abandoned) for run in runs]
        try:
            for future in as_completed(futures, deadline_s):
                reply = future.result()
                self._learn(reply)
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
        if self._forks:
            self._forks.close()
        sys.setswitchinterval(self._switch_before)

    def _cut(self, request: Request) -> list[Request]:
        if self._lanes and self._workers == 1:  # filled best by all jobs at once
            return cut(request, 1, len(request.jobs))
        return cut(request, self._workers, max(self._at_once, self._costs.jobs_worth(LEAST_RUN_S, request.jobs)))

    def _learn(self, reply: Reply) -> None:
        self._costs.learn(reply.reports)
        self._worked_s += sum(report.seconds for report in reply.reports)

    def _start_processes(self, request: Request) -> None:
        """Once, when the run has turned out to be a long one, or at once where the scenario asks for them. One worker
        stays a thread of this process: with nobody beside it, it need not wait either.
        """
        if self._settled or not (self._asked or self._worked_s > PAY_AFTER_S):
            return
        self._settled = True
        scenario = self._setting.experiment.scenario
        if not in_processes(scenario, self._workers, count_bytes(request.broadcast.tensors)):
            return
        try:
            self._forks = Forks(self._setting, self._workers - 1)
        except OSError as error:
            warnings.warn(f"no worker processes, threads train the clients: {error}", stacklevel=1)

    def _handle(self, request: Request, abandoned: threading.Event) -> Reply:
        """By this thread's process, if it has one by now."""
        fork = self._fork()
        if fork:
            try:
                return fork.handle(request, lambda: self._check(abandoned))
            except (EOFError, OSError):
                self._local.fork = None
                warnings.warn("a worker process has died: a thread trains its clients from here on", stacklevel=1)
        return self._handle_here(request, abandoned)

    def _handle_here(self, request: Request, abandoned: threading.Event) -> Reply:
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

    def _fork(self) -> Fork | None:
        """This thread's process."""
        fork: Fork | None = getattr(self._local, "fork", None)
        if fork is None and self._forks:
            fork = self._local.fork = self._forks.take(START_S if self._asked else 0.0)
        return fork


class Abandoned(BaseException):
    """Ends a client whose round is over; nobody waits for what it would have said."""
