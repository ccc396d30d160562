"""A side as a process that does what it is told: ``round`` -> one round and its cost, ``weights PATH`` -> a file.

The peer's side is ``answer``: it prints one JSON line per command on stdout and ends with its standard input. The
benchmark's side is ``Session``: commands of several peers can so be given in turn.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from scenarios.benchmarks.timing import Case, Cost


class Peer(Protocol):
    """What a peer's program makes of its library."""

    def round(self) -> None:
        """One round of FedAvg over all clients."""

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


def answer(peer: Peer, rounds: int = 1) -> None:
    """Obey standard input; a command ``round`` is so many of the peer's, and the cost that of one. The library's own
    prints must not reach stdout: they are sent to stderr.
    """
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    replies.write(json.dumps({"ready": True}) + "\n")
    for line in sys.stdin:
        command, _, argument = line.strip().partition(" ")
        if command == "round":
            gc.collect()
            others, own, wall = children_cpu(), time.process_time(), time.perf_counter()
            for _ in range(rounds):
                peer.round()
            wall, own = time.perf_counter() - wall, time.process_time() - own
            cpu = own + children_cpu() - others
            replies.write(json.dumps({"cpu": cpu / rounds, "wall": wall / rounds}) + "\n")
        else:
            np.savez(argument, **peer.weights())
            replies.write(json.dumps({"saved": argument}) + "\n")


class Session:
    """A running peer. Whoever opens it closes it."""

    def __init__(self, python: Path, peer: str, data: Path | str, net: str, mode: str, log: Path) -> None:
        command = [str(python), "-m", f"scenarios.benchmarks.peers.{peer}", str(data), net, mode]
        self._log = log.open("a")
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, bufsize=1
        )
        try:
            self._read()
        except RuntimeError:
            self.close()
            raise

    def round(self) -> tuple[float, float]:
        """(CPU seconds of the peer's processes, wall seconds)."""
        reply = self._ask("round")
        return float(reply["cpu"]), float(reply["wall"])

    def case(self, units: int = 1) -> Case:
        """For timing in turn: a round is one repeat, which does ``units`` of whatever is counted."""
        return lambda: Cost(*(seconds / units for seconds in self.round()))

    def weights(self, path: Path) -> dict[str, np.ndarray[Any, Any]]:
        self._ask(f"weights {path}")
        with np.load(path) as file:
            return {name: file[name] for name in file.files}

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._log.close()

    def _ask(self, command: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the peer ended without an answer; see {self._log.name}")
        reply: dict[str, Any] = json.loads(line)
        return reply
