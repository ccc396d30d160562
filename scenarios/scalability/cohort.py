"""A round should cost in proportion to the clients that are asked: CPU seconds by cohort, of 500 clients.

python -m scenarios.scalability.cohort [--output runs/scalability] [--points 5,20,50,100,500] [--repeats 2]
"""

from __future__ import annotations

import sys

from scenarios.scalability.common import Panel, Table, draw, measure, new_folder, options, run, say_fit, say_load, tiny

COHORTS = (5, 20, 50, 100, 500)
CLIENTS, PER_CLIENT = 500, 20


def main() -> int:
    given = options(__doc__, 2, COHORTS, (1, CLIENTS)).parse_args()
    folder, table = new_folder(given.output, "cohort"), Table("cohort")
    say_load()
    for repeat in range(given.repeats):
        for cohort in given.points:
            sizes = [
                f"clients.per_round={cohort}",
                f"training.rounds={max(4, min(20, 400 // cohort))}",
                "training.epochs=2",
            ]
            costs = measure(run(folder, [*tiny(CLIENTS, PER_CLIENT, tasks=1), *sizes]))
            values = {
                "CPU s a round": costs.round_cpu,
                "CPU ms a client": 1e3 * costs.round_cpu / cohort,
                "reduce CPU ms a round": 1e3 * costs.reduce_cpu,
                "peak MB": costs.memory_mb,
            }
            table.add(cohort, repeat, values)
    _, slope = say_fit(table, "CPU s a round", "s", "asked client")
    say_fit(table, "peak MB", "MB", "asked client")
    table.write(given.output / "cohort.csv")
    xs, ys = table.series("CPU s a round")
    each = table.series("CPU ms a client")
    draw(
        given.output / "cohort.png",
        f"Clients asked in a round, of {CLIENTS}",
        [
            Panel(
                {"measured": (xs, ys)},
                {"ideal: linear through zero, the fit's slope": (xs, [slope * x for x in xs])},
                "clients asked in a round",
                "CPU seconds a round",
            ),
            Panel(
                {"measured": each},
                {"ideal: flat, the fit's slope": (xs, [1e3 * slope] * len(xs))},
                "clients asked in a round",
                "CPU ms for each",
                (True, False),
                True,
            ),
        ],
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
