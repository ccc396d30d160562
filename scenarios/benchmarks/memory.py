"""(d) Memory against the number of clients: peak resident memory of whole runs, a fresh process each."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import fedcil

TASKS, CLASSES = 2, 20
INDEX_BYTES = 4 + 8  # of a client's sample in the partition, and of its offset
# Linux counts a process's peak from what its parent held when it began, so a small one begins it.
PARENT = """
import resource, subprocess, sys
code = subprocess.call(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""


class Peak(NamedTuple):
    """MB: since the first round began, and of the whole process with its start."""

    rounds: float
    process: float


def peak_mb(clients: int) -> Peak:
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
        command = [sys.executable, "-m", "fedcil", "run", "digits_fedavg", *words, "--no-figures", "--output", folder]
        ended = subprocess.run([sys.executable, "-c", PARENT, *command], check=False, stdout=subprocess.PIPE, text=True)
        if ended.returncode:
            raise RuntimeError(f"the run with {clients} clients ended with exit code {ended.returncode}")
        (run,) = Path(folder).iterdir()
        return Peak(float(fedcil.load(run).summary["peak_memory_mb"]), int(ended.stdout) / 1024)


def measure() -> dict[str, dict[str, float]]:
    """``memory_<clients>``: MB at both peaks, and MB more than with 100 clients, of the two what is more; the images
    are the same in all.
    """
    peak_mb(100)  # counts for nothing: whoever finds the libraries on disk only has up to 40 MB less of them mapped
    peaks = {clients: peak_mb(clients) for clients in (100, 1000, 10_000)}
    return {
        f"memory_{clients}": {
            "peak_mb": peak.rounds,
            "process_peak_mb": peak.process,
            "more_than_100_mb": max(peak.rounds - peaks[100].rounds, peak.process - peaks[100].process),
            "index_mb": TASKS * clients * INDEX_BYTES / 2**20,
        }
        for clients, peak in peaks.items()
    }
