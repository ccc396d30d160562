"""The round loop: tasks, phases and rounds, a boundary after each task. The same for every engine.

It asks through a port, folds what comes back into the state, records it, and saves. How a client trains,
where it runs and what a method does at a boundary is not its business.
"""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from fedcil.availability import Availability
from fedcil.clock import Devices, asked_clients
from fedcil.errors import RunFailed, Stopped, TooFewClients
from fedcil.experiment import Experiment
from fedcil.messages import BORDER, UNEXPECTED, Outcome, Payload, Request, Tensors, count_bytes
from fedcil.methods.base import Phase, returned
from fedcil.port import Port, StopSignal
from fedcil.record.folder import RunFolder
from fedcil.state import Cursor, RunState, ServerState
from fedcil.stream import Task
from server import boundary
from server.asking import Answered, ask_on_time, rule_of
from server.cohort import choose, eligible
from server.cost import Stopwatch, forget_peak
from server.evaluation import Evaluator
from server.late import simulated_line, take_in
from server.schedule import make_schedule, wanted_answers

LOG = logging.getLogger("fedcil.border")
BRING_BACK = "bring clients back and `fedcil resume RUN`"


class Watcher(Protocol):
    """Somebody who looks on: a progress display, or nobody."""

    def recorded(self, line: Mapping[str, Any]) -> None: ...

    def client_done(self, client: int) -> None: ...

    def boundary_step(self, step: int, steps: int, terms: Mapping[str, float]) -> None: ...


class Nobody:
    """The watcher of a run that nobody looks at."""

    def recorded(self, line: Mapping[str, Any]) -> None:
        pass

    def client_done(self, client: int) -> None:
        pass

    def boundary_step(self, step: int, steps: int, terms: Mapping[str, float]) -> None:
        pass


@dataclass(frozen=True, slots=True)
class Session:
    """What the loop works with and never changes."""

    experiment: Experiment
    port: Port
    folder: RunFolder
    watcher: Watcher
    stop: StopSignal
    evaluator: Evaluator
    availability: Availability
    devices: Devices | None

    def ask(self, request: Request, deadline_s: float | None) -> Outcome:
        """What comes of it; the sum is on the device: from elsewhere it comes on the CPU."""
        outcome = self.port.run(request, deadline_s, self.watcher.client_done)
        return replace(outcome, total=outcome.total and outcome.total.to(self.experiment.compute.device))

    def save(self, state: RunState) -> None:
        self.folder.checkpoint(state)

    def progress(self, step: int, steps: int, terms: Mapping[str, float]) -> None:
        self.stop.check()
        self.watcher.boundary_step(step, steps, terms)


def open_session(
    experiment: Experiment,
    folder: RunFolder,
    port: Port,
    watcher: Watcher | None = None,
    stop: StopSignal | None = None,
) -> Session:
    """A session over an engine's port, with the test images and the availability model loaded."""
    availability, devices = experiment.conditions
    return Session(
        experiment=experiment,
        port=port,
        folder=folder,
        watcher=watcher or Nobody(),
        stop=stop or StopSignal(),
        evaluator=Evaluator(experiment),
        availability=availability,
        devices=devices,
    )


