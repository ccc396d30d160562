"""(f) Whole scenarios as a user starts them, and how long it takes until the first round is recorded."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from scenarios.benchmarks.timing import Cost


def run(scenario: str, *words: str) -> tuple[Cost, float]:
    """(cost of the command, wall seconds until its first round was recorded)."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "fedcil",
            "run",
            scenario,
            "--json",
            "--no-figures",
            "--output",
            folder,
            *words,
        ]
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


def measure(scenarios: tuple[str, ...], repeats: int) -> dict[str, dict[str, float]]:
    """``whole_<scenario>``: seconds of the command, medians, one worker."""
    rows = {}
    for scenario in scenarios:
        runs = sorted((run(scenario, "--set", "engine.workers=1") for _ in range(repeats)), key=lambda r: r[0].wall)
        cost, first = runs[len(runs) // 2]
        rows[f"whole_{scenario}"] = {"wall_s": cost.wall, "cpu_s": cost.cpu, "first_round_s": first}
    return rows
