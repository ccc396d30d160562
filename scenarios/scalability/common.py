"""What the scalability scripts share: runs in processes of their own, fits, a tidy CSV, figures."""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

import fedcil

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
Line = Mapping[str, Any]
Series = Mapping[str, tuple[Sequence[float], Sequence[float]]]
"""Values by name: (xs, ys)."""


def tiny(clients: int, per_client: int, *, tasks: int = 2, classes: int = 10, size: int = 8) -> list[str]:
    """Overrides: drawn images, so many of each client in a task; FedAvg with a small network on one thread."""
    per_class = per_client * clients * tasks // classes
    return [
        "name='scalability'",
        f"data={{name='synthetic', classes={classes}, samples_per_class={per_class}, image_size={size}}}",
        f"stream.tasks={tasks}",
        "partition={name='iid'}",
        f"clients={{count={clients}, per_round=5}}",
        "model={name='cnn', width=4}",
        "method={name='fedavg'}",
        "server.evaluate_every=0",
        "engine.workers=1",
        "device='cpu'",
    ]


def command(verb: str, scenario: str, overrides: Iterable[str], *more: str) -> list[str]:
    """``fedcil run`` or ``fedcil plan`` in this Python."""
    sets = [part for text in overrides for part in ("--set", text)]
    return [sys.executable, "-m", "fedcil", verb, scenario, *sets, *more, "--json"]


def environment() -> dict[str, str]:
    return os.environ | ENVIRONMENT


def plan(overrides: Iterable[str], scenario: str = "digits_fedavg") -> dict[str, Any]:
    """What ``fedcil plan --json`` says."""
    done = subprocess.run(
        command("plan", scenario, overrides), env=environment(), capture_output=True, text=True, check=True
    )
    facts: dict[str, Any] = json.loads(done.stdout)
    return facts


def run(output: Path, overrides: Iterable[str], scenario: str = "digits_fedavg") -> fedcil.Run:
    """A shipped scenario (or a path) with overrides, in a fresh process: nothing is warm from the run before."""
    more = ("--no-figures", "--output", str(output))
    done = subprocess.run(
        command("run", scenario, overrides, *more), env=environment(), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"a run ended with exit code {done.returncode}: {done.stdout}{done.stderr}")
    return fedcil.load(json.loads(done.stdout)["run_dir"])


@dataclass(frozen=True, slots=True)
class Measured:
    """Costs of a run: medians over its rounds (without the run's first), boundaries and evaluations at tasks' ends."""

    round_cpu: float
    round_wall: float
    client_wall: float
    client_cpu: float
    reduce_cpu: float
    boundary_cpu: float
    evaluation_cpu: float
    memory_mb: float


def stage_cpu(line: Line, stage: str) -> float:
    """A round's CPU seconds times the stage's share of its wall seconds: CPU is recorded for the round alone."""
    cost = line["cost"]
    share: float = cost["stages"][stage] / cost["seconds"]
    return share * float(cost["cpu_seconds"])


def middle(values: Iterable[float]) -> float:
    """The median, 0 if there is nothing."""
    return statistics.median([*values] or [0.0])


def measure(finished: fedcil.Run) -> Measured:
    rounds = finished.kind("round")[1:]
    return Measured(
        round_cpu=middle(line["cost"]["cpu_seconds"] for line in rounds),
        round_wall=middle(line["cost"]["seconds"] for line in rounds),
        client_wall=middle(line["cost"]["stages"]["clients"] for line in rounds),
        client_cpu=middle(stage_cpu(line, "clients") for line in rounds),
        reduce_cpu=middle(stage_cpu(line, "reduce") for line in rounds),
        boundary_cpu=middle(line["cost"]["cpu_seconds"] for line in finished.kind("boundary")),
        evaluation_cpu=middle(line["cost"]["cpu_seconds"] for line in finished.kind("task")),
        memory_mb=max(line["cost"]["peak_memory_mb"] for line in finished.lines),
    )


class Table:
    """Tidy rows: experiment, x, repeat, quantity, value."""

    def __init__(self, experiment: str) -> None:
        self.experiment = experiment
        self.rows: list[tuple[str, float, int, str, float]] = []

    def add(self, x: float, repeat: int, values: Mapping[str, float]) -> None:
        self.rows += [(self.experiment, x, repeat, name, value) for name, value in values.items()]
        shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        print(f"{self.experiment} x = {x:g}, repeat {repeat}: {shown}", flush=True)

    def series(self, quantity: str) -> tuple[list[float], list[float]]:
        """(xs, median over repeats of each)."""
        xs = sorted({x for _, x, _, name, _ in self.rows if name == quantity})
        mine = [(x, value) for _, x, _, name, value in self.rows if name == quantity]
        return xs, [middle(value for at, value in mine if at == x) for x in xs]

    def write(self, path: Path) -> None:
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("experiment", "x", "repeat", "quantity", "value"))
            writer.writerows(self.rows)
        print(f"wrote {path}")


