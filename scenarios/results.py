"""The tables of docs/results.md, by one command that can be stopped and started again.

    python scenarios/results.py [digits|fashion|cifar100_small|paper ...] [--seeds 0,1,2] [--jobs 2]
        [--output runs/results] [--max-seconds S] [--set KEY=VALUE ...]

Runs that are finished are skipped, unfinished ones continued. Each run takes one core; ``--jobs`` of them run
side by side. After ``--max-seconds`` each saves a checkpoint and the command ends with exit code 5: the same command
goes on from there. ``--set`` is for all rows. Prints one Markdown table per group, from the recorded runs alone.

``paper`` is the protocol of the MFCL paper on CIFAR-100, a GPU's work, and only done when named:

    python scenarios/results.py paper --jobs 1 --max-seconds 540 --set "training.precision='bf16'"
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import joblib

from fedcil import load
from fedcil.record.compare import grouped

LONG_FEDLWF = "training.rounds=100"  # FedLwF with the CPU time of MFCL


@dataclass(frozen=True)
class Row:
    """One row of a table: a scenario with overrides, under a name of its own."""

    name: str
    scenario: str
    overrides: tuple[str, ...] = ()


def plain(group: str, method: str, settings: str = "") -> Row:
    """A method on a group's scenario: within a group only the method differs."""
    table = f"method={{name={method!r}{settings}}}"
    suffix = "_".join([method, *settings.replace("=", "").replace("'", "").replace(" ", "").split(",")[1:]])
    return Row(f"{group}_{suffix}", f"{group}_fedavg", (table,))


def shipped(group: str, method: str) -> Row:
    return Row(f"{group}_{method}", f"{group}_{method}")


def varied(group: str, method: str, name: str, *overrides: str) -> Row:
    """A shipped scenario with something else in it."""
    return Row(f"{group}_{method}_{name}", f"{group}_{method}", overrides)


TABLES = {
    "digits": [
        shipped("digits", "fedavg"),
        shipped("digits", "mfcl"),
        plain("digits", "mfcl", ", preset='authors-code'"),
        shipped("digits", "oracle"),
    ],
    "fashion": [shipped("fashion", "fedavg"), shipped("fashion", "mfcl"), shipped("fashion", "oracle")],
    "cifar100_small": [
        shipped("cifar100_small", "mfcl"),
        shipped("cifar100_small", "fedavg"),
        plain("cifar100_small", "fedlwf"),
        shipped("cifar100_small", "oracle"),
        plain("cifar100_small", "fedprox"),
        plain("cifar100_small", "afcl"),
        plain("cifar100_small", "feder", ", memory=50"),
        plain("cifar100_small", "afcl", ", backbone='task1'"),
    ],
    # What speed costs in accuracy: bf16, and pools of several sizes against fresh latents at every step (pool 0).
    "cifar100_small_speed": [
        shipped("cifar100_small", "mfcl"),
        varied("cifar100_small", "mfcl", "bf16", "training.precision='bf16'"),
        varied("cifar100_small", "mfcl", "pool0", "method.pool=0"),
        varied("cifar100_small", "mfcl", "pool1024", "method.pool=1024"),
    ],
    "cifar100_small_long": [
        Row("cifar100_small_fedlwf_long", "cifar100_small_fedavg", ("method={name='fedlwf'}", LONG_FEDLWF)),
    ],
    "paper": [
        Row("paper_mfcl", "paper/cifar100_mfcl"),
        Row("paper_mfcl_authors-code", "paper/cifar100_mfcl", ("method.preset='authors-code'",)),
        Row("paper_fedavg", "paper/cifar100_fedavg"),
        Row("paper_oracle", "paper/cifar100_oracle"),
    ],
}
BY_NAME_ONLY = ("paper",)
STOPPED = 5  # exit code of a run whose time was up
INTERRUPTED = 130  # ... of one that somebody stopped


