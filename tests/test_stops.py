"""What ends a run from outside: it stops with a checkpoint, leaves no process, and goes on as if nothing had been."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Set
from pathlib import Path
from typing import Any

import psutil
import pytest

import fedcil
from fedcil.cli.guard import stoppable
from fedcil.engines.ray_cluster import own_signals
from fedcil.engines.signals import kept_from_children
from fedcil.errors import Stopped
from fedcil.port import StopSignal

RUN = [
    *(sys.executable, "-m", "fedcil", "run", str(Path(__file__).with_name("tiny.toml")), "--no-figures"),
    "--set=training.rounds=200",
    "--set=server.checkpoint_every=199",
]
INLINE = "engine={workers=2, processes=true}"
ENGINES = [INLINE, *(pytest.param(f"engine.name={name}", marks=pytest.mark.slow) for name in ("ray", "flower"))]

# A shell in a terminal that goes as soon as a run in it has recorded a round.
TERMINAL = """
import os, pty, shlex, signal, sys
from pathlib import Path

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # tests may run under nohup
shell, terminal = pty.fork()
if not shell:
    os.execvp("bash", ["bash", "--norc", "-i"])
os.write(terminal, f"{shlex.join(sys.argv[1:])}\\n".encode())
while not any(path.stat().st_size for path in Path("runs").glob("*/metrics.jsonl")):
    os.read(terminal, 1000)
os.close(terminal)
os.waitpid(shell, 0)
"""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("undisturbed")
    subprocess.run(RUN, cwd=folder, timeout=120, check=True, stderr=subprocess.DEVNULL)
    return results(folder)


def results(folder: Path) -> list[dict[str, Any]]:
    """Of the only run below ``folder``."""
    (path,) = folder.glob("runs/*")
    return fedcil.load(path).results


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("engine", ["engine.workers=1", *ENGINES[1:]])
def test_a_signal_to_the_run(
    engine: str, number: int, code: int, tmp_path: Path, undisturbed: list[dict[str, Any]]
) -> None:
    with start(tmp_path, engine) as process:
        process.send_signal(number)
        assert_stopped(process, code)
    assert_goes_on(tmp_path, undisturbed)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_terminal_that_goes(engine: str, tmp_path: Path, undisturbed: list[dict[str, Any]]) -> None:
    command = [sys.executable, "-c", TERMINAL, *RUN, f"--set={engine}"]
    subprocess.run(command, cwd=tmp_path, timeout=120, check=True)
    assert_goes_on(tmp_path, undisturbed)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_batch_system_that_tells_every_process(
    engine: str, tmp_path: Path, undisturbed: list[dict[str, Any]]
) -> None:
    """As Slurm and systemd do; here those that the run has started hear it first."""
    with start(tmp_path, engine) as process:
        started = psutil.Process(process.pid).children(recursive=True)
        assert started
        for child in started:
            with contextlib.suppress(psutil.Error):  # it has ended
                child.terminate()
        time.sleep(0.5)
        process.terminate()
        said = assert_stopped(process, 143)
    assert "died" not in said
    assert_goes_on(tmp_path, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ray", "flower"])
def test_a_signal_while_ray_starts(engine: str, tmp_path: Path, undisturbed: list[dict[str, Any]]) -> None:
    command = [*RUN, f"--set=engine.name={engine}"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=-1, stderr=-1, text=True) as process:
        while "gcs_server" not in children(process.pid):
            assert process.poll() is None
            time.sleep(0.02)
        process.terminate()
        said = assert_stopped(process, 143)
    assert "SIGTERM received" not in said  # Ray's own handler, which ends the process three seconds later
    assert_goes_on(tmp_path, undisturbed, {"state-0.json"})


ALARM = """
import signal
from fedcil.engines.ray_cluster import own_signals
from fedcil.port import StopSignal

with own_signals(StopSignal()):
    signal.signal(signal.SIGALRM, lambda *_: None)
    signal.alarm(60)
print(signal.getitimer(signal.ITIMER_REAL), signal.getsignal(signal.SIGALRM).name)
"""


def test_no_alarm_of_rays_stays_behind() -> None:
    done = subprocess.run([sys.executable, "-c", ALARM], capture_output=True, text=True, check=False)
    assert done.stdout == "(0.0, 0.0) SIG_DFL\n", done.stderr


KEYBOARD = """
import os, signal, threading, time
import fedcil, psutil, ray

