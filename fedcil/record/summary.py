"""A run's metrics in one small table: summary.json, summary.csv and accuracy_matrix.csv."""

from __future__ import annotations

import csv
import io
import json
import math
from typing import Any

from fedcil import metrics
from fedcil.errors import InputError, RunFailed
from fedcil.metrics import Matrix
from fedcil.record.folder import RunFolder
from fedcil.record.run import Run, costs

WINDOW = 10  # evaluations, for windowed forgetting and plasticity


def finish(folder: RunFolder) -> Run:
    """Write the tables of a run that came to its end; summary.json last, since it says so. RunFailed if what was
    recorded cannot be read back.
    """
    run = Run(folder.path)
    try:
        summary = summarise(run)
    except InputError as error:
        raise RunFailed(error.what, where=error.where, next="see to the disk, then `fedcil resume RUN`") from None
    folder.write("accuracy_matrix.csv", matrix_csv(run.accuracy_matrix))
    folder.write("summary.csv", summary_csv(summary))
    folder.write("summary.json", json.dumps(summary, indent=1))
    return Run(folder.path)


def summarise(run: Run) -> dict[str, Any]:
    """Every scalar of a finished run; accuracies are fractions, None where a metric is not defined."""
    a, n = run.accuracy_matrix, run.test_counts
    trace, ends = run.trace
    rounds = run.kind("round")
    return {
        "run_dir": str(run.path),
        "name": run.scenario.name,
        "method": run.scenario.method.name,
        "seed": run.scenario.seed,
        "engine": run.scenario.engine.name,
        "average_incremental_accuracy": metrics.average_incremental_accuracy(a, n),
        "final_accuracy": metrics.final_accuracy(a, n),
        "forgetting": metrics.forgetting(a),
        "forgetting_authors": metrics.forgetting_authors(a),
        "backward_transfer": metrics.backward_transfer(a),
        "learning_accuracy": metrics.learning_accuracy(a),
        "final_task_aware_accuracy": metrics.pooled_accuracy(run.kind("task")[-1]["task_aware"], n),
        "min_accuracy": metrics.min_accuracy(trace, ends),
        "worst_case_accuracy": metrics.worst_case_accuracy(trace, ends),
        "windowed_forgetting": metrics.windowed_forgetting(trace, WINDOW),
        "windowed_plasticity": metrics.windowed_plasticity(trace, WINDOW),
        "rounds": len(rounds),
        "short_rounds": sum(line["status"] != "ok" for line in rounds),
        "client_failures": sum(len(line["failures"]) for line in rounds),
        "simulated_seconds": _simulated(run),
        **costs(run.lines),
        "client_state_bytes": max((line["client_state_bytes"] for line in rounds), default=0),
        "peak_memory_mb": max((line["cost"]["peak_memory_mb"] for line in rounds), default=0.0),
    }


def _simulated(run: Run) -> float | None:
    """Of all rounds; None where no simulated clock ran."""
    seconds = [line["simulated_seconds"] for line in run.kind("round") if "simulated_seconds" in line]
    return math.fsum(seconds) if seconds else None


def summary_csv(summary: dict[str, Any]) -> str:
    """Two rows: names and values; empty for None."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(summary)
    writer.writerow(["" if value is None else value for value in summary.values()])
    return out.getvalue()


def matrix_csv(matrix: Matrix) -> str:
    """One row per task that ended, one column per task that was tested; empty where it had not come yet."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["after_task", *(f"task_{j + 1}" for j in range(matrix.shape[1]))])
    for t, row in enumerate(matrix):
        writer.writerow([t + 1, *("" if math.isnan(value) else value for value in row)])
    return out.getvalue()
