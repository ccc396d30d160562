"""Inline workers as processes: steps of small networks are so short that threads wait for Python's lock.

A process holds nothing that could not be lost: without it a thread of the run trains its clients, with the same bits.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

from fedcil.engines import Setting
from fedcil.engines.channel import Channel
from fedcil.engines.fork_messages import Asking
from fedcil.engines.loaded_files import LoadedFiles
from fedcil.engines.signals import kept_from_children
from fedcil.messages import Reply, Request
from fedcil.record.identity import unlike, worker_identity

LOOK_S = 0.2  # how long to wait before looking at the stop signal again
END_S = 5.0  # how long the program may take to end
PROGRAM = "from fedcil.engines.fork_server import main; main()"


class Fork:
    """One worker process, as the run sees it."""

    def __init__(self, channel: Channel) -> None:
        self._channel, self._asking = channel, Asking(channel)

    def ask(self, request: Request) -> None:
        """One that has died, or cannot be told, is of no use any more: ``answer`` says so."""
        try:
            self._asking.send(request)
        except OSError:
            self._channel.hang_up()

    def answer(self, check: Callable[[], None]) -> Reply:
        """To what it was asked last. EOFError or OSError if it has died. What ``check`` raises leaves it of no use."""
        while True:
            try:
                return self._asking.receive(LOOK_S)
            except TimeoutError:
                check()


class Forks:
    """The worker processes of a run: started together, never replaced."""

    def __init__(self, setting: Setting, count: int, loaded: LoadedFiles) -> None:
        """Start the program behind them; nothing is waited for. OSError if it cannot be started.

        ``loaded``: of the run, when it began.
        """
        self._identity, self._loaded = worker_identity(setting.experiment), loaded
        self._channels, descriptors = [], []
        with contextlib.ExitStack() as theirs, contextlib.ExitStack() as ours:
            for _ in range(count):
                here, there = socket.socketpair()
                ours.enter_context(here)
                theirs.enter_context(there)
                requests, replies = (_memory(ours) for _ in range(2))
                self._channels.append(Channel(here, requests, replies))
                descriptors.append((there.fileno(), replies, requests))
            self._program = start_program(descriptors, setting)
            ours.pop_all()
        self._unheard = list(self._channels)

    @property
    def starting(self) -> bool:
        return bool(self._unheard)

    def newcomers(self) -> list[Fork]:
        """Those that have said by now that they are ready, each of them once. One that is not as this process is, or
        cannot start, is the last, with a warning.
        """
        found = []
        while self._unheard:
            try:
                problem = self._problem(self._unheard[0].receive(0.0)[0])
            except TimeoutError:
                break
            except (EOFError, OSError):
                problem = "its program has ended"
            if problem:
                warnings.warn(f"a worker process cannot be used, a thread trains instead: {problem}", stacklevel=2)
                self._unheard.clear()
                break
            found.append(Fork(self._unheard.pop(0)))
        return found

    def _problem(self, hello: dict[str, Any]) -> str:
        """Why a worker that says this cannot be used; empty if it can."""
        if "problem" in hello:
            return str(hello["problem"])
        if changed := self._loaded.changed():
            return f"{changed} has changed since the run began"
        return unlike(hello["identity"], self._identity)

    def close(self) -> None:
        for channel in self._channels:
            channel.close()
        if len(self._unheard) == len(self._channels):  # it would look at its input only when it has opened the scenario
            self._program.kill()
        try:
            self._program.communicate(timeout=END_S)
        except (OSError, subprocess.TimeoutExpired):
            self._program.kill()
            self._program.wait()


def _memory(opened: contextlib.ExitStack) -> int:
    """The descriptor of new memory without a name."""
    descriptor = os.memfd_create("fedcil")
    opened.callback(os.close, descriptor)
    return descriptor


def shown(stream: Any) -> int | None:
    """Where a process that is started prints what one of here would print; None in a notebook, where it is as it is."""
    try:
        descriptor: int = stream.fileno()
    except (AttributeError, OSError, ValueError):  # the last: it is closed
        return None
    return descriptor


def start_program(channels: list[tuple[int, int, int]], setting: Setting) -> subprocess.Popen[bytes]:
    """It finds modules where this process does, since a scenario may name a user's own, and ends with its input."""
    modules = [path for path in sys.path if isinstance(path, str)]  # import passes over all else
    with kept_from_children():
        program = subprocess.Popen(
            [sys.executable, "-P", "-c", PROGRAM],
            stdin=subprocess.PIPE,
            stdout=shown(sys.stdout),
            pass_fds=[descriptor for channel in channels for descriptor in channel],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(modules)},
        )
    orders = {
        "channels": channels,
        "scenario": setting.experiment.scenario.to_dict(),
        "data_root": str(setting.data_root.absolute()) if setting.data_root else None,
        "states": str(setting.states.absolute()),
    }
    assert program.stdin is not None
    try:
        program.stdin.write(json.dumps(orders).encode() + b"\n")
        program.stdin.flush()
    except OSError:
        program.kill()
        program.communicate()
        raise
    return program