signal.signal(signal.SIGINT, signal.default_int_handler)  # tests may run under nohup

def interrupt():
    while "gcs_server" not in {child.name() for child in psutil.Process().children()}:
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGINT)

threading.Thread(target=interrupt, daemon=True).start()
words = ["data={name='synthetic', classes=4}", "stream.tasks=2", "training={rounds=1, epochs=1}"]
words += ["engine={name='ray', workers=1}"]
try:
    fedcil.run("digits_fedavg", overrides=words, figures=False)
except KeyboardInterrupt:
    assert not ray.is_initialized()
    gone, alive = psutil.wait_procs(psutil.Process().children(recursive=True), timeout=5)
    assert not alive, alive
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())
    print(len(fedcil.run("digits_fedavg", overrides=words, figures=False).kind("round")))
"""


@pytest.mark.slow
def test_ctrl_c_in_a_program_of_ones_own_while_ray_starts(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KEYBOARD], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout == "2\n", done.stderr


WORKER = """
import multiprocessing, os, signal, subprocess, time
from fedcil.engines.signals import ignored_by_this_process_alone

ignored_by_this_process_alone()
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    os.kill(os.getpid(), number)
with subprocess.Popen(["sleep", "100"]) as program:
    program.terminate()
fork = multiprocessing.get_context("fork").Process(target=time.sleep, args=(100,))
fork.start()
fork.terminate()
fork.join()
print(program.returncode, fork.exitcode)
"""


def test_what_a_worker_starts_can_be_ended_and_it_cannot() -> None:
    with kept_from_children():
        worker = subprocess.Popen([sys.executable, "-c", WORKER], stdout=-1, text=True)
    try:
        assert worker.communicate(timeout=60)[0] == "-15 -15\n"
    finally:
        worker.kill()


def children(parent: int) -> set[str]:
    """Their names."""
    names = set()
    for child in psutil.Process(parent).children():
        with contextlib.suppress(psutil.Error):  # it has ended
            names.add(child.name())
    return names


def test_a_signal_that_ray_takes_for_itself_as_it_starts_is_the_runs() -> None:
    """Another thread, as libraries have them, takes it first."""
    over = threading.Event()

    def ray_starts(stop: StopSignal) -> None:
        with own_signals(stop):
            signal.signal(signal.SIGTERM, lambda number, _: sys.exit(number))
            os.kill(os.getpid(), signal.SIGTERM)
            over.wait(10)

    thread = threading.Thread(target=over.wait)
    thread.start()
    try:
        with stoppable(None) as stop:
            with pytest.raises(Stopped):
                ray_starts(stop)
            assert stop.exit_code == [143]
    finally:
        over.set()
        thread.join()


def start(folder: Path, engine: str) -> subprocess.Popen[str]:
    """A run that has recorded a round."""
    process = subprocess.Popen([*RUN, f"--set={engine}"], cwd=folder, stdout=-1, stderr=-1, text=True)
    for _ in range(1200):
        if any(path.stat().st_size for path in folder.glob("runs/*/metrics.jsonl")):
            return process
        assert process.poll() is None, "the run ended too early"
        time.sleep(0.05)
    process.kill()
    raise AssertionError("no round in a minute")


def assert_stopped(process: subprocess.Popen[str], code: int) -> str:
    try:
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code, said
    assert "continue it with `fedcil resume runs/" in said
    assert "Traceback" not in said
    return said


def assert_goes_on(
    folder: Path,
    undisturbed: list[dict[str, Any]],
    checkpoints: Set[str] = frozenset({"state-0.json", "state-1.json"}),  # the first and the last
) -> None:
    end = time.monotonic() + 60
    while any(process.info["cwd"] == str(folder) for process in psutil.process_iter(["cwd"])):
        assert time.monotonic() < end, "a process is left"
        time.sleep(0.1)
    (run,) = (folder / "runs").iterdir()
    assert {path.name for path in run.glob("checkpoints/*.json")} == checkpoints
    resume = [sys.executable, "-m", "fedcil", "resume", str(run), "--no-figures", "--set=engine={name='inline'}"]
    subprocess.run(resume, cwd=folder, timeout=120, check=True, stderr=subprocess.DEVNULL)
    assert results(folder) == undisturbed