def run_one(row: Row, seed: str, output: Path, more: Sequence[str], until: float) -> int:
    """One run in a process of its own, on one core, until the clock of ``time.monotonic`` says so."""
    left = until - time.monotonic()
    if left <= 0:
        print(f"{row.name} seed {seed}: not begun, time is up", flush=True)
        return STOPPED
    sets = [f"name={row.name}", "engine.workers=1", *row.overrides, *more]
    command = [sys.executable, "-m", "fedcil", "run", row.scenario, "--seeds", seed, "--no-figures", "--json"]
    command += [part for text in sets for part in ("--set", text)] + ["--output", str(output)]
    command += ["--max-seconds", f"{left:.1f}"] if left < float("inf") else []
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with (output / f"{row.name}-{seed}.log").open("w") as log:
        code = subprocess.run(command, stdout=log, stderr=log, env=environment, check=False).returncode
    known = {0: "done", STOPPED: "time is up, a checkpoint is saved", INTERRUPTED: "stopped"}
    print(f"{row.name} seed {seed}: {known.get(code, f'exit code {code}, see {log.name}')}", flush=True)
    return code


def print_table(group: str, output: Path) -> None:
    """Mean and sample deviation in percent, from the finished runs."""
    names = [row.name for row in TABLES[group]]
    begun = [file for name in names for file in sorted(output.glob(f"{name}-[0-9]*-*/scenario.toml"))]
    runs = [run for run in (load(file.parent) for file in begun) if run.finished and run.scenario.name in names]
    print(f"\n{group}\n\n| run | seeds | average incremental | final | forgetting | MB up / down | CPU s |")
    print("|---|---|---|---|---|---|---|")
    for name in names:
        mine = [run for run in runs if run.scenario.name == name]
        if not mine:
            continue
        rows, *others = grouped(mine)
        if others:
            print(f"| {name} | runs with other settings or data lie in {output}, too: give another --output |")
            continue
        cells = [
            " +- ".join(
                f"{100 * value:.1f}" for value in (rows.mean[key], (rows.std or {}).get(key)) if value is not None
            )
            for key in ("average_incremental_accuracy", "final_accuracy", "forgetting")
        ]
        up, down = (rows.mean[key] / 1e6 for key in ("bytes_up", "bytes_down"))
        cpu = sum(run.summary["cpu_seconds"] for run in mine) / len(mine)
        print(f"| {name} | {len(rows.seeds)} | {' | '.join(cells)} | {up:.0f} / {down:.0f} | {cpu:.0f} |")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    usual = [group for group in TABLES if group not in BY_NAME_ONLY]
    parser.add_argument("groups", nargs="*", default=usual, help=", ".join(TABLES))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--jobs", type=int, default=joblib.cpu_count())
    parser.add_argument("--output", type=Path, default=Path("runs/results"))
    parser.add_argument("--max-seconds", type=float, default=float("inf"))
    parser.add_argument("--set", action="append", default=[], dest="more", metavar="KEY=VALUE")
    options = parser.parse_args(arguments)
    unknown = [group for group in options.groups if group not in TABLES]
    if unknown:
        parser.error(f"no table {unknown[0]!r}; there are {', '.join(TABLES)}")
    if not all(seed.isdecimal() for seed in options.seeds.split(",")):
        parser.error(f"--seeds {options.seeds!r} is no list of numbers, like 0,1,2")
    if options.jobs < 1:
        parser.error("--jobs must be at least 1")
    options.output.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + options.max_seconds
    work = [(row, seed) for group in options.groups for seed in options.seeds.split(",") for row in TABLES[group]]
    work = list(dict.fromkeys(work))  # a row may stand in two tables
    try:
        with ThreadPoolExecutor(options.jobs) as pool:
            codes = set(pool.map(lambda pair: run_one(*pair, options.output, options.more, until), work))
    except KeyboardInterrupt:  # a terminal tells the runs, too
        print("stopped: the same command goes on from there", file=sys.stderr)
        return INTERRUPTED
    for group in options.groups:
        print_table(group, options.output)
    broken = codes - {0, STOPPED}
    return max(broken or codes, default=0)


if __name__ == "__main__":
    sys.exit(main())
