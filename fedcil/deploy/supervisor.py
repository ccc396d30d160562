"""The role that sees a run to its end: submit, watch, and submit again with resume when the server died.

Flower marks a run as failed when its SuperLink or its server app dies, and never resumes it. The run folder has a
checkpoint of every round, so what is submitted again goes on where it was.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from fedcil.deploy.control import UNKNOWN, Control, ControlFailed
from fedcil.errors import RunFailed, Stopped, rebuilt
from fedcil.files import write_atomic
from fedcil.port import StopSignal
from fedcil.record.folder import METRICS, PROBLEM, SUBMISSION
from fedcil.record.run import Run

POLL_S = 0.5
LOOK_S = 2.0  # between two looks at the run
QUIET_S = 15.0  # a run that wrote nothing for so long is asked about
MOST_ATTEMPTS = 5  # without a new line in metrics.jsonl in between
FINISHED = "finished"
COMPLETED = "finished:completed"


@dataclass(frozen=True, slots=True)
class Attempt:
    """One submission of the run. ``lost``: the SuperLink was away since, so its server app is gone or stale."""

    run: str
    lost: bool = False


class Supervisor:
    """Sees the run in ``folder`` to its end over ``control``."""

    def __init__(self, control: Control, folder: Path, min_clients: int, say: Callable[[str], None]) -> None:
        self._control = control
        self._folder = folder
        self._config: dict[str, str | int] = {"folder": str(folder.absolute()), "min-clients": min_clients}
        self._say = say
        self._attempt = self._earlier_attempt()
        self._refused = ""  # why the last submission was, as it was said
        self._fruitless, self._seen = 0, self._size()
        self._last_size, self._grew = self._seen, -QUIET_S

    def run(self, stop: StopSignal, tend: Callable[[], None], progress: Callable[[], None]) -> Run:
        """Until the run is finished. ``tend`` and ``progress`` are called all the while.

        Raises what ended the run on the server, Stopped, or RunFailed if the server dies again and again.
        """
        (self._folder / PROBLEM).unlink(missing_ok=True)
        next_look = 0.0
        while True:
            tend()
            progress()
            if stop.event.is_set():
                self._stop_attempt()
                raise Stopped(stop.exit_code[0])
            if time.monotonic() >= next_look:
                if self._completed():
                    progress()
                    return self._finished()
                next_look = time.monotonic() + LOOK_S
            time.sleep(POLL_S)

    def _completed(self) -> bool:
        """Whether Flower says so; a run that is not going on is submitted."""
        if not self._control.healthy():
            self._lose()
            return False
        if self._attempt and not self._attempt.lost and self._growing():
            return False  # asking Flower costs a process; what is written says the same
        try:
            status = self._control.status(self._attempt.run) if self._attempt else None
            going_on = status not in (None, UNKNOWN) and not str(status).startswith(FINISHED)
            if status == COMPLETED:
                return True
            if not (going_on and self._attempt and not self._attempt.lost):
                self._refuse_problem()
                self._submit(status, going_on)
        except ControlFailed as error:
            self._lose(error.what)
            if self._attempt is None and error.what != self._refused:
                self._say(f"the run cannot be submitted ({error.what}); trying again")
                self._refused = error.what
        return False

    def _growing(self) -> bool:
        """Whether the run wrote something lately, and is not at its end."""
        size = self._size()
        if size != self._last_size:
            self._last_size, self._grew = size, time.monotonic()
        return time.monotonic() - self._grew < QUIET_S and not Run(self._folder).finished

    def _lose(self, reason: str = "no answer to its health check") -> None:
        if self._attempt and not self._attempt.lost:
            self._say(f"the SuperLink is away ({reason})")
            self._attempt = replace(self._attempt, lost=True)

    def _submit(self, status: str | None, going_on: bool) -> None:
        if self._attempt is not None:
            if going_on:
                self._control.stop(self._attempt.run)
            self._count_attempt()
            self._say(f"the run was cut off ({status}); submitting it again")
            self._attempt = None  # counted once, however often Flower refuses the next one
        self._attempt = Attempt(self._control.submit(self._config))
        write_atomic(self._folder / SUBMISSION, json.dumps({"run": self._attempt.run}).encode())

    def _earlier_attempt(self) -> Attempt | None:
        """What a supervisor before this one submitted; it may be going on."""
        path = self._folder / SUBMISSION
        return Attempt(json.loads(path.read_text())["run"]) if path.exists() else None

    def _size(self) -> int:
        metrics = self._folder / METRICS
        return metrics.stat().st_size if metrics.exists() else 0

    def _count_attempt(self) -> None:
        """RunFailed if attempt after attempt adds no round."""
        size = self._size()
        self._fruitless = self._fruitless + 1 if size <= self._seen else 0
        self._seen = max(size, self._seen)
        if self._fruitless >= MOST_ATTEMPTS:
            raise RunFailed(
                f"the server app ended {self._fruitless + 1} times without finishing a round",
                where=str(self._folder),
                next="read the log of the server app; then go on with `fedcil deploy local RUN`",
            )

    def _refuse_problem(self) -> None:
        """Raise the error that ended the run on the server, if it was one that trying again will not mend."""
        path = self._folder / PROBLEM
        if path.exists():
            raise rebuilt(json.loads(path.read_text()))

    def _stop_attempt(self) -> None:
        if self._attempt is not None:
            try:
                self._control.stop(self._attempt.run)
            except ControlFailed as error:
                self._say(f"the run could not be stopped: {error.what}")

    def _finished(self) -> Run:
        run = Run(self._folder)
        if not run.finished:
            raise RunFailed("Flower says that the run is complete, but it has no summary", where=str(self._folder))
        return run
