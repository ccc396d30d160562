"""(d) Memory against the number of clients: peak resident memory of whole runs, a fresh process each."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile

import fedcil

TASKS, CLASSES = 2, 20
INDEX_BYTES = 4 + 8  # of a client's sample in the partition, and of its offset


def peak_mb(clients: int) -> float:
    """Of a run with five clients a round. All together have the same 20,000 images of a task: 200 to two each."""
    sets = [
        "data.name=synthetic",
        f"data.classes={CLASSES}",
        "data.samples_per_class=2000",
        f"stream.tasks={TASKS}",
        "partition.name=iid",
        f"clients.count={clients}",
        "model.width=4",
        "training.rounds=3",
        "training.epochs=1",
        "engine.workers=1",
    ]
    words = [part for text in sets for part in ("--set", text)]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "fedcil", "run", "digits_fedavg", *words, "--json", "--no-figures"]
        done = subprocess.run([*command, "--output", folder], capture_output=True, text=True, check=True)
        return float(fedcil.load(json.loads(done.stdout)["run_dir"]).summary["peak_memory_mb"])


def measure() -> dict[str, dict[str, float]]:
    """``memory_<clients>``: MB at the peak and MB more than with 100 clients; the images are the same in all."""
    peaks = {clients: peak_mb(clients) for clients in (100, 1000, 10_000)}
    return {
        f"memory_{clients}": {
            "peak_mb": peak,
            "more_than_100_mb": peak - peaks[100],
            "index_mb": TASKS * clients * INDEX_BYTES / 2**20,
        }
        for clients, peak in peaks.items()
    }
