"""How many clients train side by side."""

from __future__ import annotations

import math
import os

from fedcil.experiment import Experiment


def worker_count(experiment: Experiment) -> int:
    """``engine.workers``, or one per core this process may use and no more than a round has use for.

    One where clients are threads of this process and train on a GPU: its lanes are side by side already, and a step
    must not be captured while another thread is at work there.
    """
    scenario, at_once = experiment.scenario, experiment.execution.at_once
    if scenario.engine.name == "inline" and experiment.compute.device.type == "cuda":
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return scenario.engine.workers or max(1, min(cores, math.ceil(scenario.clients.per_round / at_once)))
