"""Memory does not grow with rounds: the long run of scenarios/reliability/memory.py, in small."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from scenarios.reliability.memory import Sample, judge

ROOT = Path(__file__).resolve().parent.parent


def samples(growth: float) -> list[Sample]:
    return [Sample(r, 100.0 + growth * r, 50.0, 1, 10) for r in range(1, 201, 5)]


def test_what_grows_is_found() -> None:
    """100 MB and 0.01 MB a round stay within 5 % of round 20; 0.1 MB a round does not."""
    assert judge(samples(0.01), 200)["passed"]
    grown = judge(samples(0.1), 200)
    assert not grown["passed"]
    assert grown["resident"]["round_20"] == pytest.approx(102.35, abs=0.1)
    assert grown["resident"]["end"] == pytest.approx(118.9, abs=0.5)


@pytest.mark.slow
def test_100_rounds_inline_need_what_20_need(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "scenarios.reliability.memory", "--rounds", "100", "--clients", "20"]
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "memory")], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "memory-inline.json").read_text())
    files = result["files"]
    assert files["end"] < files["round_20"] + 2  # one of the run's own may be open as it is looked at
    assert len((tmp_path / "memory-inline.csv").read_text().splitlines()) > 15
