"""What becomes of a cohort, from the place in the run alone: who is set to work, who vanishes, who will be late."""

from __future__ import annotations

from collections.abc import Sequence

from fedcil.clock import Devices, Schedule, close_round
from fedcil.experiment import Experiment
from fedcil.methods.base import Phase
from fedcil.state import RunState
from fedcil.stream import Task
from fedcil.tensors import count_bytes


def make_schedule(
    experiment: Experiment, state: RunState, task: Task, phase: Phase, cohort: tuple[int, ...]
) -> Schedule:
    """Without a simulated clock nobody is late."""
    clients, clock, devices = experiment.scenario.clients, experiment.scenario.clock, experiment.conditions.devices
    broken = drop_outs(experiment, state, cohort, clients.dropout) if clients.dropout else {}
    if devices is None:
        return Schedule(on_time=tuple(c for c in cohort if c not in broken), dropped=tuple(sorted(broken)))
    if not cohort:  # nobody is free: the round is as long as the wait for the next late update
        return Schedule(on_time=(), seconds=min((late.left_s for late in state.pending), default=0.0))
    durations = work_seconds(experiment, devices, state, task, phase, cohort)
    return close_round(durations, broken, wanted_answers(clients.per_round, phase, cohort), clock.deadline_s)


def wanted_answers(per_round: int, phase: Phase, cohort: Sequence[int]) -> int:
    """How many answers end a round: all of them, unless more were asked than are wanted."""
    return len(cohort) if phase.who == "all" else min(per_round, len(cohort))


def drop_outs(experiment: Experiment, state: RunState, cohort: Sequence[int], chance: float) -> dict[int, float]:
    """Who vanishes, and after which part of its work."""
    key = experiment.round_key(state.cursor).at("dropout")
    draws = {client: key.at(client).numpy().random(2).tolist() for client in cohort}
    return {client: part for client, (luck, part) in draws.items() if luck < chance}


def work_seconds(
    experiment: Experiment, devices: Devices, state: RunState, task: Task, phase: Phase, cohort: tuple[int, ...]
) -> dict[int, float]:
    """Simulated seconds of each client: own samples times epochs, model and payload down, model or statistics up.

    What a method adds to a client's samples (exemplars, synthetic images) is not counted.
    """
    counts = experiment.counts(task)
    passes = experiment.scenario.training.epochs if phase.work == "train" else 1
    model = count_bytes(state.server.model)
    up = count_bytes(experiment.sent(phase, task, state.server.model))
    payload = count_bytes(state.server.payload.tensors) if state.server.payload else 0
    down = {client: model + (payload if client not in state.holders else 0) for client in cohort}
    return {c: devices.seconds(c, int(counts[c]) * passes, down[c], up) for c in cohort}
