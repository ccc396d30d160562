"""(f) Whole scenarios as a user starts them, and how long it takes until the first round is recorded."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import psutil

from fedcil.errors import DataMissing
from fedcil.experiment import open_experiment
from fedcil.scenario_file import load_scenario
from scenarios.benchmarks.timing import NOT_MEASURED, Cost, Figure

RUNS = {"digits_fedavg": 3, "digits_mfcl": 3, "digits_oracle": 3, "fashion_mfcl": 3, "cifar100_small_mfcl": 1}


def run(scenario: str, *words: str) -> tuple[Cost, float]:
    """(cost of the command, wall seconds until its first round was recorded)."""
    with tempfile.TemporaryDirectory() as folder:
        quiet = ("--json", "--no-figures", "--output", folder)
        command = [sys.executable, "-m", "fedcil", "run", scenario, *quiet, *words]
        before, started = psutil.Process().cpu_times(), time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            first = 0.0
            while process.poll() is None:
                if not first and any(path.stat().st_size for path in Path(folder).glob("*/metrics.jsonl")):
                    first = time.perf_counter() - started
                time.sleep(0.02)
        wall, after = time.perf_counter() - started, psutil.Process().cpu_times()
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return Cost(cpu, wall), first


def measure(runs: Mapping[str, int] = RUNS) -> dict[str, Figure | dict[str, float]]:
    """``whole_<scenario>`` for each scenario and its number of runs: medians, one worker. Not measured where its data
    are missing.
    """
    rows: dict[str, Figure | dict[str, float]] = {}
    for scenario, times in runs.items():
        try:
            open_experiment(load_scenario(scenario))  # which leaves the data as a run finds them again
        except DataMissing as missing:
            print(f"{scenario} is not measured: {missing.what}", file=sys.stderr)
            rows[f"whole_{scenario}"] = NOT_MEASURED
            continue
        costs = sorted((run(scenario, "--set", "engine.workers=1") for _ in range(times)), key=lambda r: r[0].wall)
        cost, first = costs[times // 2]
        rows[f"whole_{scenario}"] = {"wall_s": cost.wall, "cpu_s": cost.cpu, "first_round_s": first}
    return rows
