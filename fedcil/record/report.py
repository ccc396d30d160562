"""One HTML page about a run, finished or not: everything is inside the file, nothing is fetched."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from fedcil import metrics
from fedcil.errors import InputError
from fedcil.files import write_atomic
from fedcil.record.drawing import png_bytes
from fedcil.record.figures import class_names, run_figures
from fedcil.record.run import Run, costs
from fedcil.scenario import flatten

TEMPLATE = "report.html.jinja"
CAPTIONS = {
    "accuracy": "Test accuracy after every evaluated round; dotted lines are task boundaries.",
    "matrix": "Accuracy on the classes of each task, after each task, every class seen so far being a candidate.",
    "samples_per_task": "How many training samples the clients have in each task; every dot is a client.",
    "partition": "How many training samples of each class each client has.",
}
OTHER_METRICS = {
    "forgetting_authors": "forgetting, the MFCL authors' form",
    "backward_transfer": "backward transfer",
    "learning_accuracy": "learning accuracy",
    "final_task_aware_accuracy": "final accuracy, task known",
    "min_accuracy": "min-ACC",
    "worst_case_accuracy": "WC-ACC",
    "windowed_forgetting": "windowed forgetting",
    "windowed_plasticity": "windowed plasticity",
}


def write_report(run: Run, path: Path | None = None) -> Path:
    """Write the page to ``path``, by default into the run's folder. A folder gets a ``report.html``.

    Raises InputError if it cannot.
    """
    path = path or run.path
    try:
        path = path / "report.html" if path.is_dir() else path
        write_atomic(path, render_report(run).encode(errors="backslashreplace"))
    except OSError as error:
        raise InputError(
            f"cannot write the report: {error.strerror}", where=str(path), next="give another path with --output"
        ) from None
    return path


def render_report(run: Run) -> str:
    """The page as text."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "size": size, "duration": duration}
    return environment.get_template(TEMPLATE).render(
        run=run,
        scenario=run.scenario,
        progress=_progress(run),
        headline=_headline(run),
        others=[(label, run.summary.get(name)) for name, label in OTHER_METRICS.items()],
        figures=list(_figures(run)),
        matrix=[[None if np.isnan(value) else float(value) for value in row] for row in run.accuracy_matrix],
        tasks=[_task_row(run, task) for task in range(_tasks_begun(run))],
        boundaries=[_boundary(run, line) for line in run.kind("boundary") if _has_coverage(line)],
        rounds=[_rounds_of(run, task) for task in range(_tasks_begun(run))],
        toml=(run.path / "scenario.toml").read_text(encoding="utf-8"),
        environment=_rows(run.environment),
    )


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def size(count: float) -> str:
    """Bytes in the unit that fits, powers of ten."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _progress(run: Run) -> dict[str, int]:
    return {
        "tasks": run.scenario.stream.tasks,
        "ended": len(run.kind("task")),
        "rounds": len(run.kind("round")),
        "failures": sum(len(line["failures"]) for line in run.kind("round")),
    }


def _tasks_begun(run: Run) -> int:
    return max((line["task"] + 1 for line in run.lines), default=0)


def _headline(run: Run) -> dict[str, Any]:
    """The field's numbers; of an unfinished run those of the tasks that have ended."""
    a = run.accuracy_matrix
    scores: dict[str, float | None] = {}
    if len(a):
        n = run.test_counts
        scores = {
            "average incremental accuracy": metrics.average_incremental_accuracy(a, n),
            "final accuracy": metrics.final_accuracy(a, n),
            "forgetting": metrics.forgetting(a),
        }
    return {"scores": scores, **costs(run.lines)}


def _figures(run: Run) -> Iterator[dict[str, Any]]:
    for name, figure in run_figures(run).items():
        data = base64.b64encode(png_bytes(figure)).decode("ascii")
        width = round(90 * figure.get_figwidth())
        yield {"name": name.replace("_", " "), "data": data, "width": width, "caption": CAPTIONS[name]}


def _task_row(run: Run, task: int) -> dict[str, Any]:
    """One task's costs, and its accuracies if it has ended."""
    lines = [line for line in run.lines if line["task"] == task]
    end = next((line for line in lines if line["kind"] == "task"), None)
    row = {"rounds": sum(line["kind"] == "round" for line in lines), "end": None, **costs(lines)}
    if end is not None:
        row["end"] = {
            "seen": metrics.accuracy_after(run.accuracy_matrix, run.test_counts, task),
            "own": end["accuracy"][task],
            "aware": end["task_aware"][task],
            "images": end["test_images"][task],
            "classes": len(end["classes"]),
        }
    return row


def _has_coverage(line: Mapping[str, Any]) -> bool:
    """A method without a generator has neither."""
    return bool(_histogram(line) or line["warnings"])


def _histogram(line: Mapping[str, Any]) -> list[float]:
    """By class; an own method may mean something else by the name."""
    found = line.get("histogram")
    if not isinstance(found, list) or len(found) != len(line["classes"]):
        return []
    return found if all(type(each) in (int, float) and each >= 0 for each in found) else []


def _boundary(run: Run, line: Mapping[str, Any]) -> dict[str, Any]:
    histogram = _histogram(line)
    total = sum(histogram) or 1
    names = class_names(run, len(histogram))
    most = max([*histogram, 1])
    return {
        "task": line["task"],
        "warnings": line["warnings"],
        "seconds": line["cost"]["seconds"],
        "equal": total / max(len(histogram), 1) / most,
        "bars": [
            {"name": name, "count": count, "share": count / total, "height": count / most}
            for name, count in zip(names, histogram, strict=True)
        ],
    }


def _rounds_of(run: Run, task: int) -> dict[str, Any]:
    lines = [line for line in run.kind("round") if line["task"] == task]
    return {
        "lines": [{**line, **costs([line])} for line in lines],
        "failures": sum(len(line["failures"]) for line in lines),
        "short": sum(line["status"] != "ok" for line in lines),
        "seconds": costs(lines)["seconds"],
    }


def _rows(table: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Of a nested table: dotted keys and values as text."""
    return [
        (key, ", ".join(map(str, value)) if isinstance(value, list) else str(value))
        for key, value in flatten(table).items()
    ]
