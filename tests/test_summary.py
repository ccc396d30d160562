"""The tables of a finished run say what its record says."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

import fedcil
from fedcil.record import summary as summary_module

TABLES = {
    "name": "feder",
    "data": {"name": "synthetic", "classes": 6, "samples_per_class": 12, "image_size": 4, "test_per_class": 4},
    "stream": {"tasks": 3},
    "partition": {"name": "iid"},
    "clients": {"count": 3, "per_round": 3},
    "model": {"width": 2},
    "method": {"name": "feder", "memory": 4},
    "training": {"rounds": 2, "epochs": 1, "batch_size": 4},
    "engine": {"workers": 1},
}


def test_the_tables_of_a_finished_run_say_what_its_record_says(tmp_path: Path) -> None:
    run = fedcil.run(TABLES, output=tmp_path, figures=False)
    summary = json.loads((run.path / "summary.json").read_text())
    rounds, (first, second, last) = run.kind("round"), run.kind("task")
    assert summary["client_state_bytes"] == max(line["client_state_bytes"] for line in rounds) > 0
    assert summary["peak_memory_mb"] == max(line["cost"]["peak_memory_mb"] for line in rounds)
    aware = sum(last["task_aware"]) / 3  # of as many test images each
    assert summary["final_task_aware_accuracy"] == pytest.approx(aware)
    header, values = csv.reader((run.path / "summary.csv").read_text().splitlines())
    assert header == list(summary)
    assert values == ["" if value is None else str(value) for value in summary.values()]
    assert values[header.index("simulated_seconds")] == ""
    assert list(csv.reader((run.path / "accuracy_matrix.csv").read_text().splitlines())) == [
        ["after_task", "task_1", "task_2", "task_3"],
        ["1", *map(str, first["accuracy"]), "", ""],
        ["2", *map(str, second["accuracy"]), ""],
        ["3", *map(str, last["accuracy"])],
    ]


def test_the_window_of_windowed_metrics_is_ten_evaluations() -> None:
    """docs/metrics.md says so."""
    assert summary_module.WINDOW == 10
