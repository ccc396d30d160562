"""A client whose step never ends does not keep a run from ending, whatever the engine."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
WAIT_S = 200.0  # for what takes seconds on an idle machine: only what never ends is waited for in vain

HANGS = """
import time
from fedcil.methods.base import Method
from fedcil.methods.settings import MethodSettings


class Hangs(MethodSettings):
    def build(self):
        def loss(model, prepared, batch, draws):
            open("a_step", "w").close()
            time.sleep(1000)
            return model(batch.images).sum()

        return Method(loss=loss)
"""


def run_that_hangs(tmp_path: Path, *words: str) -> subprocess.Popen[str]:
    (tmp_path / "hangs.py").write_text(HANGS)
    sets = ("--set", "method={name='hangs:Hangs'}", "--no-figures", "--output", "runs")
    command = [sys.executable, "-m", "fedcil", "run", "digits_fedavg", *sets, *words]
    return subprocess.Popen(command, cwd=tmp_path, stdout=-1, stderr=-1, text=True)


def await_a_step(process: subprocess.Popen[str], folder: Path) -> None:
    while not (folder / "a_step").exists():
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(0.3)


def test_a_second_ctrl_c_ends_it_at_once(tmp_path: Path) -> None:
    with run_that_hangs(tmp_path) as process:
        try:
            await_a_step(process, tmp_path)
            for _ in range(2):
                process.send_signal(signal.SIGINT)
                time.sleep(1.0)
            assert process.wait(WAIT_S) == 130
        finally:
            process.kill()


@pytest.mark.parametrize(
    "engine",
    ["workers=1", "workers=2, processes=true", "name='ray', workers=1", "name='flower', workers=1"],
    ids=lambda words: words,
)
def test_sigterm_ends_it_with_a_checkpoint(engine: str, tmp_path: Path) -> None:
    with run_that_hangs(tmp_path, "--set", f"engine={{{engine}}}") as process:
        try:
            await_a_step(process, tmp_path)
            process.terminate()
            _, said = process.communicate(timeout=WAIT_S)
        finally:
            process.kill()
    assert process.returncode == 143
    assert "stopped: " in said
    assert "fedcil resume runs/" in said


def test_a_time_limit_ends_it(tmp_path: Path) -> None:
    with run_that_hangs(tmp_path, "--max-seconds", "8") as process:
        try:
            _, said = process.communicate(timeout=WAIT_S)
        finally:
            process.kill()
    assert (tmp_path / "a_step").exists()
    assert process.returncode == 5
    assert "stopped: " in said


def test_flowers_simulation_ends_with_its_files(tmp_path: Path) -> None:
    """Where nobody answers, the model stays; the run is recorded all the same, and says that it came to nothing."""
    sets = [
        "engine={name='flower', workers=1}",
        "server={deadline_s=8, patience=9}",
        "stream.tasks=1",
        "data.classes=2",
    ]
    words = [word for text in (*sets, "training.rounds=1") for word in ("--set", text)]
    with run_that_hangs(tmp_path, *words) as process:
        try:
            _, said = process.communicate(timeout=WAIT_S)
        finally:
            process.kill()
    assert process.returncode == 1, said
    assert "clients that hang in a step are ended, since the run is over" in said
    assert list((tmp_path / "runs").glob("*/summary.json"))
