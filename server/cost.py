"""What a step of the round loop costs this process: seconds, CPU seconds, memory."""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from pathlib import Path
from typing import Any


def forget_peak() -> None:
    """Let the peak of memory count from here, where the system can: a run does not answer for the one before it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_mb() -> float:
    """Largest resident memory of this process since ``forget_peak``, or since its start where that is not known."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


class Stopwatch:
    """Seconds by stage and CPU seconds since it was made, and the peak of memory, of this process; CPU seconds also of
    workers that are processes of their own (Flower's nodes, which may be anywhere, are left out).
    """

    def __init__(self) -> None:
        self.wall, self.cpu = time.perf_counter(), time.process_time()
        self.cpu_elsewhere = 0.0
        self.stages: dict[str, float] = {}

    def stage(self, name: str) -> None:
        """The time since the last stage ended was this one's."""
        self.stages[name] = time.perf_counter() - self.wall - sum(self.stages.values())

    def read(self) -> dict[str, Any]:
        return {
            "seconds": time.perf_counter() - self.wall,
            "stages": self.stages,
            "cpu_seconds": time.process_time() - self.cpu + self.cpu_elsewhere,
            "peak_memory_mb": peak_memory_mb(),
        }
