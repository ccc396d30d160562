"""Memory over time: does a run of many rounds need more at its end than at its beginning?

    python -m scenarios.reliability.memory [--engine inline] [--rounds 200] [--clients 50] [--output memory]

Resident and proportional memory of all processes of the run, after each recorded round. Target: the mean over the
last tenth is within 5 % of the mean around round 20. Writes ``<output>-<engine>.json`` and ``.csv``.

``--engine deploy`` is a deployment on loopback with three nodes: compared with round 5 (of 20), of the processes that
live as long as the run (Flower starts one for every message), and the size of the SuperLink's database.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

TARGET = 0.05
WARM = {"deploy": 5}  # rounds after which nothing should grow any more; elsewhere 20
EVERY = {"deploy": 1}  # rounds between two samples; elsewhere 5
FLEETING = "flwr-clientapp"  # a process for one message


@dataclass(frozen=True, slots=True)
class Sample:
    """Memory in MB of 2^20 bytes: shared pages count in each process (resident) or once (proportional)."""

    round: int
    resident: float
    proportional: float
    processes: int
    files: int
    database: float = 0.0  # of a SuperLink, on disk


def overrides(engine: str, rounds: int, clients: int) -> list[str]:
    """One task, all clients in each round: FedAvg on drawn images with a small network."""
    return [
        "name='memory'",
        f"data={{name='synthetic', classes=4, samples_per_class={2 * clients}, image_size=8}}",
        "stream.tasks=1",
        "partition={name='iid'}",
        f"clients={{count={clients}, per_round={clients}}}",
        "model={name='cnn', width=16}",
        "method={name='fedavg'}",
        f"training={{rounds={rounds}, epochs=1}}",
        "server.evaluate_every=10",
        f"engine={{name='{'inline' if engine == 'deploy' else engine}', workers=2}}",
        "server.deadline_s=60",
        "device='cpu'",
    ]


def tree(pid: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    return []


def look(pid: int, done: int, output: Path) -> Sample:
    resident = proportional = 0.0
    count = files = 0
    for process in tree(pid):
        with contextlib.suppress(psutil.Error):
            if FLEETING in " ".join(process.cmdline()):
                continue
            full = process.memory_full_info()
            resident, proportional = resident + full.rss / 2**20, proportional + full.pss / 2**20
            files += process.num_fds()
            count += 1
    database = sum(path.stat().st_size for path in output.glob("*/deployment/superlink.db*")) / 2**20
    return Sample(done, resident, proportional, count, files, database)


def rounds_done(output: Path) -> int:
    found = list(output.glob("*/metrics.jsonl"))
    return found[0].read_bytes().count(b'"kind": "round"') if found else 0


def watch(command: list[str], output: Path, every: int) -> list[Sample]:
    """Run it, and look at it after every few recorded rounds."""
    samples: list[Sample] = []
    log = output / "log"
    with log.open("w") as file, subprocess.Popen(command, stdout=file, stderr=file) as process:
        while process.poll() is None:
            done = rounds_done(output)
            if done and (not samples or done >= samples[-1].round + every):
                samples.append(look(process.pid, done, output))
            time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"the run ended with {process.returncode}: {log.read_text()[-2000:]}")
    return [sample for sample in samples if sample.processes]


def around(samples: Iterable[Sample], first: float, last: float, what: str) -> float:
    return statistics.mean(getattr(sample, what) for sample in samples if first <= sample.round <= last)


def judge(samples: list[Sample], rounds: int, warm_round: int = 20, every: int = 5) -> dict[str, Any]:
    """What it was around the round when all is warm, and in the last tenth of the rounds."""
    result: dict[str, Any] = {}
    for what in ("resident", "proportional", "files", "processes"):
        warm = around(samples, warm_round, warm_round + 2 * every, what)
        end = around(samples, 0.9 * rounds, rounds, what)
        result[what] = {
            f"round_{warm_round}": round(warm, 1),
            "end": round(end, 1),
            "peak": round(max(getattr(sample, what) for sample in samples), 1),
            "growth": round(end / warm - 1, 4),
        }
    first, last = samples[0], samples[-1]
    if last.database:
        a_round = (last.database - first.database) / max(1, last.round - first.round)
        result["database"] = {"end": round(last.database, 1), "a_round": round(a_round, 2)}
    result["passed"] = result["resident"]["growth"] <= TARGET
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--engine", default="inline", choices=["inline", "ray", "flower", "deploy"])
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--output", type=Path, default=Path("memory"), help="stem of the JSON and the CSV")
    given = parser.parse_args()
    sets = [part for text in overrides(given.engine, given.rounds, given.clients) for part in ("--set", text)]
    with tempfile.TemporaryDirectory(prefix="memory-") as folder:
        words = ["deploy", "local"] if given.engine == "deploy" else ["run"]
        command = [sys.executable, "-m", "fedcil", *words, "digits_fedavg", *sets, "--output", folder, "--no-figures"]
        started = time.monotonic()
        every, warm = EVERY.get(given.engine, 5), WARM.get(given.engine, 20)
        samples = watch(command, Path(folder), every)
        seconds = time.monotonic() - started
    result = {"engine": given.engine, "rounds": given.rounds, "clients": given.clients, "seconds": round(seconds, 1)}
    result |= judge(samples, given.rounds, warm, every)
    stem = given.output.with_name(f"{given.output.name}-{given.engine}")
    stem.with_suffix(".json").write_text(json.dumps(result, indent=1))
    with stem.with_suffix(".csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(Sample.__slots__)
        rows.writerows([getattr(sample, name) for name in Sample.__slots__] for sample in samples)
    print(json.dumps(result, indent=1))
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
