"""A task should cost what the one before it did: CPU seconds of clients and boundary by number of tasks, with MFCL.

    python -m scenarios.scalability.tasks [--output runs/scalability] [--points 2,5,10,25,50] [--repeats 1]

Two new classes a task; a fixed number of synthetic images in a step. Evaluation is apart: it must grow, since after
task t the test images of all t tasks are looked at. The run's first boundary is warm-up, and is reported by itself.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

import fedcil
from scenarios.scalability.common import (
    Panel,
    Table,
    draw,
    flat,
    new_folder,
    options,
    run,
    say_fit,
    say_load,
    stage_cpu,
    tiny,
)

TASKS = (2, 5, 10, 25, 50)
CLIENTS, PER_CLIENT = 10, 20
METHOD = "method={name='mfcl', preset='small', steps=20, pool=256, synthetic=16}"


def client_cpu(finished: fedcil.Run) -> list[float]:
    """CPU seconds of the client stages of each task, in order."""
    rounds = finished.kind("round")
    tasks = range(len(finished.kind("task")))
    return [sum(stage_cpu(line, "clients") for line in rounds if line["task"] == task) for task in tasks]


def picture(table: Table, path: Path) -> None:
    """Clients and boundary of one task, late in the stream; evaluation apart."""
    names = ("client CPU s, last tasks", "boundary CPU s, last tasks")
    points = {name: table.series(name) for name in names}
    evaluation = table.series("evaluation CPU ms, last tasks")
    (first, *_), (cost, *_) = evaluation
    draw(
        path,
        "Tasks of two classes each, MFCL",
        [
            Panel(
                points,
                {f"ideal: flat ({name.split()[0]})": flat(series) for name, series in points.items()},
                "tasks of the stream",
                "CPU seconds of one task (median of the last 5)",
                (False, False),
                True,
            ),
            Panel(
                {"evaluation": evaluation},
                {"proportional to tasks seen": (evaluation[0], [cost * x / first for x in evaluation[0]])},
                "tasks of the stream",
                "CPU ms of one evaluation",
                (False, False),
                True,
            ),
        ],
    )


def main() -> int:
    parser = options(__doc__, 1, TASKS, (2, 1000))
    given = parser.parse_args()
    if given.points[-2] < 3:
        parser.error("--points: two must be 3 or more: a run's first boundary is left out, and a fit takes two")
    folder, table = new_folder(given.output, "tasks"), Table("tasks")
    say_load()
    for repeat in range(given.repeats):
        for tasks in given.points:
            sizes = tiny(CLIENTS, PER_CLIENT, tasks=tasks, classes=2 * tasks)
            finished = run(folder, [*sizes, METHOD, "training.rounds=3", "training.epochs=2"])
            clients = client_cpu(finished)[1:]  # the first task replays nothing
            boundaries = [line["cost"]["cpu_seconds"] for line in finished.kind("boundary")]
            evaluations = [line["cost"]["cpu_seconds"] for line in finished.kind("task")]
            values = {
                "client CPU s a task": statistics.median(clients),
                "client CPU s, last tasks": statistics.median(clients[-5:]),
                "first boundary CPU s": boundaries[0],
                "evaluation CPU ms, last tasks": 1e3 * statistics.median(evaluations[-min(5, tasks - 1) :]),
                "peak MB": max(line["cost"]["peak_memory_mb"] for line in finished.lines),
            }
            if later := boundaries[1:]:  # the first one of a run pays for what torch loads and allocates
                values["boundary CPU s a task"] = statistics.median(later)
                values["boundary CPU s, last tasks"] = statistics.median(later[-5:])
            table.add(tasks, repeat, values)
    for quantity in ("client CPU s a task", "client CPU s, last tasks", "boundary CPU s a task"):
        say_fit(table, quantity, "s", "task of the stream")
    say_fit(table, "boundary CPU s, last tasks", "s", "task of the stream")
    say_fit(table, "evaluation CPU ms, last tasks", "ms", "task of the stream")
    table.write(given.output / "tasks.csv")
    picture(table, given.output / "tasks.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
