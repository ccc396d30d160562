"""Threads that train clients, and that can be left behind: a client that hangs keeps its thread, and nothing else."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue

LEFT = "left behind"  # the name of a thread that hangs
LOOK_S = 0.2  # how often to look whether who has the turn is one


class Threads:
    """``count`` threads that do calls, first come, first served. No call may raise.

    Not a pool of the standard library's, whose threads a program waits for before it ends. These are daemons.
    """

    def __init__(self, count: int) -> None:
        self._calls: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._open = 0  # calls that are waiting or at work
        self._ended = threading.Condition()
        names = [f"client_{number}" for number in range(count)]
        self._threads = [threading.Thread(target=self._work, name=name, daemon=True) for name in names]
        for thread in self._threads:
            thread.start()

    def do(self, call: Callable[[], object]) -> None:
        with self._ended:
            self._open += 1
        self._calls.put(call)

    def wait(self, seconds: float) -> bool:
        """Until every call has ended; False if one has not after so many seconds."""
        with self._ended:
            return self._ended.wait_for(lambda: not self._open, seconds)

    def end(self, patience_s: float) -> None:
        """Who is still at a call after so many seconds is left behind, and ends after it, if ever."""
        idle = self.wait(patience_s)
        for _ in self._threads:
            self._calls.put(None)
        for thread in self._threads:
            if idle:
                thread.join()
            else:
                thread.name = LEFT

    def _work(self) -> None:
        while call := self._calls.get():
            call()
            with self._ended:
                self._open -= 1
                self._ended.notify_all()


class Turn:
    """A lock for what a process has once. Nobody waits for a holder that was left behind."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._holder: threading.Thread | None = None

    @contextmanager
    def taken(self) -> Iterator[Callable[[], bool]]:
        """Gives a function that says whether it is still this thread's turn: somebody else's if it was left behind."""
        me = threading.current_thread()
        with self._changed:
            while self._holder is not None and self._holder.name != LEFT:
                self._changed.wait(LOOK_S)
            self._holder = me
        try:
            yield lambda: self._holder is me
        finally:
            with self._changed:
                if self._holder is me:
                    self._holder = None
                    self._changed.notify()


def left_behind() -> bool:
    """Whether a thread of this process hangs in a client's work."""
    return any(thread.name == LEFT for thread in threading.enumerate())
