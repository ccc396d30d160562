"""How many clients train side by side."""

from __future__ import annotations

import math
import os

from fedcil.scenario import Scenario


def worker_count(scenario: Scenario, at_once: int = 1) -> int:
    """``engine.workers``, or one per core this process may use and no more than a round has use for."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return scenario.engine.workers or max(1, min(cores, math.ceil(scenario.clients.per_round / at_once)))
