"""How many clients train side by side, and on what."""

from __future__ import annotations

import math
import os
import sys
from dataclasses import dataclass

from fedcil.errors import ScenarioError
from fedcil.experiment import Experiment
from fedcil.scenario import Scenario

SMALL_BYTES = 4 << 20  # of a model: four convolutions have 0.5 MB, ResNet-18 has 45 (docs/performance.md, two workers)


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


def in_processes(scenario: Scenario, workers: int, model_bytes: int) -> bool:
    """Whether inline workers are processes, once a run is a long one: where nobody says so, if steps are so short that
    threads would wait for Python's lock. ScenarioError if it is asked for where it cannot be.
    """
    wanted, possible = scenario.engine.processes, sys.platform == "linux"
    if wanted and not possible:
        raise ScenarioError(
            "workers can be processes on Linux only",
            where="engine.processes",
            allowed="false, or nothing",
            next="leave engine.processes out: workers are threads then",
        )
    if scenario.engine.name != "inline" or workers == 1:
        return False
    return possible and model_bytes <= SMALL_BYTES if wanted is None else wanted
