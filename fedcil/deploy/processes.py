"""Flower's programs as child processes: how each is called, kept running, and ended in order."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from fedcil.deploy.health import LOCAL_NAMES, LOOPBACK
from fedcil.deploy.pki import Pki
from fedcil.dotted import WORKING_FOLDER

GRACE_S = 15.0  # between being asked to end and being ended
LONGEST_PAUSE_S = 15.0  # between two starts of a process that ends again and again
SETTLED_S = 30.0  # a process that ran so long starts again at once
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Role:
    """A program with its arguments, and the file that gets what it says (none: where this process says things)."""

    name: str
    command: tuple[str, ...]
    log: Path | None
    environment: Mapping[str, str]


def flower_environment(home: Path) -> dict[str, str]:
    """What Flower's programs and the apps that they start are given. They would look for each other on this machine
    through a proxy, where there is one.
    """
    scripts = str(Path(sys.executable).parent)  # they start each other by name
    direct = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
    direct = ",".join([direct, *LOCAL_NAMES] if direct else LOCAL_NAMES)
    return {
        "OMP_NUM_THREADS": "1",
        **os.environ,
        "no_proxy": direct,
        "NO_PROXY": direct,
        "PATH": f"{scripts}{os.pathsep}{os.environ.get('PATH', '')}",
        "FLWR_HOME": str(home),
        WORKING_FOLDER: str(Path.cwd()),
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
        "PYTHONUNBUFFERED": "1",
    }


def superlink(pki: Pki, host: str, port: int, database: Path) -> tuple[str, ...]:
    return (
        executable("flower-superlink"),
        *("--host", host, "--port", str(port), "--database", str(database)),
        *("--ssl-ca-certfile", str(pki.ca), "--ssl-certfile", str(pki.certificate)),
        *("--ssl-keyfile", str(pki.server_key), "--superexec-auth-secret-file", str(pki.secret)),
        *("--enable-supernode-auth", "--isolation", "process", "--disable-runtime-dependency-installation"),
    )


def server_app(pki: Pki, address: str) -> tuple[str, ...]:
    return (
        executable("flower-superexec"),
        *("--runtime-api-address", address, "--root-certificates", str(pki.ca)),
        *("--superexec-auth-secret-file", str(pki.secret)),
    )


def supernode(pki: Pki, slot: int, address: str, port: int, secret: Path, config: str) -> tuple[str, ...]:
    return (
        executable("flower-supernode"),
        *("--superlink", address, "--root-certificates", str(pki.ca)),
        *("--auth-supernode-private-key", str(pki.node_key(slot)), "--node-config", config),
        *("--host", LOOPBACK, "--port", str(port), "--isolation", "process"),
        *("--superexec-auth-secret-file", str(secret)),
    )


def client_app(port: int, secret: Path) -> tuple[str, ...]:
    """On loopback, between two processes of one node: no TLS, but a secret of their own."""
    return (
        executable("flower-superexec"),
        *("--runtime-api-address", f"{LOOPBACK}:{port}", "--insecure"),
        *("--superexec-auth-secret-file", str(secret)),
    )


def executable(name: str) -> str:
    return str(Path(sys.executable).parent / name)


def free_port() -> int:
    with socket.socket() as one:
        one.bind((LOOPBACK, 0))
        port: int = one.getsockname()[1]
        return port


def start(role: Role) -> subprocess.Popen[bytes]:
    """In a session of its own, so that it can be ended with everything it starts; it does not outlive this process."""
    with contextlib.ExitStack() as files:
        log = files.enter_context(open_log(role.log, role.command)) if role.log else None
        return subprocess.Popen(
            role.command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT if log else None,
            env=dict(role.environment),
            start_new_session=True,
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,  # noqa: PLW1509 - one system call
        )


def open_log(path: Path, command: Sequence[str]) -> IO[bytes]:
    path.parent.mkdir(parents=True, exist_ok=True)
    log = path.open("ab")
    log.write(f"--- {time.strftime('%H:%M:%S')} {shlex.join(command)}\n".encode())
    log.flush()
    return log


def _end_with_parent() -> None:
    _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


_LIBC = ctypes.CDLL(None)


def end(process: subprocess.Popen[bytes], grace_s: float = GRACE_S) -> None:
    """Ask it to end, wait, then end it and everything that it started."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(grace_s)
        except subprocess.TimeoutExpired:
            process.kill()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@dataclass(slots=True)
class _Child:
    role: Role
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    quick_ends: int = 0
    not_before: float = 0.0


@dataclass(slots=True)
class Keeper:
    """Keeps processes running: one that ended is started again, after a pause that grows while it ends at once."""

    children: dict[str, _Child] = field(default_factory=dict)

    def start(self, role: Role) -> None:
        self.children[role.name] = _Child(role)
        self.tend()

    def tend(self) -> None:
        """To be called often: start again what has ended and has paused long enough."""
        for child in self.children.values():
            if child.process is not None and child.process.poll() is not None:
                self._note_end(child)
            if child.process is None and time.monotonic() >= child.not_before:
                child.process, child.started = start(child.role), time.monotonic()

    def stop(self, name: str) -> None:
        """End one for good."""
        child = self.children.pop(name)
        if child.process is not None:
            end(child.process)

    def close(self) -> None:
        """End all, the ones started last first."""
        for name in reversed(list(self.children)):
            self.stop(name)

    def _note_end(self, child: _Child) -> None:
        ran = time.monotonic() - child.started
        assert child.process is not None
        end(child.process, 0.0)  # what it started and left
        child.process = None
        child.quick_ends = 0 if ran > SETTLED_S else child.quick_ends + 1
        child.not_before = time.monotonic() + min(LONGEST_PAUSE_S, 2.0**child.quick_ends / 2)
