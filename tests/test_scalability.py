"""The scalability scripts as commands, at two points each: a CSV with every point, a picture, the fits."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest

from scenarios.scalability.common import Table, fit
from scenarios.scalability.workers import picture

ROOT = Path(__file__).parent.parent
POINTS = {"clients": "10,20", "cohort": "5,10", "tasks": "3,4", "model_size": "4,8"}


def script(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"scenarios.scalability.{name}", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", POINTS)
def test_a_script_measures_its_points_and_fits_them(name: str, tmp_path: Path) -> None:
    done = script(name, "--output", str(tmp_path), "--points", POINTS[name], "--repeats", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    with (tmp_path / f"{name}.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["experiment"] for row in rows} == {name}
    assert len({row["x"] for row in rows}) == 2
    assert all(float(row["value"]) >= 0 for row in rows if "less data" not in row["quantity"])
    assert "fit (least squares): " in done.stdout
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("clients", "--points", "10"),
        ("cohort", "--points", "5,1000"),
        ("tasks", "--points", "2,3"),
        ("model_size", "--repeats", "0"),
        ("model_size", "--repeats", "2,3"),
    ],
)
def test_what_cannot_be_measured_is_refused(name: str, option: str, value: str) -> None:
    done = script(name, option, value)
    assert done.returncode == 2
    assert option in done.stderr
    assert "Traceback" not in done.stderr


def test_a_fit_is_ordinary_least_squares() -> None:
    """Against the closed form: b = cov(x, y) / var(x), a = mean(y) - b mean(x)."""
    a, b = fit([1.0, 2.0, 4.0], [3.0, 4.0, 9.0])
    assert b == pytest.approx(29 / 14)
    assert a == pytest.approx(16 / 3 - 29 / 14 * 7 / 3)


def test_two_workers_are_held_against_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Strong: the same 8 clients. Weak: 8 clients on two against 4 on one."""
    seconds = {(4, 1): 2.0, (8, 1): 4.0, (8, 2): 3.0}
    table = Table("workers")
    for engine in ("inline", "ray"):
        for kind in ("CPU", "wall"):
            for (asked, workers), value in seconds.items():
                table.add(workers, 0, {f"{engine}, {asked} clients: {kind} s a round": value})
    picture(table, tmp_path / "workers.png")
    said = capsys.readouterr().out
    for kind, strong, weak in (("CPU", "1", "2"), ("wall", "0.5", "1")):
        assert f"inline, strong: 8 clients: {kind}(2) / {kind}(1) = 0.750 (ideal {strong})" in said
        assert f"ray, weak: 4 clients a worker: {kind}(2) / {kind}(1) = 1.500 (ideal {weak})" in said
    assert (tmp_path / "workers.png").read_bytes().startswith(b"\x89PNG")
