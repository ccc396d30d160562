"""Errors become messages and exit codes; signals become a checkpoint. Bad input never ends in a traceback."""

from __future__ import annotations

import json as jsonlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from typing import TYPE_CHECKING, ParamSpec

from fedcil.errors import FedcilError, Stopped
from fedcil.neighbours import refuse_intruders

if TYPE_CHECKING:
    from fedcil.port import StopSignal

P = ParamSpec("P")
OUT_OF_TIME = 5  # exit code of a run that --max-seconds ended
PATIENCE_S = 5.0  # for an orderly end after the second Ctrl-C
ECHO_S = 0.3  # `timeout` and batch systems tell a process and its group: a signal so soon after the first says no more


def guarded(command: Callable[P, None]) -> Callable[P, None]:
    """End with the error's exit code, saying on stderr (or as JSON on stdout) what happened."""

    @wraps(command)
    def inner(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            refuse_intruders()
            command(*args, **kwargs)
        except FedcilError as error:
            show_error(error, as_json=bool(kwargs.get("json")))
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            sys.exit(130)
        except Exception as error:
            unforeseen = explained(error)
            show_error(unforeseen, as_json=bool(kwargs.get("json")))
            sys.exit(unforeseen.exit_code)

    return inner


def explained(error: Exception) -> FedcilError:
    """Too little memory is a person's to mend; all else is ours, with the trace."""
    what = f"{type(error).__name__}: {error}"
    no_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if no_memory or "can't allocate memory" in what:  # torch says so of a CPU's in a RuntimeError
        lower = "fewer engine.workers or engine.lanes (a begun run goes on with them: `fedcil resume FOLDER --set ...`)"
        smaller = f"{lower}, or a new run with smaller images, networks or batches"
        return FedcilError(what, allowed="what the machine has; `fedcil plan` says how much a run needs", next=smaller)
    traceback.print_exc()
    return FedcilError(what, next="this is a bug in fedcil or in your own code; the trace above says where")


def show_error(error: FedcilError, *, as_json: bool) -> None:
    if as_json:
        print(jsonlib.dumps({"error": error.as_dict()}))
    name = "stopped" if isinstance(error, Stopped) else "error"
    print(f"{name}: {error}", file=sys.stderr)


def start_timer(seconds: float, function: Callable[[int], object], exit_code: int) -> threading.Timer:
    timer = threading.Timer(seconds, function, (exit_code,))
    timer.daemon = True
    timer.start()
    return timer


@contextmanager
def stoppable(
    max_seconds: float | None, what: str = "stopping after this step, with a checkpoint"
) -> Iterator[StopSignal]:
    """Ctrl-C, SIGTERM, a terminal that goes (but for `nohup`) and a time limit set the signal that a run looks at; a
    second signal ends at once.
    """
    from fedcil.port import StopSignal

    stop = StopSignal()

    def on_signal(number: int, _: object) -> None:
        if number == signal.SIGHUP and stop.event.is_set():  # the shell says so, too
            return
        if first and time.monotonic() - first[0] < ECHO_S:
            return
        if stop.event.is_set():
            # Where a client's step hangs: as safe as a kill, since the last checkpoint is whole.
            timers.append(start_timer(PATIENCE_S, os._exit, 128 + number))
            raise SystemExit(128 + number)
        first.append(time.monotonic())
        stop.set(128 + number)
        with suppress(RuntimeError):  # in the midst of another line
            print(f"\n{what} (again to end at once)", file=sys.stderr)

    first: list[float] = []
    timers = [] if max_seconds is None else [start_timer(max_seconds, stop.set, OUT_OF_TIME)]
    heard = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
        heard.append(signal.SIGHUP)
    old = {number: signal.signal(number, on_signal) for number in heard}
    try:
        yield stop
    finally:
        for timer in timers:
            timer.cancel()
        for number, handler in old.items():
            signal.signal(number, handler)
