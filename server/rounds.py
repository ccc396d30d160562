"""The round loop: tasks, phases and rounds, a boundary after each task. The same for every engine.

It asks through a port, folds what comes back into the state, records it, and saves. How a client trains,
where it runs and what a method does at a boundary is not its business.
"""

from __future__ import annotations

import time
import warnings
from dataclasses import replace

import torch

from fedcil.clock import asked_clients
from fedcil.errors import Stopped
from fedcil.experiment import Experiment
from fedcil.methods.base import Phase
from fedcil.state import Cursor, RunState, ServerState
from fedcil.stream import Task
from server import boundary
from server.asking import Answered, ask_on_time, rule_of
from server.cohort import choose, eligible
from server.cost import Stopwatch, forget_peak
from server.late import simulated_line, take_in
from server.lines import round_line, task_line
from server.method_calls import reduced
from server.schedule import make_schedule, wanted_answers
from server.session import Session
from server.verdict import log_refused, refuse_broken_method, round_status, too_few


def run_tasks(session: Session, state: RunState) -> RunState:
    """From ``state`` to the end of the stream. Stopped and TooFewClients leave a checkpoint behind."""
    experiment = session.experiment
    for note in experiment.notes:
        warnings.warn(note, stacklevel=2)
    torch.set_num_threads(experiment.scenario.server.threads)
    forget_peak()
    session.folder.checkpoint(state)
    try:
        for task in experiment.stream.tasks[state.cursor.task :]:
            phases = experiment.phases(task)
            while state.cursor.phase < len(phases):
                state = one_round(session, state, task, phases[state.cursor.phase])
            state = end_task(session, state, task)
    except Stopped:
        session.folder.checkpoint(state)
        raise
    return state


def unchanged(after: ServerState, before: ServerState, names: frozenset[str]) -> ServerState:
    """Parameters that nobody trains keep their bits: a weighted mean of equal numbers is rounded."""
    return replace(after, model={**after.model, **{name: before.model[name] for name in names}}) if names else after


def one_round(session: Session, state: RunState, task: Task, phase: Phase) -> RunState:
    """Choose a cohort, ask it, reduce what came back, evaluate when due, record, save when due."""
    session.stop.check()
    experiment, cursor, stopwatch = session.experiment, state.cursor, Stopwatch()
    scenario = experiment.scenario
    answered = ask_cohort(session, state, task, phase)
    outcome = answered.outcome
    stopwatch.cpu_elsewhere = outcome.cpu_elsewhere
    torch.set_num_threads(scenario.server.threads)  # clients in threads of this process may have set another
    stopwatch.stage("clients")
    wanted = wanted_answers(scenario.clients.per_round, phase, answered.cohort)
    status = round_status(answered.count, wanted, scenario.server.quorum, rule_of(experiment, phase).least)
    server = state.server
    if status == "ok":
        server = unchanged(reduced(experiment, server, phase, outcome.total), server, experiment.frozen)
    else:
        answered = answered.held_back()
    stopwatch.stage("reduce")
    line = round_line(state, task, phase, answered, status)
    if evaluation_due(cursor, phase, scenario.server.evaluate_every):
        evaluation = session.evaluator.evaluate(server, task)
        line |= {"accuracy": evaluation.accuracy, "task_aware": evaluation.task_aware}
    stopwatch.stage("evaluate")
    after = forget_leavers(advance(state, server, answered, phase, status), experiment)
    line |= simulated_line(answered, after.pending, experiment.round_number(cursor), scenario.clock)
    line["client_state_bytes"] = sum(after.client_state_bytes.values())
    line["cost"] = stopwatch.read() | {"wire_bytes": outcome.wire_bytes}
    if outcome.attendance and outcome.attendance.events:
        line["cost"]["nodes"] = list(outcome.attendance.events)
    session.folder.append(line)
    session.show(line)
    log_refused(outcome)
    refuse_broken_method(outcome, answered.trained)
    if after.short_rounds >= scenario.server.patience:
        session.folder.checkpoint(replace(after, short_rounds=0))  # who resumes has brought clients back
        raise too_few(after.short_rounds, task, scenario.server.quorum, outcome)
    if (cursor.round + 1) % scenario.server.checkpoint_every == 0 or after.cursor.round == 0:
        session.folder.checkpoint(after)
    return after


