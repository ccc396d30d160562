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
from fedcil.experiment import Experiment
from fedcil.messages import Reply, Request
from fedcil.record.folder import identity
from fedcil.scenario import flatten

LOOK_S = 0.2  # how long to wait before looking at the stop signal again
END_S = 5.0  # how long the program may take to end
PROGRAM = "from fedcil.engines.fork_server import main; main()"


class Fork:
    """One worker process, as the run sees it."""

    def __init__(self, channel: Channel) -> None:
        self._asking = Asking(channel)

    def ask(self, request: Request) -> None:
        """Nothing happens if it has died: ``answer`` says so."""
        with contextlib.suppress(OSError):
            self._asking.send(request)

    def answer(self, check: Callable[[], None]) -> Reply:
        """To what it was asked last. EOFError or OSError if it has died. What ``check`` raises leaves it of no use."""
        while True:
            try:
                return self._asking.receive(LOOK_S)
            except TimeoutError:
                check()


class Forks:
    """The worker processes of a run: started together, never replaced."""

    def __init__(self, setting: Setting, count: int) -> None:
        """Start the program behind them; nothing is waited for. OSError if it cannot be started."""
        self._identity = plain_identity(setting.experiment)
        with contextlib.ExitStack() as theirs:
            self._channels, descriptors = [], []
            for _ in range(count):
                here, there = socket.socketpair()
                theirs.enter_context(there)
                requests, replies = os.memfd_create("requests"), os.memfd_create("replies")
                self._channels.append(Channel(here.detach(), requests, replies))
                descriptors.append((there.fileno(), replies, requests))
            try:
                self._program = start_program(descriptors, setting)
            except OSError:
                for channel in self._channels:
                    channel.close()
                raise
        self._unheard = list(self._channels)

    def newcomers(self, wait_s: float) -> list[Fork]:
        """Those that say within this time that they are ready, each of them once. One that is not as this process is,
        or cannot start, is the last, with a warning: bits would depend on who did what.
        """
        found = []
        while self._unheard:
            try:
                problem = self._problem(self._unheard[0].receive(wait_s)[0])
            except (TimeoutError, BlockingIOError):
                break
            except (EOFError, OSError):
                problem = "its program has ended"
            if problem:
                warnings.warn(f"a worker process cannot be used, a thread trains instead: {problem}", stacklevel=2)
                self._unheard.clear()
                break
            found.append(Fork(self._unheard.pop(0)))
        return found

    def _problem(self, hello: dict[str, Any]) -> str | None:
        if "problem" in hello:
            return str(hello["problem"])
        there, here = hello["identity"], self._identity
        differing = [name for name in here if there.get(name) != here[name]]
        return "; ".join(f"{name} is {there.get(name)} there, {here[name]} here" for name in differing) or None

    def close(self) -> None:
        for channel in self._channels:
            channel.close()
        try:
            self._program.communicate(timeout=END_S)
        except (OSError, subprocess.TimeoutExpired):
            self._program.kill()
            self._program.wait()


def plain_identity(experiment: Experiment) -> dict[str, Any]:
    """What a worker must have in common with the run, as JSON brings it."""
    plain: dict[str, Any] = json.loads(json.dumps(flatten(identity(experiment))))
    return plain


def start_program(channels: list[tuple[int, int, int]], setting: Setting) -> subprocess.Popen[bytes]:
    """It finds modules where this process does, since a scenario may name a user's own, and ends with its input.
    Signals to the group of this process, as Ctrl-C sends them, are not for it.
    """
    program = subprocess.Popen(
        [sys.executable, "-P", "-c", PROGRAM],
        stdin=subprocess.PIPE,
        pass_fds=[descriptor for channel in channels for descriptor in channel],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        process_group=0,
    )
    orders = {
        "channels": channels,
        "scenario": setting.experiment.scenario.to_dict(),
        "data_root": str(setting.data_root.absolute()) if setting.data_root else None,
        "states": str(setting.states.absolute()),
    }
    assert program.stdin is not None
    program.stdin.write(json.dumps(orders).encode() + b"\n")
    program.stdin.flush()
    return program
