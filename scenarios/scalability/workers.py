"""One worker and two: the same 8 clients (strong scaling) and 4 clients a worker (weak), inline and over Ray.

    python -m scenarios.scalability.workers [--output runs/scalability] [--repeats 1]

CPU seconds are those that the run records: of its process and of its workers; Ray's own daemons are left out. Wall
seconds mean something on an idle machine only; CPU(2) / CPU(1) says how much work two workers add, whatever else runs.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

from scenarios.scalability.common import Panel, Table, draw, fit, options, run, say_load, tiny

CLIENTS, PER_CLIENT, SIZE = 8, 128, 32
ROUNDS = 6
CASES = {(8, 1): "8 clients, 1 worker", (8, 2): "8 clients, 2 workers", (4, 1): "4 clients, 1 worker"}


def picture(table: Table, path: Path) -> None:
    """Strong and weak scaling, CPU and wall, beside the ideal; the ratios are printed."""
    panels = []
    for kind, strong, weak in (("CPU", 1.0, 2.0), ("wall", 0.5, 1.0)):
        for scaling, asked, ratio in (("strong: 8 clients", 8, strong), ("weak: 4 clients a worker", 4, weak)):
            points, ideal = {}, {}
            for engine in ("inline", "ray"):
                one = table.series(f"{engine}, {asked} clients: {kind} s a round")[1][0]
                two = table.series(f"{engine}, 8 clients: {kind} s a round")[1][1]
                points[engine] = ([1.0, 2.0], [one, two])
                ideal[f"ideal ({engine})"] = ([1.0, 2.0], [one, ratio * one])
                a, b = fit(*points[engine])
                print(
                    f"{engine}, {scaling}: {kind}(2) / {kind}(1) = {two / one:.3f} (ideal {ratio:g}); through the two "
                    f"points: {kind} s a round = {a:.4g} s + {b:.4g} s per worker"
                )
            panels.append(Panel(points, ideal, f"workers ({scaling})", f"{kind} s a round", (False, False), True))
    draw(path, "One worker and two (on a busy machine only CPU seconds can be compared)", panels)


def main() -> int:
    given = options(__doc__, 1).parse_args()
    table = Table("workers")
    for repeat in range(given.repeats):
        for engine in ("inline", "ray"):
            for asked, workers in CASES:
                say_load()
                overrides = [
                    *tiny(CLIENTS, PER_CLIENT, tasks=1, size=SIZE),
                    f"clients.per_round={asked}",
                    "model.width=32",
                    f"training.rounds={ROUNDS}",
                    "training.epochs=2",
                    f"engine={{name='{engine}', workers={workers}}}",
                ]
                finished = run(given.output, overrides)
                rounds = [line["cost"] for line in finished.kind("round")[1:]]
                values = {
                    f"{engine}, {asked} clients: wall s a round": statistics.median(c["seconds"] for c in rounds),
                    f"{engine}, {asked} clients: CPU s a round": statistics.mean(c["cpu_seconds"] for c in rounds),
                }
                table.add(workers, repeat, values)
    table.write(given.output / "workers.csv")
    picture(table, given.output / "workers.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
