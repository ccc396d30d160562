"""Ray itself: started here with room for a run's workers, or attached to; what was started is ended."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
from collections.abc import Iterator

import psutil
import ray

from fedcil.engines import ray_head
from fedcil.engines.gpu import even, gpus_per_worker
from fedcil.engines.ray_room import refuse_too_little
from fedcil.engines.signals import ENDS, kept_from_children
from fedcil.engines.workers import WorkerShare
from fedcil.errors import RunFailed
from fedcil.experiment import Experiment
from fedcil.methods.base import Phase
from fedcil.port import StopSignal
from fedcil.stream import Task
from fedcil.tensors import Tensors, count_bytes

DIRECT_BYTES = 8 << 20  # answers up to this size come in the message itself: a fifth less CPU with models of 1 MB
ANSWER_S = 10.0  # for somebody at an address to answer
END_S = 5.0  # for who was killed to be gone
NICENESS = 0  # of workers, above this process's own; Ray's 15 leaves them 2 % of a core that somebody else uses, too
STORE_BYTES = 128 << 20  # of the object store, beside models and payloads


def share_of_worker(experiment: Experiment, workers: int) -> WorkerShare:
    return WorkerShare(experiment.scenario.training.threads, even(gpus_per_worker(experiment, workers)))


def store_bytes(experiment: Experiment, workers: int) -> int:
    """An object store for two rounds' models, two tasks' payloads, and what workers may have on the way."""
    model, task = experiment.first_state().server.model, experiment.stream.tasks[0]
    payload: int = experiment.scenario.method.payload_bytes(model, experiment.compute)
    way = max(_answer_bytes(experiment, phase, task, model, workers) for phase in experiment.phases(task))
    return STORE_BYTES + 2 * (count_bytes(model) + payload) + way


def _answer_bytes(experiment: Experiment, phase: Phase, task: Task, model: Tensors, workers: int) -> int:
    """Of partial sums, or for a robust fold of a whole round's models, which stay until it is over."""
    clients = experiment.scenario.clients
    cohort = clients.count if phase.who == "all" else clients.per_round
    sums = 2 * max(1, cohort).bit_length()  # partial sums that one answer can hold
    robust = experiment.scenario.server.fold != "mean" and phase.sends_model
    return (2 * cohort if robust else workers * sums) * count_bytes(experiment.sent(phase, task, model))


@contextlib.contextmanager
def cluster(
    stop: StopSignal,
    address: str | None,
    workers: int,
    least: int,
    share: WorkerShare,
    store_memory: int | None = None,
) -> Iterator[None]:
    """Ray, started here (with an object store of ``store_memory`` bytes) or attached to; what was started is ended.
    ScenarioError if ``least`` workers with ``share`` each do not fit, Stopped, or RunFailed if there is no Ray.
    """
    others, leaving, foreign = ray_head.children(), threading.Event(), ray.is_initialized()
    try:
        if address:
            attach(stop, address)
        else:
            start(stop, workers * share.cpus, store_memory, leaving)
    except BaseException:
        if not foreign:  # nothing stays of one that could not start, or was not to
            ray.shutdown()
            if not address:
                ray_head.end_children(others)
        raise
    with ray_head.last_words([] if address else ray_head.family()) as mouth:
        try:
            refuse_too_little(least, share)
            with contextlib.nullcontext() if address else ray_head.watched(stop, {mouth.pid, *others}, leaving):
                yield
        finally:
            ray.shutdown()


def attach(stop: StopSignal, address: str) -> None:
    """RunFailed if nobody is there, or another Ray or Python."""
    try:
        refuse_nobody(address)
        with own_signals(stop):
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise RunFailed(
            f"no Ray cluster that can be used: {error}",
            where=f"engine.address = {address!r}",
            next="start one with this Python's `ray start --head`, or leave engine.address out",
        ) from None


def start(stop: StopSignal, cpus: int, store_memory: int | None, leaving: threading.Event) -> None:
    """``leaving`` is set when Ray begins to end."""
    with kept_from_children(), own_signals(stop):  # what comes meanwhile is heard when handlers are what they were
        ray.init(
            address="local",  # not somebody's cluster that happens to run on this machine
            num_cpus=cpus,
            object_store_memory=store_memory,
            _system_config={"max_direct_call_object_size": DIRECT_BYTES, "worker_niceness": NICENESS},
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
        )
        killed_at_shutdown(leaving)


@contextlib.contextmanager
def own_signals(stop: StopSignal) -> Iterator[None]:
    """Ray takes signals for itself as it starts; they stay with whoever had them, and so does a SIGTERM that comes
    meanwhile: Stopped, or whatever he makes of it, else Ray's SystemExit. Ray's C++ would abort the process three
    seconds after one, by an alarm.
    """
    in_main = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in (*ENDS, signal.SIGALRM) if in_main}
    alarmed, answer = signal.getitimer(signal.ITIMER_REAL)[0], None
    try:
        yield
    except SystemExit as end:
        if end.code != signal.SIGTERM:  # not Ray's answer to it
            raise
        answer = end
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if not alarmed:
            signal.alarm(0)
    if answer:
        signal.raise_signal(signal.SIGTERM)
        stop.check()
        raise answer


def killed_at_shutdown(leaving: threading.Event) -> None:
    """``ray.shutdown``, which Flower calls, too, would ask what Ray has started to end, by a signal that is kept from
    it, and wait a second for each. Now it kills it.
    """
    node = ray._private.worker._global_node
    heads, end_all = ray_head.heads(), node.kill_all_processes

    def end(**_: object) -> None:
        leaving.set()
        ray_head.kill(ray_head.tree(heads))
        end_all(check_alive=False)
        psutil.wait_procs(heads, timeout=END_S)

    node.kill_all_processes = end


def refuse_nobody(address: str) -> None:
    """ConnectionError if nobody listens at ``host:port``, which Ray would try to reach for many minutes."""
    host, _, port = address.rpartition(":")
    if "/" in host or not port.isdecimal():  # ``auto``, ``ray://...``: Ray is quick about these
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), ANSWER_S).close()
    except (OSError, OverflowError) as error:  # the second: a port above 65535
        raise ConnectionError(f"nobody answers at {address}: {error}") from None
