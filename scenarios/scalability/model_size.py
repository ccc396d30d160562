"""CPU seconds of a round by parameters of the model: the clients' training, and the server's reduction.

    python scenarios/scalability/model_size.py [--output runs/scalability] [--repeats 2]

The network is widened, so its parameters and multiplications grow together (with the square of the width). What
clients send is added up as it comes in, within the client stage; the reduction is what the server does after that.
"""

from __future__ import annotations

import sys

from common import Panel, Table, draw, measure, new_folder, options, plan, run, say_fit, say_load, tiny

WIDTHS = (4, 8, 16, 32, 64)
CLIENTS, PER_CLIENT, SIZE = 10, 32, 16


def main() -> int:
    parser = options(__doc__)
    parser.add_argument("--repeats", type=int, default=2)
    given = parser.parse_args()
    folder, table = new_folder(given.output, "model_size"), Table("model_size")
    say_load()
    for repeat in range(given.repeats):
        for width in WIDTHS:
            sizes = [f"model.width={width}", "training.rounds=8", "training.epochs=2"]
            overrides = [*tiny(CLIENTS, PER_CLIENT, tasks=1, size=SIZE), *sizes]
            costs = measure(run(folder, overrides))
            values = {
                "training CPU s a round": costs.client_cpu,
                "reduce CPU ms a round": 1e3 * costs.reduce_cpu,
                "peak MB": costs.memory_mb,
            }
            table.add(plan(overrides)["parameters"], repeat, values)
    _, train = say_fit(table, "training CPU s a round", "s", "parameter")
    _, reduce = say_fit(table, "reduce CPU ms a round", "ms", "parameter")
    say_fit(table, "peak MB", "MB", "parameter")
    table.write(given.output / "model_size.csv")
    quantities = (("training CPU s a round", train), ("reduce CPU ms a round", reduce))
    panels = []
    for quantity, slope in quantities:
        xs, ys = table.series(quantity)
        ideal = {"ideal: proportional, the fit's slope": (xs, [slope * x for x in xs])}
        panels.append(Panel({"measured": (xs, ys)}, ideal, "parameters", quantity))
    draw(given.output / "model_size.png", "Size of the model, 5 clients a round", panels)
    return 0


if __name__ == "__main__":
    sys.exit(main())
