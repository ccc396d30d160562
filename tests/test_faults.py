"""The fault scripts in small: every fault of the table once or a few times, each with its required outcome."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from scenarios.reliability import deployment
from scenarios.reliability.common import Fault, Outcome
from scenarios.reliability.faults import FAULTS, examine

ROOT = Path(__file__).resolve().parent.parent
NAMES = {fault.name for fault in FAULTS}
INLINE = {
    "inline_kill": 3,
    "inline_sigterm": 2,
    "inline_sigint": 2,
    "inline_worker_kill": 2,
    "two_runs": 1,
    "torn_write": 100,
    "churn": 1,
}
DISK = {"missing_folder": 1, "disk_operation_fails": 8, "disk_dies": 4}
ROOT_ONLY = {"full_disk": 2, "read_only_disk": 1, "forbidden_folder": 1}
MESSAGES = {"messages_lost": 3, "messages_late": 3, "messages_storm": 5}
RAY = {
    "ray_worker_kill": 1,
    "ray_raylet_kill": 1,
    "ray_gcs_server_kill": 1,
    "ray_sigterm": 1,
    "ray_sigint": 1,
    "ray_kill": 1,
}
LONG = {"inline_pause"} | {fault.name for fault in deployment.FAULTS}  # half a minute or more each


def run(trials: int, name: str, tmp_path: Path, seed: int = 0) -> dict[str, Any]:
    """The script in a process of its own: it forks, and no test's threads may be in its way."""
    output = tmp_path / "faults.json"
    words = ["--trials", str(trials), "--only", name, "--seed", str(seed), "--output", str(output)]
    command = [sys.executable, "-m", "scenarios.reliability.faults", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    row: dict[str, Any] = json.loads(output.read_text())[name]
    assert done.returncode == 0, row["outcomes"]
    assert row["passed"] == row["trials"] == trials
    return row


def test_every_fault_of_the_table_is_tried_here_or_says_why_not() -> None:
    assert len(FAULTS) == len(NAMES)
    assert {*INLINE, *DISK, *ROOT_ONLY, *MESSAGES, *RAY, *LONG} == NAMES


@pytest.mark.slow
@pytest.mark.parametrize("name", [*INLINE, *MESSAGES])
def test_a_fault_has_the_outcome_that_is_required(name: str, tmp_path: Path) -> None:
    run({**INLINE, **MESSAGES}[name], name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", DISK)
def test_a_broken_disk_has_the_outcome_that_is_required(name: str, tmp_path: Path) -> None:
    """From an operation in the middle of the run on."""
    row = run(DISK[name], name, tmp_path, seed=120)
    if row["places"]:
        assert any("resumed to identical metrics" in what for what in row["outcomes"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ROOT_ONLY)
def test_a_full_or_forbidden_disk_has_the_outcome_that_is_required(name: str, tmp_path: Path) -> None:
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(tmp_path)], capture_output=True, check=False).returncode:
        pytest.skip("needs root, to mount a small disk")
    subprocess.run(["umount", str(tmp_path)], check=True)
    run(ROOT_ONLY[name], name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["killed", "read_only_disk", "forbidden_folder", "missing_folder"])
def test_a_run_that_ends_before_the_fault_passes(name: str, tmp_path: Path) -> None:
    """A fast machine is no fault."""
    late = (
        "import sys, time, pathlib\n"
        "from scenarios.reliability import common, disk, kills\n"
        "def ended(command, output):\n"
        "    while command.running() and not list(output.glob('*/summary.json')): time.sleep(0.05)\n"
        "    return common.folder_in(output)\n"
        "disk.await_checkpoint = kills.await_checkpoint = ended\n"
        "disk.moment = kills.moment = lambda seed: 0.0\n"
        f"print({'kills' if name == 'killed' else 'disk'}.{name}(0, pathlib.Path(sys.argv[1])))\n"
    )
    command = [sys.executable, "-c", late, str(tmp_path / "trial")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    if "mount" in done.stderr or "chattr" in done.stderr:
        pytest.skip("needs root, to mount a small disk")
    assert "passed=True" in done.stdout, done.stderr
    assert re.search("ended before|killed; resumed to identical", done.stdout)  # the kill may meet its last breath


@pytest.mark.slow
@pytest.mark.timeout(290)
@pytest.mark.parametrize("name", RAY)
def test_a_process_of_ray_that_dies_has_the_outcome_that_is_required(name: str, tmp_path: Path) -> None:
    run(RAY[name], name, tmp_path)


def test_the_script_tells_when_something_does_not_hold(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A trial that fails, and one that breaks: both count, with the seed that repeats them."""

    def trial(seed: int, workdir: Path) -> Outcome:
        if seed == 2:
            raise ValueError("oops")
        (workdir / "left").write_text("")
        return Outcome(seed != 1, "as it should be" if seed != 1 else "another model", 1.0 + seed)

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    row = examine(Fault("made_up", "nothing happens", trial), 4, seed=0)
    assert (row["trials"], row["passed"]) == (4, 2)
    assert row["outcomes"]["as it should be"] == 2
    failed = sorted(what for what in row["outcomes"] if "seed" in what)
    assert failed[0].startswith("another model (seed 1, ")
    assert failed[1].startswith("the trial itself broke: ValueError: oops (seed 2, ")
    assert row["recovery_s"] == {"median": 2.0, "max": 4.0}
    assert "another model" in capsys.readouterr().err
    assert len(list(tmp_path.iterdir())) == 2  # what failed can be looked at


def test_trials_of_a_fault_with_few_places_go_over_each_once() -> None:
    seeds: list[int] = []

    def trial(seed: int, workdir: Path) -> Outcome:
        seeds.append(seed)
        return Outcome(True, "")

    assert examine(Fault("made_up", "", trial, 100, most=lambda: 7), None, seed=0)["trials"] == 7
    assert seeds == list(range(7))
