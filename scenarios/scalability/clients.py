"""Clients that exist but are not asked should cost nothing: CPU and memory by number of clients at a cohort of 5.

    python -m scenarios.scalability.clients [--output runs/scalability] [--points 10,100,1000,10000] [--repeats 2]

Each client has 4 images in each of 2 tasks, so the work of a round is the same for all counts. Memory is the peak of
the process since the first round, less images and index arrays, which must grow.
"""

from __future__ import annotations

import resource
import sys

import numpy as np

import fedcil
from scenarios.scalability.common import (
    Panel,
    Table,
    draw,
    flat,
    measure,
    new_folder,
    options,
    plan,
    run,
    say_fit,
    say_load,
    tiny,
)

COUNTS = (10, 100, 1000, 10_000)
PER_CLIENT, SIZE, TEST_IMAGES = 4, 8, 200
ROUNDS = "training.rounds=30"


def data_mb(finished: fedcil.Run, clients: int) -> tuple[float, float]:
    """(index arrays, images) in MB of 2^20 bytes."""
    with np.load(finished.path / "partition.npz", allow_pickle=False) as arrays:
        indices = sum(arrays[name].nbytes for name in arrays.files)
    images = (2 * PER_CLIENT * clients + TEST_IMAGES) * (SIZE * SIZE + 8)  # uint8 pixels and an int64 label
    return indices / 2**20, images / 2**20


def child_cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> int:
    given = options(__doc__, 2, COUNTS, (5, 10**6)).parse_args()
    folder, table = new_folder(given.output, "clients"), Table("clients")
    say_load()
    for repeat in range(given.repeats):
        for clients in given.points:
            overrides = [*tiny(clients, PER_CLIENT, size=SIZE), ROUNDS]
            before = child_cpu()
            finished = run(folder, overrides)
            process = child_cpu() - before
            before = child_cpu()
            plan(overrides)
            start = child_cpu() - before  # imports, data, partition: what both do
            costs = measure(finished)
            indices, images = data_mb(finished, clients)
            values = {
                "CPU ms a round": 1e3 * costs.round_cpu,
                "CPU s of the process": process,
                "CPU s to plan": start,
                "peak MB": costs.memory_mb,
                "index MB": indices,
                "peak MB less data": costs.memory_mb - indices - images,
            }
            table.add(clients, repeat, values)
    for quantity, unit in (
        ("CPU ms a round", "ms"),
        ("peak MB", "MB"),
        ("peak MB less data", "MB"),
        ("CPU s of the process", "s"),
        ("CPU s to plan", "s"),
    ):
        say_fit(table, quantity, unit, "client")
    table.write(given.output / "clients.csv")
    cpu, memory = table.series("CPU ms a round"), table.series("peak MB less data")
    draw(
        given.output / "clients.png",
        "More clients, 5 asked in a round",
        [
            Panel({"measured": cpu}, {"ideal: flat": flat(cpu)}, "clients", "CPU ms a round", (True, False), True),
            Panel(
                {"measured": memory, "with data": table.series("peak MB")},
                {"ideal: flat": flat(memory)},
                "clients",
                "peak MB, less images and indices",
                (True, False),
                True,
            ),
        ],
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
