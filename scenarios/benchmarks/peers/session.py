"""A side as a process that does what it is told: ``["begin", ...]`` -> something new to measure, ``["round", ...]`` ->
one round and its cost, ``["weights", PATH]`` -> a file.

Commands and replies are lines of JSON. The peer's side is ``answer``: it obeys its standard input and ends with it. The
benchmark's side is ``Session``: commands of several peers can so be given in turn.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from scenarios.benchmarks.timing import Case, Cost, times_in_a_second


class Peer(Protocol):
    """What a peer's program makes of its library."""

    def round(self, *words: str) -> None:
        """One round of FedAvg over all clients, or whatever its ``words`` say."""

    def weights(self) -> dict[str, np.ndarray[Any, Any]]:
        """Parameters of the global model by their name in ``nets.Classifier``."""
        ...


def children_cpu() -> float:
    """CPU seconds of all living processes that descend from this one, and of those that these have outlived."""
    import psutil  # here, for programs that need no sessions and have no psutil

    total = 0.0
    for process in psutil.Process().children(recursive=True):
        try:
            times = process.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
        except psutil.NoSuchProcess:
            continue
    return total


def answer(begin: Callable[..., Peer], *, for_a_second: bool = False) -> None:
    """Obey standard input. ``begin`` gets the words of its command; a command ``round`` is one of the peer's, or as
    many as take a second, and the cost that of one. The library's own prints must not reach stdout: they are sent to
    stderr.
    """
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    peer, rounds = None, 1
    for line in sys.stdin:
        command, *words = json.loads(line)
        if command == "begin":
            peer = begin(*words)
            rounds = times_in_a_second(peer.round) if for_a_second else 1
            reply: dict[str, Any] = {"begun": words}
        elif peer is None:
            raise SystemExit(f"{command!r} before any 'begin'")
        elif command == "round":
            reply = _cost_of(partial(peer.round, *words), rounds)
        else:
            np.savez(words[0], **peer.weights())
            reply = {"saved": words[0]}
        replies.write(json.dumps(reply) + "\n")


def _cost_of(one_round: Callable[[], None], rounds: int) -> dict[str, float]:
    gc.collect()
    others, own, wall = children_cpu(), time.process_time(), time.perf_counter()
    for _ in range(rounds):
        one_round()
    wall, own = time.perf_counter() - wall, time.process_time() - own
    return {"cpu": (own + children_cpu() - others) / rounds, "wall": wall / rounds}


class Session:
    """A peer's program, which may still be starting. Whoever opens it closes it."""

    def __init__(self, log: Path, python: str | Path, peer: str | Path, *arguments: str | Path) -> None:
        command = [str(python), "-m", f"scenarios.benchmarks.peers.{peer}", *map(str, arguments)]
        self._log = log.open("a")
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, bufsize=1
        )

    def begin(self, *words: object) -> None:
        """Have the peer make what it then does rounds of; it has started when this returns."""
        self._ask("begin", *words)

    def round(self, *words: str) -> tuple[float, float]:
        """(CPU seconds of the peer's processes, wall seconds)."""
        reply = self._ask("round", *words)
        return float(reply["cpu"]), float(reply["wall"])

    def case(self, units: int = 1, *words: str) -> Case:
        """For timing in turn: a round is one repeat, which does ``units`` of whatever is counted."""
        return lambda: Cost(*(seconds / units for seconds in self.round(*words)))

    def weights(self, path: Path) -> dict[str, np.ndarray[Any, Any]]:
        self._ask("weights", path)
        with np.load(path) as file:
            return {name: file[name] for name in file.files}

    def hang_up(self) -> None:
        """Ask it to end."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended by itself
            self._process.stdin.close()

    def close(self) -> None:
        """And wait until it has."""
        self.hang_up()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._log.close()

    def _ask(self, *words: object) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps([str(word) for word in words]) + "\n")
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError(f"the peer ended without an answer; see {self._log.name}")
        reply: dict[str, Any] = json.loads(line)
        return reply


@contextmanager
def sessions(log: Path, programs: Mapping[str, Sequence[str | Path]]) -> Iterator[dict[str, Session]]:
    """By name; ``programs``: python, peer and arguments of each. They start together and end together: each takes
    seconds for that.
    """
    with ExitStack() as stack:
        opened: dict[str, Session] = {}
        for name, (python, peer, *arguments) in programs.items():
            opened[name] = Session(log, python, peer, *arguments)
            stack.callback(opened[name].close)
        for session in opened.values():
            stack.callback(session.hang_up)
        yield opened
