"""Watching over the Ray that was started here. Left alone, Ray ends this process 16 to 61 s after its head died,
without a word that a person could use.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator, Mapping

import psutil

from fedcil.errors import RunFailed
from fedcil.port import StopSignal

HEAD = ("raylet", "gcs_server")
LOOK_S = 0.5
PATIENCE_S = 15.0


@contextlib.contextmanager
def watched(stop: StopSignal) -> Iterator[None]:
    """Within, the death of Ray's head ends the run with a message, through the signal that engines look at."""
    head = {child.name(): child for child in psutil.Process().children(recursive=True) if child.name() in HEAD}
    over = threading.Event()
    watch = threading.Thread(target=_watch, args=(head, stop, over), name="ray head", daemon=True)
    watch.start()
    try:
        yield
    finally:
        over.set()
        watch.join()


def _watch(head: Mapping[str, psutil.Process], stop: StopSignal, over: threading.Event) -> None:
    while not over.wait(LOOK_S):
        dead = [name for name, process in head.items() if not alive(process)]
        if dead:
            problem = RunFailed(
                "Ray died: its " + " and ".join(sorted(dead)) + " ended",
                where="engine",
                next="look for a lack of memory (`dmesg`), then `fedcil resume RUN`",
            )
            end_children()
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


def end_children() -> None:
    """What is left of a Ray without a head: it would hang about, and so would calls that wait for it."""
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            child.kill()
