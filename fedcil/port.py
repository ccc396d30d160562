"""The port: the three functions through which the round loop reaches clients, wherever they are."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from fedcil.errors import FedcilError, Stopped

if TYPE_CHECKING:
    from fedcil.messages import Outcome, Request

ClientDone = Callable[[int], None]
"""Called with a client's id when its answer is in; for progress only."""


class Port(Protocol):
    """An engine, as the round loop sees it."""

    def reachable(self) -> frozenset[int] | None:
        """The clients that could be asked now; None: all of them."""
        ...

    def run(self, request: Request, deadline_s: float | None, done: ClientDone) -> Outcome:
        """Ask the clients of ``request`` and wait for the answers, at most ``deadline_s`` seconds.

        A client that does not answer in time, or that breaks, is a Failure in the outcome. Raises Stopped, RunFailed
        if the round cannot go on, and TooFewClients if nobody can be reached.
        """
        ...

    def close(self) -> None:
        """End everything that the engine started."""
        ...


@dataclass(slots=True)
class StopSignal:
    """Set by Ctrl-C, SIGTERM or a time limit; looked at between steps, so that nothing is cut in two.

    An engine that lost what it works with sets a problem instead, to be raised in the same places.
    """

    event: threading.Event = field(default_factory=threading.Event)
    exit_code: list[int] = field(default_factory=list)
    problem: list[FedcilError] = field(default_factory=list)

    def set(self, exit_code: int) -> None:
        """Ask for the end; the command ends with the first code that was given."""
        self.exit_code.append(exit_code)
        self.event.set()

    def fail(self, problem: FedcilError) -> None:
        """End with this error instead."""
        self.problem.append(problem)

    @property
    def asked(self) -> bool:
        """Whether ``check`` would raise."""
        return bool(self.problem) or self.event.is_set()

    def check(self) -> None:
        """Raise Stopped if somebody asked for it, or the problem that there is."""
        if self.problem:
            raise self.problem[0]
        if self.event.is_set():
            raise Stopped(self.exit_code[0])


def remaining(deadline_s: float | None, started: float) -> float | None:
    """Seconds left of a deadline, never below 0; None where there is none."""
    return None if deadline_s is None else max(0.0, deadline_s - (time.monotonic() - started))
