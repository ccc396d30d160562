"""A client whose step never ends does not keep a run from ending, whatever the engine."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

HANGS = """
import sys, time
from fedcil.methods.base import Method
from fedcil.section import MethodSettings


class Hangs(MethodSettings):
    def build(self):
        def loss(model, prepared, batch, draws):
            print("a step", flush=True)
            time.sleep(100)
            return model(batch.images).sum()

        return Method(loss=loss)
"""


def run_that_hangs(tmp_path: Path, *words: str) -> subprocess.Popen[str]:
    (tmp_path / "hangs.py").write_text(HANGS)
    sets = ("--set", "method={name='hangs:Hangs'}", "--no-figures", "--output", "runs")
    command = [sys.executable, "-m", "fedcil", "run", "digits_fedavg", *sets, *words]
    return subprocess.Popen(command, cwd=tmp_path, stdout=-1, stderr=-1, text=True)


def test_a_second_ctrl_c_does_not_wait_for_a_step_that_hangs(tmp_path: Path) -> None:
    with run_that_hangs(tmp_path) as process:
        try:
            assert process.stdout is not None
            while "a step" not in process.stdout.readline():
                assert process.poll() is None
            for _ in range(2):
                process.send_signal(signal.SIGINT)
                time.sleep(0.5)
            assert process.wait(20) == 130
        finally:
            process.kill()


@pytest.mark.parametrize(
    "engine", ["workers=1", "workers=2", "name='ray', workers=1", "name='flower', workers=1"], ids=lambda words: words
)
def test_a_time_limit_does_not_wait_for_a_step_that_hangs(engine: str, tmp_path: Path) -> None:
    """Nor does SIGTERM, which sets the same signal."""
    with run_that_hangs(tmp_path, "--max-seconds", "3", "--set", f"engine={{{engine}}}") as process:
        try:
            _, said = process.communicate(timeout=100)
        finally:
            process.kill()
    assert process.returncode == 5
    assert "stopped: " in said
    assert "fedcil resume runs/" in said
