"""What the fault scripts share: a fault, its outcome, and fedcil in a process that can be killed.

A new fault is one function ``(seed, workdir) -> Outcome`` and one line in a table of ``Fault`` (see kills.py).
"""

from __future__ import annotations

import atexit
import os
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import psutil

import fedcil

SMALL = (
    "method={name='mfcl', preset='small', steps=10, pool=64}",
    "data.classes=6",
    "clients={count=10, per_round=5}",
    "partition={name='iid'}",
    "stream.tasks=3",
    "training.rounds=5",
    "training.epochs=1",
    "engine.workers=2",
)
"""3 tasks of 5 rounds with a boundary, 5 of 10 clients a round, on digits."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a trial came to. ``recovery_s``: from the start of the resume to its first recorded round."""

    passed: bool
    what: str
    recovery_s: float | None = None


@dataclass(frozen=True, slots=True)
class Fault:
    """A kind of fault: what is required of the program, how often to try, and the trial itself.

    ``most``: where a fault can only strike at so many places, all of them are tried, by seed 0, 1, 2, ...
    """

    name: str
    required: str
    trial: Callable[[int, Path], Outcome]
    trials: int = 10
    most: Callable[[], int] | None = None


RESUMES = "resumes to the metrics of an undisturbed run"
CLEAR = "ends with an exit code of its own, a message and no traceback; the last checkpoint is intact and resumes"


class Command:
    """A fedcil command in a process forked from this one: nothing is imported again, everything else is as ever."""

    def __init__(self, *arguments: str, folder: Path, prepare: Callable[[], None] = lambda: None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.out, self.err = folder / f"out-{time.time_ns()}", folder / f"err-{time.time_ns()}"
        self.started = time.monotonic()
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._be_fedcil([*arguments, "--no-figures", "--json"], prepare)
        self.code: int | None = None

    def _be_fedcil(self, arguments: list[str], prepare: Callable[[], None]) -> None:
        code = 70
        try:
            os.setsid()
            for number, path in ((1, self.out), (2, self.err)):
                os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600), number)
            from fedcil.cli import main

            prepare()
            sys.argv = ["fedcil", *arguments]
            main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1 if end.code else 0
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def running(self) -> bool:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code is None

    def wait(self, seconds: float = 300.0) -> int:
        """The exit code (negative for a signal). Killed, and -99, if it does not end in time."""
        end = time.monotonic() + seconds
        while self.running():
            if time.monotonic() > end:
                self.kill()
                os.waitpid(self.pid, 0)
                self.code = -99
            time.sleep(0.02)
        assert self.code is not None
        return self.code

    def kill(self, number: int = signal.SIGKILL, *, group: bool = False) -> None:
        """``group``: with all that have not left its process group, as Ray's daemons have."""
        if self.code is None:  # not waited for yet: the number is still its own
            (os.killpg if group else os.kill)(self.pid, number)

    def family(self) -> list[psutil.Process]:
        """Its descendants, as far as they live."""
        try:
            return psutil.Process(self.pid).children(recursive=True)
        except psutil.Error:
            return []

    def said(self) -> str:
        return self.err.read_text(errors="replace")


def victim(family: Sequence[object], seed: int) -> int:
    """A place in the family, drawn apart from the moment of the same seed."""
    return random.Random(f"{seed} victim").randrange(len(family))


def alive(family: list[psutil.Process]) -> list[str]:
    """Who is still there some seconds later."""
    _, left = psutil.wait_procs(family, timeout=10)
    return [str(process.pid) for process in left]


def in_a_round(command: Command, folder: Path | None, seed: int) -> None:
    """Wait for the first recorded round, and up to half of what all rounds take in the undisturbed run."""
    while command.running() and folder and not (folder / "metrics.jsonl").stat().st_size:
        time.sleep(0.01)
    time.sleep(moment(seed, 0.5))


def begun(seed: int, workdir: Path, *more: str) -> tuple[Command, Path | None]:
    """The small run, in one of its rounds, and its folder."""
    reference()  # made before, not while this one runs
    command = start(workdir, *more)
    folder = await_checkpoint(command, workdir)
    in_a_round(command, folder, seed)
    return command, folder


def ended_before(command: Command, folder: Path, family: list[psutil.Process]) -> bool:
    """Whether the run was through before the blow was felt, with the metrics of the undisturbed one and nobody left."""
    return command.wait() == 0 and fedcil.load(folder).results == reference()[0] and not alive(family)


