"""Signals to a run on the inline engine, a worker process of it that dies, and a second run into the same folder."""

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
    await_checkpoint,
    begun,
    clear,
    error_line,
    moment,
    reference,
    resumed,
    start,
    stopped_by,
    victim,
)

PAUSE_S = 30.0
STOP_S = 10.0  # how long a run may take to end after SIGTERM or Ctrl-C


def killed(seed: int, workdir: Path) -> Outcome:
    """SIGKILL at a random moment."""
    command = start(workdir)
    folder = await_checkpoint(command, workdir)
    time.sleep(moment(seed))
    command.kill()
    code = command.wait()
    if folder is None or code not in (-signal.SIGKILL, 0):
        return Outcome(False, f"no checkpoint, or it ended by itself with {code}")
    return resumed(folder, "killed" if code == -signal.SIGKILL else "ended before the kill")


def paused(seed: int, workdir: Path) -> Outcome:
    """SIGSTOP, and SIGCONT half a minute later."""
    command = start(workdir)
    folder = await_checkpoint(command, workdir)
    time.sleep(moment(seed, 0.5))
    command.kill(signal.SIGSTOP)
    time.sleep(PAUSE_S)
    command.kill(signal.SIGCONT)
    code = command.wait()
    same = code == 0 and folder is not None and fedcil.load(folder).results == reference()[0]
    return Outcome(same, f"paused {PAUSE_S:g} s; ended with {'identical' if same else 'OTHER'} metrics")


def two_at_once(seed: int, workdir: Path) -> Outcome:
    """A resume of a run that is going on."""
    command = start(workdir)
    folder = await_checkpoint(command, workdir)
    time.sleep(moment(seed, 0.3))
    second = Command("resume", str(folder), folder=workdir)
    code = second.wait()
    took = time.monotonic() - second.started
    together = command.running()
    problem = clear(second, [3]) if together else None
    first = command.wait()
    same = folder is not None and fedcil.load(folder).results == reference()[0]
    passed = not problem and first == 0 and same and took < 5.0
    if not together:
        return Outcome(passed, "ended before")
    return Outcome(passed, f"the second ended with {code}, {problem or error_line(second)}; the first was unharmed")


def worker_process_killed(seed: int, workdir: Path) -> Outcome:
    """A worker process, or the program that forked it."""
    command, folder = begun(seed, workdir, "engine.processes=true")
    family, struck = command.family(), "ended before"
    if len(family) == 2:
        place = victim(family, seed)
        with contextlib.suppress(psutil.NoSuchProcess):
            family[place].kill()
            struck = ("the program killed", "the worker killed")[place]
    elif command.running():
        return Outcome(False, f"not one program and one worker, but {len(family)} processes")
    code, left = command.wait(), alive(family)
    same = code == 0 and folder is not None and fedcil.load(folder).results == reference()[0]
    seen = "a thread went on" if "a worker process has died" in command.said() else "not felt"
    what = f"{struck}, {seen}; ended with {code} and {'identical' if same else 'OTHER'} metrics"
    return Outcome(same and not left, what if not left else f"{what}; processes left: {left}")


FAULTS = (
    Fault("inline_kill", RESUMES, killed, 20),
    stopped_by(signal.SIGTERM, "inline", STOP_S, 10),
    stopped_by(signal.SIGINT, "inline", STOP_S, 10),
    Fault("inline_pause", "goes on to the metrics of an undisturbed run", paused, 3),
    Fault("inline_worker_kill", "goes on to the metrics of an undisturbed run", worker_process_killed, 10),
    Fault("two_runs", f"the second {CLEAR.split(';', maxsplit=1)[0]}; the first is not disturbed", two_at_once, 10),
)
