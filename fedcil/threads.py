"""Threads that train clients, and that can be left behind: a client that hangs keeps its thread, and not the run."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")
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
        idle = False
        try:
            idle = self.wait(patience_s)
        finally:
            for thread in self._threads:
                self._calls.put(None)
                if not idle:
                    thread.name = LEFT
        for thread in self._threads if idle else ():
            thread.join()

    def _work(self) -> None:
        while call := self._calls.get():
            call()
            with self._ended:
                self._open -= 1
                self._ended.notify_all()


class Turn:
    """A lock for what a process has once, and for how it was before. Nobody waits for a holder that was left behind."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._holder: threading.Thread | None = None
        self._passed_over = 0  # holders that were left behind and are still inside
        self._before: Any = None

    @contextmanager
    def taken(self, save: Callable[[], T], restore: Callable[[T], None]) -> Iterator[bool]:
        """What ``save`` gives is restored afterwards. Gives whether nobody else is inside; one that was left behind may
        come back. RuntimeError in a thread that was left behind itself.
        """
        me = threading.current_thread()
        with self._changed:
            while self._holder is not None and LEFT not in (self._holder.name, me.name):
                self._changed.wait(LOOK_S)
            if me.name == LEFT:
                raise RuntimeError("this thread was left behind")
            self._passed_over += self._holder is not None
            self._holder, alone = me, not self._passed_over
            self._before = save() if alone else self._before
        try:
            yield alone
        finally:
            with self._changed:
                if self._holder is me:
                    restore(self._before)
                    self._holder = None
                    self._changed.notify()
                else:
                    self._passed_over -= 1


def left_behind() -> bool:
    """Whether a thread of this process hangs in a client's work."""
    return any(thread.name == LEFT for thread in threading.enumerate())
