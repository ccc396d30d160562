"""CPU seconds of a round by parameters of the model: the clients' training, and the server's reduction.

    python -m scenarios.scalability.model_size [--output runs/scalability] [--points 4,8,16,32,64] [--repeats 2]

The network is widened, so its parameters and multiplications grow together (with the square of the width). What
clients send is added up as it comes in, within the client stage; the reduction is what the server does after that.
"""

from __future__ import annotations

import sys
from pathlib import Path

from scenarios.scalability.common import (
    Panel,
    Table,
    draw,
    measure,
    new_folder,
    options,
    plan,
    run,
    say_fit,
    say_load,
    tiny,
)

WIDTHS = (4, 8, 16, 32, 64)
CLIENTS, PER_CLIENT, SIZE = 10, 32, 16


def picture(table: Table, path: Path) -> None:
    """Both costs beside the fit and what is left of it without a constant part; the fits are printed."""
    panels = []
    for quantity, unit in (("training CPU s a round", "s"), ("reduce CPU ms a round", "ms")):
        a, b = say_fit(table, quantity, unit, "parameter")
        xs, ys = table.series(quantity)
        lines = {
            "ideal: proportional, the fit's slope": (xs, [b * x for x in xs]),
            "fit: a + b n": (xs, [a + b * x for x in xs]),
        }
        panels.append(Panel({"measured": (xs, ys)}, lines, "parameters", quantity))
    draw(path, "Size of the model, 5 clients a round", panels)


def main() -> int:
    given = options(__doc__, 2, WIDTHS).parse_args()
    folder, table = new_folder(given.output, "model_size"), Table("model_size")
    say_load()
    for repeat in range(given.repeats):
        for width in given.points:
            sizes = [f"model.width={width}", "training.rounds=8", "training.epochs=2"]
            overrides = [*tiny(CLIENTS, PER_CLIENT, tasks=1, size=SIZE), *sizes]
            costs = measure(run(folder, overrides))
            values = {
                "training CPU s a round": costs.client_cpu,
                "reduce CPU ms a round": 1e3 * costs.reduce_cpu,
                "peak MB": costs.memory_mb,
            }
            table.add(plan(overrides)["parameters"], repeat, values)
    say_fit(table, "peak MB", "MB", "parameter")
    table.write(given.output / "model_size.csv")
    picture(table, given.output / "model_size.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