def fit(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float]:
    """(a, b) of cost = a + b n by ordinary least squares: all points count alike, so large n decide b."""
    b, a = np.polyfit(np.asarray(xs, float), np.asarray(ys, float), 1)
    return float(a), float(b)


def say_fit(table: Table, quantity: str, unit: str, per: str) -> tuple[float, float]:
    """Print the fit of a quantity and the worst deviation of a point from it."""
    xs, ys = table.series(quantity)
    a, b = fit(xs, ys)
    worst = max(abs(a + b * x - y) for x, y in zip(xs, ys, strict=True))
    print(
        f"fit (least squares): {quantity} = {a:.4g} {unit} + {b:.4g} {unit} per {per}; "
        f"largest deviation of a point {worst:.2g} {unit}; largest / smallest {max(ys) / min(ys):.3g}"
    )
    return a, b


@dataclass(frozen=True, slots=True)
class Panel:
    """One plot: measured points, and what would be ideal."""

    points: Series
    ideal: Series
    x: str
    y: str
    log: tuple[bool, bool] = (True, True)
    zero: bool = False


def draw(path: Path, title: str, panels: Sequence[Panel]) -> None:
    """Panels side by side into a PNG."""
    figure, axes = plt.subplots(1, len(panels), figsize=(5.2 * len(panels), 3.8), squeeze=False, layout="constrained")
    for axis, panel in zip(axes[0], panels, strict=True):
        fill(axis, panel)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    print(f"wrote {path}")


def fill(axis: Axes, panel: Panel) -> None:
    for name, (xs, ys) in panel.points.items():
        axis.plot(xs, ys, "o", label=name)
    for place, (name, (xs, ys)) in enumerate(panel.ideal.items()):
        axis.plot(xs, ys, "--" if place % 2 == 0 else ":", color="0.4", linewidth=1, label=name)
    axis.set(xlabel=panel.x, ylabel=panel.y)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    if panel.log[0]:
        axis.set_xscale("log")
    if panel.log[1]:
        axis.set_yscale("log")
    if panel.zero:  # and room for the legend above what is flat
        axis.set_ylim(0, 1.7 * max(max(ys) for _, ys in [*panel.points.values(), *panel.ideal.values()]))
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")


def flat(series: tuple[list[float], list[float]]) -> tuple[list[float], list[float]]:
    """The first point's value everywhere."""
    xs, ys = series
    return xs, [ys[0]] * len(xs)


def options(
    description: str | None,
    repeats: int = 0,
    points: Sequence[int] = (),
    within: tuple[int, int] = (1, 10**6),
) -> argparse.ArgumentParser:
    """``repeats`` and ``points``: how often and where a script measures unless told otherwise; none if it cannot be.
    ``within``: the least and the largest point that it can measure.
    """
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/scalability"), help="CSV, figure and runs go here")
    if repeats:
        parser.add_argument("--repeats", type=times, default=repeats, help="how often each point is measured")
    if points:
        allowed = f"two or more rising numbers from {within[0]} to {within[1]}"
        kind = partial(rising, least=within[0], most=within[1])
        parser.add_argument("--points", type=kind, default=points, metavar="N,N,..", help=allowed)
    return parser


def times(text: str) -> int:
    if text.isdecimal() and 0 < int(text) <= 1000:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r}: allowed is a whole number from 1 to 1000")


def rising(text: str, least: int, most: int) -> list[int]:
    with contextlib.suppress(ValueError):
        found = [int(number) for number in text.split(",")]
        if len(found) > 1 and sorted(set(found)) == found and found[0] >= least and found[-1] <= most:
            return found
    raise argparse.ArgumentTypeError(f"{text!r}: allowed are two or more rising numbers from {least} to {most}")


def new_folder(output: Path, name: str) -> Path:
    """A fresh folder for the runs of one call."""
    output.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=output)).absolute()


def say_load() -> None:
    loads = ", ".join(f"{load:.2f}" for load in os.getloadavg())
    print(
        f"load average {loads} on {os.cpu_count()} cores: on a busy machine only CPU seconds mean something", flush=True
    )
