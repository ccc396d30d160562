"""Rounds by the simulated clock: who answers in time, who later, who never, and what becomes of late updates."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fedcil.clock import Devices, Schedule, close_round
from fedcil.experiment import Experiment
from fedcil.messages import Broadcast, Failure, Job, Outcome, Request, Tensors, Total, count_bytes
from fedcil.methods.base import Phase
from fedcil.port import remaining
from fedcil.rule import PLAIN, Rule
from fedcil.scenario import ClockSection
from fedcil.state import Pending, RunState
from fedcil.stream import Task

Ask = Callable[[Request, float | None], Outcome]
"""(request, seconds that it may take; None: any) -> outcome."""


@dataclass(frozen=True, slots=True)
class Answered:
    """What came of a round: the late updates that arrived in it are in the outcome's total; others are still pending.

    ``trained``: how many clients were set to work.
    """

    cohort: tuple[int, ...]
    schedule: Schedule
    outcome: Outcome
    trained: int
    arrived: tuple[Pending, ...] = ()
    pending: tuple[Pending, ...] = ()

    @property
    def count(self) -> int:
        """Answers that count in this round."""
        return len(self.outcome.reports) + len(self.arrived)

    def held_back(self) -> Answered:
        """A round that changes nothing takes in no late update: what came arrives in the next."""
        waiting = tuple(replace(late, left_s=0.0) for late in self.arrived)
        return replace(self, arrived=(), pending=(*waiting, *self.pending))


def make_schedule(
    experiment: Experiment, devices: Devices | None, state: RunState, task: Task, phase: Phase, cohort: tuple[int, ...]
) -> Schedule:
    """What becomes of the cohort, from the place in the run alone."""
    clients, clock = experiment.scenario.clients, experiment.scenario.clock
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


def hold_round(
    experiment: Experiment, schedule: Schedule, state: RunState, phase: Phase, cohort: tuple[int, ...], ask: Ask
) -> Answered:
    """Ask who is on time, fold in what arrives late, and make the late updates that will arrive later, as long as
    ``server.deadline_s`` leaves time for them.
    """
    clock, number = experiment.scenario.clock, experiment.number(state.cursor)
    deadline_s, started = experiment.scenario.server.deadline_s, time.monotonic()
    folds = clock.late == "fold" and phase.sends_model
    rule = rule_of(experiment, phase)
    outcome = ask(make_request(state, schedule.on_time, rule), deadline_s)
    made: list[Outcome] = []
    for client in schedule.late if folds else ():
        left = remaining(deadline_s, started)
        if left == 0.0:
            break
        made.append(ask(make_request(state, (client,), rule), left))
    seconds = schedule.seconds or 0.0
    arrived = tuple(late for late in state.pending if late.left_s <= seconds)
    pending = [replace(late, left_s=late.left_s - seconds) for late in state.pending if late.left_s > seconds]
    pending += [as_pending(each, number, schedule.late, seconds) for each in made if each.total]
    failed = [failure for each in (outcome, *made) for failure in each.failures]
    failed += [Failure(client, "dropout", "vanished in mid-round") for client in schedule.dropped]
    if folds:
        never = list(schedule.late)[len(made) :]
        failed += [Failure(client, "deadline", "not asked: the round's time was up") for client in never]
    else:
        failed += [too_late(client, taken, schedule) for client, taken in schedule.late.items()]
    outcome = replace(
        outcome,
        total=with_late(outcome.total, arrived, number, clock.staleness, state.server.model),
        failures=tuple(sorted(failed, key=lambda failure: failure.client)),
        wire_bytes=sum(each.wire_bytes for each in (outcome, *made)),
        cpu_elsewhere=sum(each.cpu_elsewhere for each in (outcome, *made)),
    )
    return Answered(cohort, schedule, outcome, len(schedule.on_time) + len(made), arrived, tuple(pending))


def rule_of(experiment: Experiment, phase: Phase) -> Rule:
    """Limits and robust folds are for models; what else clients send keeps its sum."""
    return experiment.scenario.server.rule if phase.sends_model else PLAIN


def make_request(state: RunState, clients: tuple[int, ...], rule: Rule) -> Request:
    """One job for each client. A late one is asked alone, so that its tensors come back by themselves, in no sum."""
    cursor, server = state.cursor, state.server
    broadcast = Broadcast(
        task=cursor.task, phase=cursor.phase, round=cursor.round, tensors=server.model, payload=server.payload
    )
    jobs = (Job(client, place, state.client_states.get(client)) for place, client in enumerate(clients))
    return Request(broadcast, tuple(jobs), len(clients), rule)


def simulated_line(answered: Answered, kept: tuple[Pending, ...], number: int, clock: ClockSection) -> dict[str, Any]:
    """What the record says of the simulated clock; nothing without one. ``kept``: what goes on to the next round."""
    if answered.schedule.seconds is None:
        return {}
    line: dict[str, Any] = {"simulated_seconds": answered.schedule.seconds}
    if clock.late == "fold":
        ids = [late.client for late in kept]  # a client has one update on its way at most
        weights = [(late, stale_weight(late, number, clock.staleness)) for late in answered.arrived]
        line["arrived"] = [{"client": p.client, "rounds_late": number - p.number, "weight": w} for p, w in weights]
        line["pending"] = ids
        line["lost"] = [late.client for late in answered.pending if late.client not in ids]
    return line


def too_late(client: int, seconds: float, schedule: Schedule) -> Failure:
    reason = f"would take {seconds:.4g} simulated seconds; the round closed at {schedule.seconds:.4g}"
    return Failure(client, "late", reason)


def as_pending(outcome: Outcome, number: int, done_after: Mapping[int, float], seconds: float) -> Pending:
    """One client's update. Tensors are copied: an engine may lend its own memory for the length of a round."""
    assert outcome.total is not None
    (report,), total = outcome.reports, outcome.total
    own = Total({name: tensor.clone() for name, tensor in total.tensors.items()}, total.weight)
    left = done_after[report.client] - seconds
    return Pending(client=report.client, number=number, left_s=left, samples=report.samples, total=own)


def stale_weight(late: Pending, number: int, staleness: float) -> float:
    """(1 + s) ** -a for an update that is s rounds old (FedAsync, arXiv 1903.03934; FedBuff, 2106.06639)."""
    return float((1 + number - late.number) ** -staleness)


def with_late(
    total: Total | None, arrived: Sequence[Pending], number: int, staleness: float, model: Tensors
) -> Total | None:
    """The round's sum plus the late ones, one after the other in the order in which they were asked for. What an update
    has lost of its weight is the present model's, so that one which arrives alone moves it by what is left (FedAsync).
    """
    for late in arrived:
        factor, weight = stale_weight(late, number, staleness), late.total.weight
        rest = weight * (1 - factor)
        tensors = {name: tensor * factor + model[name] * rest for name, tensor in late.total.tensors.items()}
        if total is not None:
            tensors = {name: total.tensors[name] + tensor for name, tensor in tensors.items()}
        total = Total(tensors, weight + (total.weight if total else 0.0))
    return total
