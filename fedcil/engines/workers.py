"""How many clients train side by side, and on what."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

from fedcil.experiment import Experiment


@dataclass(frozen=True, slots=True)
class Share:
    """What one worker holds: a CPU for each of its threads, and a share of a GPU."""

    cpus: int
    gpus: float


def worker_count(experiment: Experiment) -> int:
    """``engine.workers``, or one per ``training.threads`` cores that this process may use, and no more than a round has
    use for.

    One where clients are threads of this process and train on a GPU: its lanes are side by side already, and a step
    must not be captured while another thread is at work there.
    """
    scenario, at_once = experiment.scenario, experiment.execution.at_once
    if scenario.engine.name == "inline" and experiment.compute.device.type == "cuda":
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    side_by_side = min(cores // scenario.training.threads, math.ceil(scenario.clients.per_round / at_once))
    return scenario.engine.workers or max(1, side_by_side)
