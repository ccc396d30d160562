"""kill -9 at a random moment, then resume: the metrics of an undisturbed run, every time."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

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
QUIET = ["--no-figures", "--json"]


def metrics(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "cost"} for line in lines]


def fedcil(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fedcil", *arguments, *QUIET]
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return str(json.loads(out)["run_dir"])


def test_resume_after_kill_9_at_random_moments(tmp_path: Path) -> None:
    """The moments are spread over the time from the first checkpoint to the end; the seed names them."""
    moments = random.Random(0)
    whole = tmp_path / finish(fedcil("run", "digits_mfcl", *SETS, cwd=tmp_path))
    expected = metrics(whole)
    seconds = sum(json.loads(line)["cost"]["seconds"] for line in (whole / "metrics.jsonl").read_text().splitlines())
    killed = trial = 0
    while killed < KILLS:
        trial += 1
        assert trial <= 3 * KILLS, "most runs ended before they could be killed"
        output = tmp_path / f"trial-{trial}"
        process = fedcil("run", "digits_mfcl", *SETS, "--output", str(output), cwd=tmp_path)
        wait_for_checkpoint(output)
        time.sleep(moments.uniform(0, 0.9 * seconds))
        process.kill()
        process.communicate()
        killed += process.returncode == -9
        (folder,) = output.iterdir()
        finish(fedcil("resume", str(folder), cwd=tmp_path))
        assert metrics(folder) == expected, f"trial {trial}"


def wait_for_checkpoint(output: Path) -> None:
    for _ in range(1200):
        if list(output.glob("*/checkpoints/state-*.json")):
            return
        time.sleep(0.05)
    raise AssertionError("no checkpoint in a minute")
