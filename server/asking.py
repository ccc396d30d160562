"""A round's request, and what came of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from fedcil.clock import Schedule
from fedcil.experiment import Experiment
from fedcil.messages import Broadcast, Failure, Job, Outcome, Request
from fedcil.methods.base import Phase
from fedcil.rule import PLAIN, Rule
from fedcil.state import Pending, RunState

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


def ask_on_time(
    experiment: Experiment, schedule: Schedule, state: RunState, phase: Phase, cohort: tuple[int, ...], ask: Ask
) -> Answered:
    """Those of the cohort who are on time; who vanishes has failed."""
    request = make_request(state, schedule.on_time, rule_of(experiment, phase))
    outcome = ask(request, experiment.scenario.server.deadline_s)
    vanished = [Failure(client, "dropout", "vanished in mid-round") for client in schedule.dropped]
    return Answered(cohort, schedule, with_failures(outcome, vanished), trained=len(schedule.on_time))


def with_failures(outcome: Outcome, more: Sequence[Failure]) -> Outcome:
    """By client."""
    failures = sorted((*outcome.failures, *more), key=lambda failure: failure.client)
    return replace(outcome, failures=tuple(failures))


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
