"""Processes of a run on Ray that die: a worker, the raylet, the control store, the run itself; and signals to all."""

from __future__ import annotations

import contextlib
import signal
import time
from pathlib import Path

import psutil

import fedcil
from scenarios.reliability.common import (
    CLEAR,
    RESUMES,
    Command,
    Fault,
    Outcome,
    alive,
    begun,
    clear,
    ended_before,
    error_line,
    reference,
    resumed,
    stopped_by,
    victim,
)

WORKER = "ray::ClientWorker", "default_worker.py"  # Ray gives a process its name only where the environment lets it
ON_RAY = "engine.name='ray'"
LONGEST_S = 30.0  # from the death of the head to the end of the run


def find(command: Command, *names: str) -> list[psutil.Process]:
    """Its descendants of this name, or running a program of this name."""
    found = []
    for child in command.family():
        with contextlib.suppress(psutil.Error):
            words = child.name(), *child.cmdline()[:2]
            if any(word.startswith(name) or word.endswith(f"/{name}") for word in words for name in names):
                found.append(child)
    return found


def worker_killed(seed: int, workdir: Path) -> Outcome:
    command, folder = begun(seed, workdir, ON_RAY)
    workers = find(command, *WORKER)
    if not workers or folder is None:
        return Outcome(False, "no Ray worker was found")
    workers[victim(workers, seed)].kill()
    code = command.wait()
    same = code == 0 and fedcil.load(folder).results == reference()[0]
    return Outcome(same, f"ended with {code} and {'identical' if same else 'OTHER'} metrics")


def head_killed(name: str) -> Fault:
    def trial(seed: int, workdir: Path) -> Outcome:
        command, folder = begun(seed, workdir, ON_RAY)
        head, family, killed = find(command, name), command.family(), time.monotonic()
        if not head or folder is None:
            return Outcome(False, f"no {name} was found")
        head[0].kill()
        if ended_before(command, folder, family):
            return Outcome(True, "ended before it was felt, with identical metrics")
        took, left = time.monotonic() - killed, alive(family)
        problem = clear(command, [1])
        if problem or left or took > LONGEST_S:
            return Outcome(False, problem or f"{took:.1f} s, processes left: {left}")
        return resumed(folder, error_line(command))

    return Fault(f"ray_{name}_kill", CLEAR, trial, 5)


def run_killed(seed: int, workdir: Path) -> Outcome:
    """SIGKILL of the run alone: nobody is left to stop what it started."""
    command, folder = begun(seed, workdir, ON_RAY)
    family = command.family()
    command.kill()
    code, left = command.wait(), alive(family)
    if folder is None or left or code not in (-signal.SIGKILL, 0):
        return Outcome(False, f"no checkpoint, or it ended by itself with {code}, or processes left: {left}")
    return resumed(folder, "killed" if code == -signal.SIGKILL else "ended before the kill")


FAULTS = (
    Fault("ray_worker_kill", "goes on to the metrics of an undisturbed run", worker_killed, 5),
    head_killed("raylet"),
    head_killed("gcs_server"),
    stopped_by(signal.SIGTERM, "ray", LONGEST_S, 5),
    stopped_by(signal.SIGINT, "ray", LONGEST_S, 5),
    Fault("ray_kill", f"no process is left; then {RESUMES}", run_killed, 5),
)
