"""What says that a run shall end is for the run alone: what it starts ends when it does."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def kept_from_children() -> Iterator[None]:
    """Processes started within, by this thread, do not hear that the run shall end. Terminals and batch systems tell
    every process of it, and the run needs them until it has stopped. A blocked signal stays so in what is started.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
