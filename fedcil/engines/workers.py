"""How many clients train side by side."""

from __future__ import annotations

import os

from fedcil.scenario import Scenario

PIECES = 4  # a worker's share of a round is cut into so many requests, for balance


def worker_count(scenario: Scenario) -> int:
    """``engine.workers``, or one per core this process may use and no more than clients in a round."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return scenario.engine.workers or max(1, min(cores, scenario.clients.per_round))
