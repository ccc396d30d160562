"""What says that a run shall end is for the run alone: what its engine starts ends when it does."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator

ENDS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@contextlib.contextmanager
def kept_from_children() -> Iterator[None]:
    """Processes (and threads) started within, by this thread, do not hear that the run shall end. Terminals and batch
    systems tell every process of it, and the run needs them until it has stopped. A blocked signal stays so in what is
    started.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignored_by_this_process_alone() -> None:
    """In a worker that was started so: what a client's own code starts can be told to end, as programs expect of it."""
    for number in ENDS:
        signal.signal(number, lambda *_: None)  # SIG_IGN would be inherited by programs
    os.register_at_fork(before=_block, after_in_parent=_unblock, after_in_child=_hear)
    _unblock()


def _block() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDS)


def _unblock() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDS)


def _hear() -> None:
    for number in ENDS:
        signal.signal(number, signal.SIG_DFL)
    _unblock()
