"""Watching over the Ray that was started here. Left alone, Ray ends this process 16 to 61 s after its head died,
without a word that a person could use. Of a cluster that was attached to only the last words are ours.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set

import psutil

from fedcil.engines.signals import kept_from_children
from fedcil.errors import RunFailed
from fedcil.port import StopSignal

HEAD = ("raylet", "gcs_server")
LOOK_S = 0.5
PATIENCE_S = 15.0
LAST = """this process was ended from outside: killed, or by Ray, whose head died
  next: look for a lack of memory (dmesg), then `fedcil resume RUN`"""


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}


def family() -> list[int]:
    """Ray's head and its agents, which outlive it by many seconds. Not its workers: they end with it, and one that ends
    earlier leaves its id to somebody else.
    """
    return [process.pid for process in tree(heads()) if not is_worker(process)]


def heads() -> list[psutil.Process]:
    return [child for child in psutil.Process().children(recursive=True) if is_head(child)]


def is_head(process: psutil.Process) -> bool:
    try:
        return process.name() in HEAD
    except psutil.Error:  # it has ended
        return False


def tree(heads: Sequence[psutil.Process]) -> list[psutil.Process]:
    """They and all that they have started; nothing of one that has ended."""
    found = list(heads)
    for head in heads:
        with contextlib.suppress(psutil.Error):
            found += head.children(recursive=True)
    return found


def is_worker(process: psutil.Process) -> bool:
    """By its title, ``ray::IDLE`` or ``ray::ClientWorker.run``, or the program that has none yet; agents have one, too:
    ``ray::RuntimeEnvAgent``.
    """
    try:
        command = " ".join(process.cmdline())
    except psutil.Error:  # it has ended
        return True
    return "default_worker.py" in command or (command.startswith("ray::") and "Agent" not in command)


@contextlib.contextmanager
def last_words(heirs: Sequence[int] = ()) -> Iterator[subprocess.Popen[bytes]]:
    """``LAST`` on stderr, and an end to the processes ``heirs``, if this process ends within, without a word: Ray exits
    from C++ if it is being asked for something just as its head dies. A shell waits at the other end of a pipe that
    closes when this process ends.
    """
    ending = 'read -r over || { kill -KILL "$@" 2>/dev/null; echo "error: $0" >&2; }'
    command = ["sh", "-c", ending, LAST, *map(str, heirs)]
    with kept_from_children():
        shell = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    with shell:
        try:
            yield shell
        finally:
            with contextlib.suppress(OSError):
                os.write(shell.stdin.fileno(), b"over\n")  # type: ignore[union-attr]


@contextlib.contextmanager
def watched(stop: StopSignal, spared: Set[int], leaving: threading.Event) -> Iterator[None]:
    """Within, the death of Ray's head ends the run with a message, through the signal that engines look at, unless this
    process is ``leaving`` Ray. ``spared``: children that are not Ray's.
    """
    head = {process.name(): process for process in heads()}
    over = threading.Event()
    thread = threading.Thread(target=_watch, args=(head, spared, stop, over, leaving), name="ray head", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _watch(
    head: Mapping[str, psutil.Process],
    spared: Set[int],
    stop: StopSignal,
    over: threading.Event,
    leaving: threading.Event,
) -> None:
    while not over.wait(LOOK_S):
        dead = [name for name, process in head.items() if not alive(process)]
        if dead and leaving.is_set():
            return
        if dead:
            problem = RunFailed(
                "Ray died: its " + " and ".join(sorted(dead)) + " ended",
                where="engine",
                next="look for a lack of memory (`dmesg`), then `fedcil resume RUN`",
            )
            end_children(spared)
            stop.fail(problem)
            if not over.wait(PATIENCE_S):  # the run hangs in a call to who is not there any more
                print(f"error: {problem}", file=sys.stderr, flush=True)
                os._exit(problem.exit_code)  # as safe as a kill: the last checkpoint is whole
            return


def alive(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def end_children(spared: Set[int]) -> None:
    """What is left of a Ray without a head: it would hang about, and so would calls that wait for it."""
    kill(child for child in psutil.Process().children(recursive=True) if child.pid not in spared)


def kill(processes: Iterable[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):  # it has ended
            process.kill()