def run_tasks(session: Session, state: RunState) -> RunState:
    """From ``state`` to the end of the stream. Stopped and TooFewClients leave a checkpoint behind."""
    experiment = session.experiment
    for note in experiment.notes:
        warnings.warn(note, stacklevel=2)
    torch.set_num_threads(experiment.scenario.server.threads)
    forget_peak()
    session.save(state)
    try:
        for task in experiment.stream.tasks[state.cursor.task :]:
            phases = experiment.phases(task)
            while state.cursor.phase < len(phases):
                state = one_round(session, state, task, phases[state.cursor.phase])
            state = end_task(session, state, task)
    except Stopped:
        session.save(state)
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
        reduced = returned(experiment.method.reduce(server, phase, outcome.total), ServerState, "reduce")
        server = unchanged(reduced, server, experiment.frozen)
    else:
        answered = answered.held_back()
    stopwatch.stage("reduce")
    line = round_line(state, task, phase, answered, status)
    if evaluation_due(cursor, phase, scenario.server.evaluate_every):
        evaluation = session.evaluator.evaluate(server, task)
        line |= {"accuracy": evaluation.accuracy, "task_aware": evaluation.task_aware}
    stopwatch.stage("evaluate")
    after = forget_leavers(advance(state, server, answered, phase, status), experiment)
    line |= simulated_line(answered, after.pending, experiment.number(cursor), scenario.clock)
    line["client_state_bytes"] = sum(after.client_state_bytes.values())
    line["cost"] = stopwatch.read() | {"wire_bytes": outcome.wire_bytes}
    if outcome.attendance and outcome.attendance.events:
        line["cost"]["nodes"] = list(outcome.attendance.events)
    session.folder.append(line)
    session.watcher.recorded(line)
    log_refused(outcome)
    refuse_broken_method(outcome, answered.trained)
    if after.short_rounds >= scenario.server.patience:
        session.save(after)
        raise too_few(after.short_rounds, task, scenario.server.quorum, outcome)
    if (cursor.round + 1) % scenario.server.checkpoint_every == 0 or after.cursor.round == 0:
        session.save(after)
    return after


def ask_cohort(session: Session, state: RunState, task: Task, phase: Phase) -> Answered:
    experiment = session.experiment
    cohort = choose_cohort(session, state, task, phase)
    schedule, started = make_schedule(experiment, session.devices, state, task, phase, cohort), time.monotonic()
    answered = ask_on_time(experiment, schedule, state, phase, cohort, session.ask)
    if schedule.seconds is None:  # without a clock nobody is late
        return answered
    return take_in(answered, experiment, state, phase, session.ask, started)


def choose_cohort(session: Session, state: RunState, task: Task, phase: Phase) -> tuple[int, ...]:
    """Of those who are members, there, free and have samples."""
    experiment, cursor = session.experiment, state.cursor
    clients = experiment.scenario.clients
    here = session.availability(cursor.task, cursor.phase, cursor.round)
    busy = {late.client for late in state.pending}
    present = (here & session.port.reachable()) - busy
    counts = experiment.counts_at(task, experiment.number(cursor))
    candidates = eligible(present, counts, experiment.least_samples(phase))
    asked = asked_clients(clients.per_round, clients.over_sample)
    return choose(candidates, phase, asked, experiment.round_key(cursor).at("cohort"))


def round_status(answered: int, asked: int, quorum: float, least: int = 0) -> str:
    """ok, empty (nobody was asked), or no_quorum: too few of the asked answered, or fewer than a robust fold needs."""
    if asked == answered == 0:
        return "empty"
    enough = quorum * asked - 1e-9  # a share like 0.28 of 25 is not exact in binary
    return "ok" if answered >= max(1, least, enough) else "no_quorum"


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
    number = experiment.number(state.cursor)
    return state.without(lambda client: experiment.population.gone(client, number))


def round_line(state: RunState, task: Task, phase: Phase, answered: Answered, status: str) -> dict[str, Any]:
    """What the record says of a round. Bytes are logical tensors, the same on every engine."""
    cohort, outcome, late = list(answered.cohort), answered.outcome, answered.arrived
    sent = sum(report.bytes_up for report in outcome.reports) + sum(count_bytes(each.total.tensors) for each in late)
    payload = state.server.payload
    newcomers = set(cohort) - state.holders
    return {
        "kind": "round",
        "task": task.index,
        "phase": state.cursor.phase,
        "phase_name": phase.name,
        "round": state.cursor.round,
        "rounds": phase.rounds,
        "status": status,
        "cohort": cohort,
        "answered": [report.client for report in outcome.reports],
        "failures": [
            {"client": failure.client, "stage": failure.stage, "reason": failure.reason} for failure in outcome.failures
        ],
        "samples": sum(each.samples for each in outcome.reports) + sum(each.samples for each in late),
        "loss": mean_loss(outcome),
        "losses": [report.metrics.get("loss") for report in outcome.reports],
        "bytes": {
            "down": bytes_down(state.server.model, len(cohort), payload, len(newcomers)),
            "up": {SENT[phase.work]: sent},
        },
    }


