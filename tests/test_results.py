"""The command behind the tables: it stops when its time is up, goes on from there, and prints what is recorded."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import fedcil
from fedcil.scenario_file import load_scenario
from scenarios import results, turnover

ROOT = Path(results.__file__).parent.parent
TINY = (
    "data={name='synthetic', classes=20, samples_per_class=6}",
    "stream.tasks=2",
    "clients={count=4, per_round=2}",
    "model={name='cnn', width=4}",
    "training.rounds=2",
    "training.epochs=1",
)


def test_the_paper_is_not_done_unless_it_is_named() -> None:
    assert set(results.BY_NAME_ONLY) < results.TABLES.keys()


@pytest.mark.parametrize("row", results.TABLES["paper"], ids=lambda row: row.name)
def test_rows_of_the_paper_are_its_protocol(row: results.Row) -> None:
    """10 tasks x 100 rounds x 5 of 50 clients x 10 epochs of ResNet-18, whatever the method."""
    scenario = load_scenario(row.scenario, [f"name={row.name}", *row.overrides])
    assert (scenario.stream.tasks, scenario.training.rounds, scenario.training.epochs) == (10, 100, 10)
    assert (scenario.clients.count, scenario.clients.per_round, scenario.model.name) == (50, 5, "resnet18")
    preset = {"paper_mfcl": "paper", "paper_mfcl_authors-code": "authors-code"}.get(row.name)
    assert getattr(scenario.method, "preset", None) == preset


def test_a_folder_in_which_no_run_was_begun_is_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As a full disk leaves one, or a kill."""
    for name in ("digits_fedavg-0-20261201-000000", "turnover_boundaries_0_mfcl-0-20261201-000000"):
        (tmp_path / name).mkdir()
    results.print_table("digits", tmp_path)
    turnover.write_csv(tmp_path)
    assert "| run | seeds |" in capsys.readouterr().out


def test_one_seed_has_no_deviation() -> None:
    assert turnover.cell(42.9, None) == "42.9"
    assert turnover.cell(42.9, 1.25) == "42.9 ± 1.2"


@pytest.mark.slow
def test_the_paper_in_small_over_several_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        replace(row, overrides=(*row.overrides, *(("method.steps=20",) if "mfcl" in row.name else ())))
        for row in results.TABLES["paper"]
    ]
    monkeypatch.setitem(results.TABLES, "paper", rows)
    words = [
        "paper",
        "--seeds",
        "0",
        "--jobs",
        "1",
        "--output",
        str(tmp_path),
        *(w for s in TINY for w in ("--set", s)),
    ]
    assert results.main([*words, "--max-seconds", "0.2"]) == results.STOPPED
    said = capsys.readouterr().out
    assert "paper_mfcl seed 0: time is up, a checkpoint is saved" in said
    assert "paper_oracle seed 0: not begun" in said
    (stopped,) = tmp_path.glob("paper_mfcl-0-*/")
    assert not fedcil.load(stopped).finished
    assert results.main(words) == 0
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| paper")]
    assert [line.split(" | ")[0] for line in table] == [f"| {row.name}" for row in rows]
    assert fedcil.load(stopped).finished  # the same folder, continued


@pytest.fixture
def heeded() -> Iterator[None]:
    """A shell ignores Ctrl-C for what it starts in the background, tests for instance, and all that these start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.slow
@pytest.mark.usefixtures("heeded")
def test_a_key_press_stops_it_between_runs_without_a_traceback(tmp_path: Path) -> None:
    words = ["digits", "--seeds", "0", "--jobs", "1", "--output", str(tmp_path), "--set", "training.rounds=1000"]
    command = [sys.executable, str(ROOT / "scenarios" / "results.py"), *words]
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as running:
        try:
            until = time.monotonic() + 60
            while not list(tmp_path.glob("digits_fedavg-0-*/metrics.jsonl")):
                assert time.monotonic() < until
                time.sleep(0.1)
            os.killpg(running.pid, signal.SIGINT)  # what a terminal does
            said, complaint = running.communicate(timeout=60)
        except BaseException:
            os.killpg(running.pid, signal.SIGKILL)
            raise
    assert running.returncode == 130
    assert said == "digits_fedavg seed 0: stopped\n"
    assert complaint == "stopped: the same command goes on from there\n"


def test_a_row_of_two_tables_is_run_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run: list[tuple[str, str]] = []
    monkeypatch.setattr(results, "run_one", lambda row, seed, *_: run.append((row.name, seed)) or 0)
    assert results.main(["--output", str(tmp_path)]) == 0
    assert len(run) == len(set(run))
    assert ("cifar100_small_mfcl", "1") in run


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nonsense"], "no table 'nonsense'; there are digits,"),
        (["digits", "--jobs", "0"], "--jobs must be at least 1"),
        (["digits", "--seeds", "a"], "--seeds 'a' is no list of numbers"),
    ],
)
def test_wrong_words_are_refused_before_anything_runs(
    words: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        results.main([*words, "--output", str(tmp_path / "out")])
    assert end.value.code == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
