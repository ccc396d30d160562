"""What a method still knows when its clients have gone: accuracy and forgetting against turnover, by one command.

    python scenarios/turnover.py [--seeds 0,1,2] [--output runs/turnover] [--figure runs/turnover/turnover.png]

Handwritten digits, 5 tasks of 2 classes. (i) A share of 20 members is replaced at each task boundary. (ii) A share of
10 members is replaced before every round inside a task, and takes its data along. It can be stopped and started again:
runs that are finished are skipped, unfinished ones continued. One run at a time, on one core (about 15 minutes in all).
Writes <output>/turnover.csv and the figure, and prints Markdown tables, all from the recorded runs alone.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from fedcil import Run, load
from fedcil.record.drawing import FAINT, INK, PALETTE, save_png

METHODS = {  # name in the figure -> [method]
    "MFCL": "{name='mfcl', preset='small'}",
    "FedLwF": "{name='fedlwf'}",
    "FedER": "{name='feder'}",
    "FedAvg": "{name='fedavg'}",
}
TASKS, ROUNDS = 5, 10
METRICS = {"average_incremental_accuracy": "average accuracy, %", "forgetting": "forgetting, %"}


@dataclass(frozen=True)
class Sweep:
    """One kind of turnover: members at any time, the key that says how many are replaced, and how often they are."""

    name: str
    label: str
    members: int
    key: str
    times: int
    percents: tuple[int, ...]

    def overrides(self, percent: int) -> list[str]:
        replaced = self.members * percent // 100
        return [
            f"population={{name='turnover', size={self.members}, {self.key}={percent / 100}}}",
            f"clients.count={self.members + replaced * self.times}",
            "partition.allow_empty=true",
        ]


SWEEPS = (
    Sweep(
        "boundaries",
        "(i) replaced at each task boundary, % of 20 members",
        20,
        "replaced_per_task",
        TASKS - 1,
        (0, 25, 50, 75, 100),
    ),
    Sweep(
        "rounds",
        "(ii) replaced before each round, % of 10 members",
        10,
        "replaced_per_round",
        TASKS * (ROUNDS - 1),
        (0, 10, 20, 30, 50),
    ),
)


@dataclass(frozen=True)
class Point:
    """One setting of one sweep with one method: a run for each seed."""

    sweep: Sweep
    percent: int
    method: str

    @property
    def name(self) -> str:
        return f"turnover_{self.sweep.name}_{self.percent}_{self.method.lower()}"

    def runs(self, output: Path) -> list[Run]:
        """The finished ones, one of each seed."""
        found = [load(file.parent) for file in sorted(output.glob(f"{self.name}-*/scenario.toml"))]
        return list({run.scenario.seed: run for run in found if run.finished}.values())


POINTS = [Point(sweep, percent, method) for sweep in SWEEPS for percent in sweep.percents for method in METHODS]


def run_point(point: Point, seeds: str, output: Path) -> None:
    """All seeds in one process of their own, on one core."""
    sets = [f"name={point.name}", f"method={METHODS[point.method]}", f"training.rounds={ROUNDS}", "engine.workers=1"]
    sets += point.sweep.overrides(point.percent)
    command = [sys.executable, "-m", "fedcil", "run", "digits_fedavg", "--seeds", seeds, "--no-figures", "--json"]
    command += [part for text in sets for part in ("--set", text)] + ["--output", str(output)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{point.name} ended with exit code {done.returncode}: {done.stdout}{done.stderr}")
    print(f"{point.name}: done", flush=True)


def write_csv(output: Path) -> None:
    """One row for each run."""
    with (output / "turnover.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["sweep", "percent", "method", "seed", *METRICS, "final_accuracy", "cpu_seconds"])
        for point in POINTS:
            for run in point.runs(output):
                values = [run.summary[name] for name in (*METRICS, "final_accuracy", "cpu_seconds")]
                writer.writerow([point.sweep.name, point.percent, point.method, run.scenario.seed, *values])


def mean_and_deviation(point: Point, metric: str, output: Path) -> tuple[float, float | None]:
    """Of one seed there is no deviation."""
    values = [100 * run.summary[metric] for run in point.runs(output)]
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def cell(mean: float, deviation: float | None) -> str:
    return f"{mean:.1f}" if deviation is None else f"{mean:.1f} ± {deviation:.1f}"


def print_tables(output: Path) -> None:
    for sweep in SWEEPS:
        for metric, label in METRICS.items():
            print(f"\n| {sweep.label}; {label} | {' | '.join(map(str, sweep.percents))} |")
            print("|---" * (1 + len(sweep.percents)) + "|")
            for method in METHODS:
                cells = [
                    cell(*mean_and_deviation(Point(sweep, percent, method), metric, output))
                    for percent in sweep.percents
                ]
                print(f"| {method} | {' | '.join(cells)} |")


def draw(output: Path) -> Figure:
    """Two columns, one for each sweep; accuracy above, forgetting below."""
    figure = Figure(figsize=(9.0, 6.6), layout="constrained")
    panels = figure.subplots(2, 2, sharex="col", sharey=True)
    for column, sweep in enumerate(SWEEPS):
        for row, (metric, label) in enumerate(METRICS.items()):
            axes = panels[row][column]
            draw_panel(axes, sweep, metric, output)
            if column == 0:
                axes.set_ylabel(label)
        panels[1][column].set_xlabel(sweep.label)
    handles, names = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=len(names), frameon=False)
    seeds = {run.scenario.seed for point in POINTS for run in point.runs(output)}
    figure.supxlabel(CAPTION.format(", ".join(map(str, sorted(seeds)))), fontsize=8, color=INK, x=0.01, ha="left")
    return figure


CAPTION = (
    "Digits, 5 tasks of 2 classes, 5 clients a round, 10 rounds a task; mean and sample deviation over seeds {}.\n"
    "MFCL and FedLwF are flat by design: their clients keep nothing, what is known of old classes is on the server.\n"
    "FedER keeps exemplars on the clients: who leaves takes them along, and with all replaced it is where FedAvg is.\n"
    "In (ii) a task's samples are cut among all who come by, so each round sees a smaller part of them."
)


def draw_panel(axes: Any, sweep: Sweep, metric: str, output: Path) -> None:
    for place, method in enumerate(METHODS):
        pairs = [mean_and_deviation(Point(sweep, percent, method), metric, output) for percent in sweep.percents]
        means, deviations = zip(*pairs, strict=True)
        beside = (place - (len(METHODS) - 1) / 2) * 0.012 * max(sweep.percents)  # so that no bar hides another
        axes.errorbar(
            [percent + beside for percent in sweep.percents],
            means,
            [deviation or 0.0 for deviation in deviations],
            color=PALETTE[place],
            marker="os^D"[place],
            markersize=5,
            linewidth=1.8,
            capsize=3,
            label=method,
        )
    axes.set_xticks(sweep.percents)
    axes.set_ylim(-4, 104)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=FAINT, linewidth=0.7)
    axes.tick_params(colors=INK)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--output", type=Path, default=Path("runs/turnover"))
    parser.add_argument("--figure", type=Path, help="default: turnover.png in --output")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    for point in POINTS:
        run_point(point, options.seeds, options.output)
    write_csv(options.output)
    save_png(draw(options.output), options.figure or options.output / "turnover.png")
    print_tables(options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
