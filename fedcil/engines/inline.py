"""Clients as calls in this process: the reference, for laptops, one GPU and tests.

On a CPU ``engine.workers`` threads train clients side by side, each with its own networks; where these are small and a
run is long, all threads but one hand their work to a process of their own (``forks.py``, on Linux). A round's result
depends on none of it.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any

from client.handle import handle
from client.states import StateStore
from client.worker import Shared, Worker
from fedcil.engines import Setting
from fedcil.engines.costs import Costs
from fedcil.engines.forks import Fork, Forks
from fedcil.engines.loaded_files import LoadedFiles
from fedcil.engines.workers import in_processes, may_use_processes, worker_count
from fedcil.gather import Gathered, cut
from fedcil.messages import Outcome, Reply, Request
from fedcil.port import ClientDone, Port, StopSignal, remaining
from fedcil.tensors import count_bytes
from fedcil.threads import Threads

LEAST_RUN_S = 2e-3  # seconds of work that are worth waking a thread
PAY_AFTER_S = 10.0  # seconds of clients' work: then a run is long enough for the 2 that it takes to start processes
START_S = 60.0  # how long to wait for processes that were asked for
LOOK_S = 0.05  # how often to look for them, and whether the run is to stop
GIVE_UP_S = 2.0  # how long a client may take to its next step, where it sees that nobody waits for it any more
SWITCH_S = 1e-3  # how long a thread may keep Python's lock while another waits: a twentieth less for small networks


def serve(setting: Setting, loop: Callable[[Port], None]) -> None:
    port = InlinePort(setting)
    try:
        loop(port)
    finally:
        port.close()


class Work:
    """A round as its workers see it: they take runs of jobs until there are none, and hand in replies."""

    def __init__(self, runs: list[Request], stop: StopSignal) -> None:
        self._runs, self._stop = deque(runs), stop
        self._over = threading.Event()
        self.replies: SimpleQueue[Reply | BaseException] = SimpleQueue()

    def next(self) -> Request | None:
        with contextlib.suppress(IndexError):
            return self._runs.popleft()
        return None

    def give_back(self, run: Request) -> None:
        self._runs.appendleft(run)

    def end(self) -> list[Request]:
        """Nobody waits any more for what has not come. Returns what was not begun."""
        left = list(self._runs)
        self._runs.clear()
        self._over.set()
        return left

    def check(self) -> None:
        self._stop.check()
        if self._over.is_set():
            raise Abandoned


class InlinePort:
    """The port over threads of this process, and over processes where those do better."""

    def __init__(self, setting: Setting) -> None:
        scenario = setting.experiment.scenario
        self._setting = setting
        self._shared = Shared(setting.experiment, StateStore(setting.states))
        self._costs = Costs()
        self._idle: list[Worker] = []  # the last one used is the next
        self._at_once, self._lanes = setting.experiment.execution.at_once, setting.experiment.execution.lanes
        self._workers = worker_count(setting.experiment)
        self._threads = Threads(self._workers)
        self._at_work: set[int] = set()  # the clients
        self._forks: Forks | None = None
        self._ready: list[Fork] = []
        self._asked = bool(scenario.engine.processes)
        # None, too, once it is settled whether there are processes
        self._loaded = LoadedFiles() if may_use_processes(scenario, self._workers) else None
        self._wait_until = 0.0
        self._worked_s = 0.0
        self._switch_before = sys.getswitchinterval()
        if self._workers > 1:
            sys.setswitchinterval(SWITCH_S)

    def reachable(self) -> None:
        """All of them."""

    def run(self, request: Request, deadline_s: float | None, done: ClientDone) -> Outcome:
        """As they come; what is late is not waited for, and its thread gives up at its next step."""
        gathered = Gathered(request, done)
        runs = self._cut(request) if deadline_s is None else self._each_by_itself(request, gathered)
        work, started = Work(runs, self._setting.stop), time.monotonic()
        try:
            self._begin(work, self._processes(request))
            for _ in runs:
                reply = self._next(work, deadline_s, started)
                self._learn(reply)
                gathered.add(reply)
        except Empty:
            pass
        finally:
            never_begun = {job.client for run in work.end() for job in run.jobs}
        self._costs.missed(set(gathered.open_clients) - never_begun)
        return gathered.outcome()

    def close(self) -> None:
        try:
            self._threads.end(GIVE_UP_S)
        finally:
            if self._forks:
                self._forks.close()
            for worker in self._idle:  # a kept exception, as in a notebook, may hold this port
                worker.drop_lanes()
            self._idle.clear()
            sys.setswitchinterval(self._switch_before)

    def _cut(self, request: Request) -> list[Request]:
        if self._lanes and self._workers == 1:  # filled best by all jobs at once
            return cut(request, 1, len(request.jobs))
        return cut(request, self._workers, max(self._at_once, self._costs.jobs_worth(LEAST_RUN_S, request.jobs)))

    def _each_by_itself(self, request: Request, gathered: Gathered) -> list[Request]:
        """For a round with a deadline: last who may hold a worker until then again; not those who hang since an
        earlier one, and whose threads others have replaced. Not on a GPU: a step must not be captured while another
        thread is at work there.
        """
        if not self._threads.wait(GIVE_UP_S) and self._shared.device.type != "cuda":
            self._threads.end(0.0)
            self._threads = Threads(self._workers)
        hanging = self._at_work & set(gathered.open_clients)
        for client in hanging:
            gathered.fail(client, "deadline", "still in a step of an earlier round")
        if hanging:
            some = ", ".join(map(str, sorted(hanging)))
            warnings.warn(f"not asked while they hang in a step of an earlier round: clients {some}", stacklevel=1)
        runs = [run for run in cut(request, len(request.jobs)) if run.jobs[0].client not in hanging]
        return sorted(runs, key=lambda run: self._costs.harmful(run.jobs))

    def _next(self, work: Work, deadline_s: float | None, started: float) -> Reply:
        """The next reply. Raises Empty at the deadline, what a worker raised, and what ``stop`` says if one hangs."""
        while True:
            left, stopping = remaining(deadline_s, started), self._setting.stop.asked
            patience = GIVE_UP_S if stopping else LOOK_S
            try:
                reply = work.replies.get(timeout=patience if left is None else min(left, patience))
            except Empty:
                if left == 0.0:
                    raise
                if stopping:
                    self._setting.stop.check()
                continue
            if isinstance(reply, BaseException):
                raise reply
            return reply

    def _learn(self, reply: Reply) -> None:
        self._costs.learn(reply.reports)
        self._worked_s += sum(report.seconds for report in reply.reports)

    def _processes(self, request: Request) -> list[Fork]:
        """Those that are ready. They are started once, when the run has turned out to be a long one, or at once where
        the scenario asks for them. One worker stays a thread of this process: with nobody beside it, it need not wait.
        """
        if self._loaded and (self._asked or self._worked_s > PAY_AFTER_S):
            loaded, self._loaded = self._loaded, None
            if in_processes(self._setting.experiment.scenario, self._workers, count_bytes(request.broadcast.tensors)):
                self._wait_until = time.monotonic() + START_S if self._asked else 0.0
                try:
                    self._forks = Forks(self._setting, self._workers - 1, loaded)
                except OSError as error:
                    warnings.warn(f"no worker processes, threads train the clients: {error}", stacklevel=1)
        if self._forks:
            self._ready += self._forks.newcomers()
            while self._forks.starting and time.monotonic() < self._wait_until:
                self._setting.stop.check()
                time.sleep(LOOK_S)
                self._ready += self._forks.newcomers()
        return list(self._ready)  # one that dies in this round leaves the other list meanwhile

    def _begin(self, work: Work, processes: list[Fork]) -> None:
        """Processes have their first runs before a thread trains here, and makes others wait for Python's lock."""
        busy = 0
        for fork in processes:
            run = work.next()
            if run:
                fork.ask(run)
                self._threads.do(partial(self._guarded, self._train_there, work, fork, run))
                busy += 1
        for _ in range(self._workers - busy):
            self._threads.do(partial(self._guarded, self._train_here, work))

    def _guarded(self, train: Callable[..., None], work: Work, *there: Any) -> None:
        """Whatever ends a worker is raised where its replies are waited for."""
        try:
            train(work, *there)
        except BaseException as error:
            work.replies.put(error)

    def _train_here(self, work: Work) -> None:
        worker = self._idle.pop() if self._idle else Worker(self._shared, work.check)
        worker.check = work.check
        try:
            while run := work.next():
                with self._noted(run):
                    reply = handle(run, worker)
                work.replies.put(reply)
        finally:
            self._idle.append(worker)

    @contextlib.contextmanager
    def _noted(self, run: Request) -> Iterator[None]:
        """Its clients are at work meanwhile."""
        clients = {job.client for job in run.jobs}
        self._at_work |= clients
        try:
            yield
        finally:
            self._at_work -= clients

    def _train_there(self, work: Work, fork: Fork, run: Request | None) -> None:
        """``run`` is what the process has been asked for. It is asked for the next before its reply is handed in."""
        while run:
            try:
                reply = fork.answer(work.check)
            except (EOFError, OSError):
                self._ready.remove(fork)
                left = f"{len(self._ready)} left"  # a warning in the same words would be shown once
                warnings.warn(f"a worker process has died ({left}): a thread trains its clients instead", stacklevel=1)
                work.give_back(run)
                return self._train_here(work)
            run = work.next()
            if run:
                fork.ask(run)
            work.replies.put(reply)
        return None


class Abandoned(BaseException):
    """Ends a client whose round is over; nobody waits for what it would have said."""