def stopped_by(number: signal.Signals, engine: str, longest_s: float, trials: int) -> Fault:
    """To the run alone, as a supervisor's SIGTERM, or to its whole process group, as a terminal's Ctrl-C."""

    def trial(seed: int, workdir: Path) -> Outcome:
        command, folder = begun(seed, workdir, f"engine.name={engine!r}")
        family, asked = command.family(), time.monotonic()
        command.kill(number, group=number == signal.SIGINT)
        if folder and ended_before(command, folder, family):
            return Outcome(True, "ended before the signal, with identical metrics")
        problem = clear(command, [128 + number])
        took, left = time.monotonic() - asked, alive(family)
        if problem or took > longest_s or folder is None or left:
            return Outcome(False, problem or f"{took:.1f} s, processes left: {left}")
        return resumed(folder, error_line(command))

    required = f"ends in {longest_s:g} s, saved, no process left; then {RESUMES}"
    return Fault(f"{engine}_{number.name.lower()}", required, trial, trials)


def sets(overrides: Sequence[str]) -> list[str]:
    return [part for text in overrides for part in ("--set", text)]


def start(output: Path, *more: str, prepare: Callable[[], None] = lambda: None, logs: Path | None = None) -> Command:
    """The small run into ``output``."""
    words = ("run", "digits_mfcl", *sets((*SMALL, *more)), "--output", str(output))
    return Command(*words, folder=logs or output, prepare=prepare)


def folder_in(output: Path) -> Path | None:
    """The run folder in ``output``, once it can be resumed."""
    found = [path.parent.parent for path in output.glob("*/checkpoints/state-*.json")]
    return found[0] if found else None


def await_checkpoint(command: Command, output: Path) -> Path | None:
    while command.running():
        if (folder := folder_in(output)) is not None:
            return folder
        time.sleep(0.005)
    return folder_in(output)


def scratch(name: str) -> Path:
    """A folder that goes away with this process."""
    path = Path(mkdtemp(prefix=f"{name}-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


@cache
def reference() -> tuple[list[dict[str, Any]], float]:
    """(metrics of the undisturbed run, seconds that its rounds and boundaries took)."""
    output = scratch("reference")
    command = start(output)
    assert command.wait() == 0, command.said()
    folder = folder_in(output)
    assert folder is not None
    run = fedcil.load(folder)
    return run.results, sum(line["cost"]["seconds"] for line in run.lines)


def moment(seed: int, share: float = 0.9) -> float:
    """A uniform random time in the run, in seconds after its first checkpoint."""
    return random.Random(seed).uniform(0.0, share * reference()[1])


def resumed(folder: Path, what: str, *more: str, engine: str = "inline") -> Outcome:
    """Resume, and hold the metrics against those of the undisturbed run."""
    before = (folder / "metrics.jsonl").stat().st_mtime_ns if (folder / "metrics.jsonl").exists() else 0
    finished = (folder / "summary.json").exists()
    command = Command("resume", str(folder), "--engine", engine, *more, folder=folder.parent)
    recovery = None
    while command.running():
        if recovery is None and (folder / "metrics.jsonl").stat().st_mtime_ns > before and not finished:
            recovery = time.monotonic() - command.started
        time.sleep(0.005)
    if command.wait() != 0:
        return Outcome(False, f"{what}; the resume failed: {last_line(command.said())}")
    same = fedcil.load(folder).results == reference()[0]
    return Outcome(same, f"{what}; resumed to {'identical' if same else 'OTHER'} metrics", recovery)


def clear(command: Command, codes: Sequence[int]) -> str | None:
    """What is wrong with how a command ended, or None: an own exit code, a message, no traceback."""
    code, said = command.wait(), command.said()
    if code not in codes:
        return f"exit code {code}: {last_line(said)}"
    if "Traceback" in said:
        return f"a traceback: {last_line(said)}"
    return None if re.search(r"^(error|stopped): ", said, re.MULTILINE) else f"no message: {last_line(said)}"


def last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return (next((line for line in lines if line.startswith(("error:", "stopped:"))), lines[-1]) if lines else "")[:200]


def error_line(command: Command) -> str:
    """The message, without what differs from trial to trial."""
    return re.sub(r"[\d.]+ s\b", "n s", last_line(command.said()))
