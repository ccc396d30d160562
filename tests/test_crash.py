"""kill -9 at a random moment, then resume: the metrics of an undisturbed run, every time."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import fedcil

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

KILLS = 20
SETTINGS = [
    "method={name='mfcl', preset='small', steps=10, pool=64}",
    "data.classes=6",
    "stream.tasks=3",
    "training.rounds=3",
    "training.epochs=1",
]
SETS = [part for setting in SETTINGS for part in ("--set", setting)]


# A process that has imported all of it, and becomes fedcil with the words of each line; it says how each of them ended.
STEM = """
import json, os, sys
import torch
import fedcil.cli.runs, fedcil.engines.inline
from fedcil.cli import main

torch.set_num_threads(1)
for line in sys.stdin:
    child = os.fork()
    if not child:
        sys.argv = ["fedcil", *json.loads(line)]
        for stream in (0, 1):
            os.dup2(os.open(os.devnull, os.O_RDWR), stream)
        main()
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Stem:
    """``fedcil`` in processes of its own, without the seconds that importing torch takes."""

    def __init__(self, cwd: Path) -> None:
        command = [sys.executable, "-c", STEM]
        self.process = subprocess.Popen(command, cwd=cwd, stdin=-1, stdout=-1, text=True, process_group=0)

    def start(self, *arguments: str) -> int:
        """The id of its process."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([*arguments, "--no-figures"]) + "\n")
        self.process.stdin.flush()
        return self._said()

    def end(self) -> int:
        """How it ended, as `Popen.returncode`."""
        return self._said()

    def _said(self) -> int:
        assert self.process.stdout is not None
        return int(self.process.stdout.readline())


@pytest.fixture
def stem(tmp_path: Path) -> Iterator[Stem]:
    stem = Stem(tmp_path)
    try:
        yield stem
    finally:
        os.killpg(stem.process.pid, signal.SIGKILL)
        stem.process.communicate()


def test_resume_after_kill_9_at_random_moments(tmp_path: Path, stem: Stem) -> None:
    """The moments are spread over the time from the first checkpoint to the end; the seed names them."""
    moments = random.Random(0)
    stem.start("run", "digits_mfcl", *SETS, "--output", "whole")
    assert stem.end() == 0
    (whole,) = (tmp_path / "whole").iterdir()
    expected = fedcil.load(whole).results
    seconds = sum(line["cost"]["seconds"] for line in fedcil.load(whole).lines)
    killed = trial = 0
    while killed < KILLS:
        trial += 1
        assert trial <= 3 * KILLS, "most runs ended before they could be killed"
        output = tmp_path / f"trial-{trial}"
        process = stem.start("run", "digits_mfcl", *SETS, "--output", str(output))
        wait_for_checkpoint(output)
        time.sleep(moments.uniform(0, 0.9 * seconds))
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.kill(process, signal.SIGKILL)
        killed += stem.end() == -9
        (folder,) = output.iterdir()
        stem.start("resume", str(folder))
        assert stem.end() == 0
        assert fedcil.load(folder).results == expected, f"trial {trial}"


def wait_for_checkpoint(output: Path) -> None:
    for _ in range(1200):
        if list(output.glob("*/checkpoints/state-*.json")):
            return
        time.sleep(0.05)
    raise AssertionError("no checkpoint in a minute")
