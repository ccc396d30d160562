"""How many clients train side by side, and on what; what that costs a process."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from joblib import cpu_count

from fedcil.experiment import PROCESSES_POSSIBLE, Experiment
from fedcil.scenario import Scenario

SMALL_BYTES = 4 << 20  # of a model: four convolutions have 0.5 MB, ResNet-18 45 (docs/performance-notes.md)


@dataclass(frozen=True, slots=True)
class WorkerShare:
    """What one worker holds: a CPU for each of its threads, and a share of a GPU."""

    cpus: int
    gpus: float


class CpuSeconds:
    """Of this process, for one that works for a run."""

    def __init__(self) -> None:
        self._said = time.process_time()

    def since_last(self) -> float:
        """Those since this was asked last, or since the start."""
        before, self._said = self._said, time.process_time()
        return self._said - before


def worker_count(experiment: Experiment) -> int:
    """``engine.workers``, or one per ``training.threads`` cores that this process may use (by its affinity and by its
    container's quota), and no more than a round has use for.

    One where clients are threads of this process and train on a GPU: its lanes are side by side already, and a step
    must not be captured while another thread is at work there.
    """
    scenario, at_once = experiment.scenario, experiment.execution.at_once
    if scenario.engine.name == "inline" and experiment.compute.device.type == "cuda":
        return 1
    useful = math.ceil(scenario.clients.per_round / at_once)
    if experiment.compute.device.type == "cuda":  # no GPU without work while another's lanes take it all
        useful = max(useful, min(torch.cuda.device_count(), scenario.clients.per_round))
    return scenario.engine.workers or max(1, min(cpu_count() // scenario.training.threads, useful))


def may_use_processes(scenario: Scenario, workers: int) -> bool:
    """Whether inline workers but one may be processes. Never where a round has a deadline, which only threads give up
    at.
    """
    if scenario.engine.name != "inline" or workers == 1 or scenario.server.deadline_s is not None:
        return False
    return PROCESSES_POSSIBLE if scenario.engine.processes is None else scenario.engine.processes


def in_processes(scenario: Scenario, workers: int, model_bytes: int) -> bool:
    """Whether they are, once a run is a long one: where nobody says so, if steps are so short that threads would wait
    for Python's lock.
    """
    asked = bool(scenario.engine.processes)
    return may_use_processes(scenario, workers) and (asked or model_bytes <= SMALL_BYTES)
