"""Late updates, where a simulated clock makes clients late: folded into the round in which they arrive, or dropped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from fedcil.clock import Schedule
from fedcil.experiment import Experiment
from fedcil.messages import Attendance, Failure, Outcome
from fedcil.methods.base import Phase
from fedcil.port import remaining
from fedcil.state import Pending, RunState
from fedcil.tables import ClockSection
from fedcil.tensors import Tensors, Total
from server.asking import Answered, Ask, make_request, rule_of, with_failures


def take_in(
    answered: Answered, experiment: Experiment, state: RunState, phase: Phase, ask: Ask, started: float
) -> Answered:
    """Fold in what arrives late in this round, and make the late updates that will arrive later, as long as
    ``server.deadline_s`` leaves time for them since ``started``.
    """
    clock, number, schedule = experiment.scenario.clock, experiment.round_number(state.cursor), answered.schedule
    folds, rule = clock.late == "fold" and phase.sends_model, rule_of(experiment, phase)
    made: list[Outcome] = []
    for client in schedule.late if folds else ():
        left = remaining(experiment.scenario.server.deadline_s, started)
        if left == 0.0:
            break
        made.append(ask(make_request(state, (client,), rule), left))
    seconds = schedule.seconds or 0.0
    arrived = tuple(late for late in state.pending if late.left_s <= seconds)
    pending = [replace(late, left_s=late.left_s - seconds) for late in state.pending if late.left_s > seconds]
    pending += [as_pending(each, number, schedule.late, seconds) for each in made if each.total]
    if folds:
        never = list(schedule.late)[len(made) :]
        failed = [Failure(client, "deadline", "not asked: the round's time was up") for client in never]
    else:
        failed = [too_late(client, taken, schedule) for client, taken in schedule.late.items()]
    failed += [failure for each in made for failure in each.failures]
    outcome = replace(
        with_failures(answered.outcome, failed),
        attendance=latest([answered.outcome.attendance, *(each.attendance for each in made)]),
        total=with_late(answered.outcome.total, arrived, number, clock.staleness, state.server.model),
        wire_bytes=sum(each.wire_bytes for each in (answered.outcome, *made)),
        cpu_elsewhere=sum(each.cpu_elsewhere for each in (answered.outcome, *made)),
    )
    trained = answered.trained + len(made)
    return replace(answered, outcome=outcome, trained=trained, arrived=arrived, pending=tuple(pending))


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


def latest(seen: Sequence[Attendance | None]) -> Attendance | None:
    """Who serves whom after the last of several requests, with what happened in all of them."""
    known = [each for each in seen if each]
    return replace(known[-1], events=tuple(event for each in known for event in each.events)) if known else None


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