def ask_cohort(session: Session, state: RunState, task: Task, phase: Phase) -> Answered:
    experiment = session.experiment
    cohort = choose_cohort(session, state, task, phase)
    schedule, started = make_schedule(experiment, state, task, phase, cohort), time.monotonic()
    answered = ask_on_time(experiment, schedule, state, phase, cohort, session.ask)
    if schedule.seconds is None:  # without a clock nobody is late
        return answered
    return take_in(answered, experiment, state, phase, session.ask, started)


def choose_cohort(session: Session, state: RunState, task: Task, phase: Phase) -> tuple[int, ...]:
    """Of those who are members, there, free and have samples."""
    experiment, cursor = session.experiment, state.cursor
    clients = experiment.scenario.clients
    here = experiment.conditions.availability(cursor.task, cursor.phase, cursor.round)
    busy = {late.client for late in state.pending}
    reachable, counts = session.port.reachable(), experiment.counts_at(task, experiment.round_number(cursor))
    candidates = eligible(here, reachable, busy, counts, experiment.least_samples(phase))
    asked = asked_clients(clients.per_round, clients.over_sample)
    return choose(candidates, phase, asked, experiment.round_key(cursor).at("cohort"))


def evaluation_due(cursor: Cursor, phase: Phase, every: int) -> bool:
    """Every n rounds of a phase, but not after its last: the end of the task is evaluated anyway."""
    return every > 0 and (cursor.round + 1) % every == 0 and cursor.round + 1 < phase.rounds


def advance(state: RunState, server: ServerState, answered: Answered, phase: Phase, status: str) -> RunState:
    """To the next round with a new model: cursor, who holds what, rounds without quorum, late updates."""
    cursor = Cursor(state.cursor.task, state.cursor.phase, state.cursor.round + 1)
    if cursor.round == phase.rounds:
        cursor = Cursor(cursor.task, cursor.phase + 1, 0)
    same = server.payload and state.server.payload and server.payload.hash == state.server.payload.hash
    kept = {r.client: r for r in answered.outcome.reports if phase.work == "remember" and r.state}
    return replace(
        state,
        server=server,
        cursor=cursor,
        client_states={**state.client_states, **{c: str(r.state) for c, r in kept.items()}},
        client_state_bytes={**state.client_state_bytes, **{c: r.state_bytes for c, r in kept.items()}},
        holders=state.holders | set(answered.cohort) if same else frozenset(),
        short_rounds=0 if status == "ok" else state.short_rounds + 1,
        nodes=seen.shares if (seen := answered.outcome.attendance) else state.nodes,
        pending=answered.pending if cursor.phase == state.cursor.phase else (),  # they do not outlive their phase
    )


def forget_leavers(state: RunState, experiment: Experiment) -> RunState:
    """Who has left when the next round begins takes along what it kept."""
    gone = experiment.population.gone(experiment.round_number(state.cursor))
    return state.without(lambda client: bool(gone[client])) if gone.any() else state


def end_task(session: Session, state: RunState, task: Task) -> RunState:
    """Evaluate, then cross the boundary unless it was the last. One step: a kill in between repeats it."""
    session.stop.check()
    experiment, stopwatch = session.experiment, Stopwatch()
    evaluation = session.evaluator.evaluate(state.server, task)
    line = task_line(task, experiment.stream, evaluation) | {"cost": stopwatch.read()}
    session.show(line)
    lines, server = [line], state.server
    if not experiment.stream.last(task):
        stopwatch = Stopwatch()
        server, crossed = boundary.cross(server, task, experiment, session.progress)
        lines.append(crossed | {"cost": stopwatch.read()})
        session.show(lines[-1])
    for line in lines:
        session.folder.append(line)
    after = replace(state, server=server, cursor=Cursor(task.index + 1), holders=frozenset())
    after = forget_leavers(after, experiment)
    session.folder.checkpoint(after)
    return after
