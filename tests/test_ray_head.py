"""The watch over Ray's head, without Ray: somebody always says what happened."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from fedcil.engines import ray_head
from fedcil.errors import RunFailed
from fedcil.port import StopSignal

ROOT = Path(__file__).resolve().parent.parent


def inside(code: str) -> subprocess.CompletedProcess[str]:
    script = f"import os, signal\nfrom fedcil.engines import ray_head\nwith ray_head.last_words():\n    {code}"
    return subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("code", ["os._exit(1)", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_a_process_that_ends_without_a_word_has_last_words(code: str) -> None:
    done = inside(code)
    assert done.returncode in (1, -9)
    assert done.stderr.startswith("error: this process was ended from outside")
    assert "`fedcil resume RUN`" in done.stderr


def test_a_process_that_ends_as_it_should_has_none() -> None:
    assert inside("pass").stderr == ""
    assert "error:" not in inside("raise SystemExit(3)").stderr


def test_what_ray_had_started_ends_with_a_process_that_ends_without_a_word() -> None:
    with subprocess.Popen(["sleep", "60"]) as left:
        script = (
            f"import os\nfrom fedcil.engines import ray_head\nwith ray_head.last_words([{left.pid}]):\n    os._exit(1)"
        )
        done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.stderr.startswith("error: ")
        assert left.wait(5) == -9


def test_it_ends_where_nobody_hears_the_last_words() -> None:
    with subprocess.Popen(["sleep", "60"]) as left:
        script = (
            f"import os\nfrom fedcil.engines import ray_head\nwith ray_head.last_words([{left.pid}]):\n    os._exit(1)"
        )
        reader, writer = os.pipe()
        os.close(reader)
        subprocess.run([sys.executable, "-c", script], cwd=ROOT, stderr=writer, check=False)
        os.close(writer)
        assert left.wait(5) == -9


def test_the_head_and_what_it_started_are_its_family(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_head, "HEAD", ("bash",))
    with subprocess.Popen(["bash", "-c", "sleep 60 & wait"]) as head, subprocess.Popen(["sleep", "60"]) as other:
        try:
            end = time.monotonic() + 5
            while len(ray_head.family()) < 2 and time.monotonic() < end:
                time.sleep(0.02)
            assert set(ray_head.family()) == {head.pid, *(child.pid for child in psutil.Process(head.pid).children())}
            assert other.pid not in ray_head.family()
        finally:
            for process in (*psutil.Process(head.pid).children(), psutil.Process(head.pid), other):
                process.kill()


def test_a_worker_is_no_heir(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may end hours before its head, and its id be somebody else's."""
    monkeypatch.setattr(ray_head, "HEAD", ("bash",))
    script = "bash -c 'exec -a ray::IDLE sleep 60' & bash -c 'exec -a ray::RuntimeEnvAgent sleep 60' & wait"
    with subprocess.Popen(["bash", "-c", script]) as head:
        process = psutil.Process(head.pid)
        try:
            end = time.monotonic() + 5
            while time.monotonic() < end:
                names = {" ".join(child.cmdline()): child.pid for child in process.children()}
                if names.keys() == {"ray::IDLE 60", "ray::RuntimeEnvAgent 60"}:
                    break
                time.sleep(0.02)
            assert set(ray_head.family()) == {head.pid, names["ray::RuntimeEnvAgent 60"]}
        finally:
            for each in (*process.children(), process):
                each.kill()


def test_the_death_of_the_head_is_a_problem_that_engines_look_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_head, "HEAD", ("sleep",))
    monkeypatch.setattr(ray_head, "LOOK_S", 0.05)
    stop = StopSignal()
    waits = ["sh", "-c", "read x"]
    with (
        subprocess.Popen(waits, stdin=-1) as another,
        subprocess.Popen(["sleep", "60"]) as head,
        subprocess.Popen(waits, stdin=-1) as worker,
    ):
        with ray_head.watched(stop, {another.pid}, threading.Event()):
            time.sleep(0.2)
            stop.check()
            head.kill()
            end = time.monotonic() + 5
            while not stop.problem and time.monotonic() < end:
                time.sleep(0.02)
            with pytest.raises(RunFailed, match="its sleep ended"):
                stop.check()
        assert worker.wait(5) == -9  # what is left of Ray would hang about
        assert another.poll() is None  # whoever runs fedcil may have children of his own
        another.kill()
    assert not [child for child in psutil.Process().children() if child.is_running()]