SENT = {"train": "model", "fit": "statistics", "remember": "nothing"}  # what clients send, by the phase's work


def bytes_down(model: Tensors, clients: int, payload: Payload | None, newcomers: int) -> dict[str, int]:
    """Of the model to so many clients, and by part of the payload (teacher, generator, ...) to so many newcomers."""
    sizes = {"model": clients * count_bytes(model)}
    for name, tensor in (payload.tensors if payload else {}).items():
        part = name.partition(".")[0]
        sizes[part] = sizes.get(part, 0) + newcomers * tensor.numel() * tensor.element_size()
    return sizes


def mean_loss(outcome: Outcome) -> float | None:
    """Mean over the clients that trained, in the order of their ids."""
    losses = [report.metrics["loss"] for report in outcome.reports if "loss" in report.metrics]
    return math.fsum(losses) / len(losses) if losses else None


def end_task(session: Session, state: RunState, task: Task) -> RunState:
    """Evaluate, then cross the boundary unless it was the last. One step: a kill in between repeats it."""
    session.stop.check()
    experiment, stopwatch = session.experiment, Stopwatch()
    evaluation = session.evaluator.evaluate(state.server, task)
    line = {
        "kind": "task",
        "task": task.index,
        "classes": list(experiment.stream.order[task.old : task.seen]),
        "accuracy": evaluation.accuracy,
        "task_aware": evaluation.task_aware,
        "confusion": evaluation.confusion,
        "test_images": evaluation.test_images,
        "cost": stopwatch.read(),
    }
    session.watcher.recorded(line)
    lines, server = [line], state.server
    if not experiment.stream.last(task):
        stopwatch = Stopwatch()
        crossed = boundary.cross(server, task, experiment, session.progress)
        server = crossed.state
        lines.append(crossed.line | {"cost": stopwatch.read()})
        session.watcher.recorded(lines[-1])
    for line in lines:
        session.folder.append(line)
    after = replace(state, server=server, cursor=Cursor(task.index + 1), holders=frozenset())
    after = forget_leavers(after, experiment)
    session.save(after)
    return after


def log_refused(outcome: Outcome) -> None:
    """Who sent something that was refused, and why: it may be a bug, or an attack."""
    for failure in outcome.failures:
        if failure.stage == BORDER:
            LOG.warning("client %d was refused: %s", failure.client, failure.reason)


def refuse_broken_method(outcome: Outcome, asked: int) -> None:
    """RunFailed if every client of the round raised: that is the method's or the data's doing, not the clients'."""
    raised = [failure for failure in outcome.failures if failure.stage == UNEXPECTED]
    if asked and len(raised) == asked:
        raise RunFailed(
            f"all {asked} clients of a round raised an error; client {raised[0].client}: {raised[0].reason}",
            where="the method, the model or the data",
            next="mend it and start a new run, or `fedcil resume RUN`",
        )


def too_few(rounds: int, task: Task, quorum: float, outcome: Outcome) -> TooFewClients:
    reasons = Counter(f"{failure.stage}: {failure.reason}" for failure in outcome.failures).most_common(1)
    diverged = bool(outcome.failures) and all(failure.stage == "training" for failure in outcome.failures)
    return TooFewClients(
        f"{rounds} rounds in a row without enough clients" + "".join(f" ({reason})" for reason, _ in reasons),
        where=f"task {task.index + 1}",
        allowed=f"at least one answer and server.quorum = {quorum:g} of the answers wanted",
        next="mend the loss, or begin anew with a lower training.lr" if diverged else BRING_BACK,
    )
