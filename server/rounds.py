"""The round loop: tasks, phases and rounds, a boundary after each task. The same for every engine.

It asks through a port, folds what comes back into the state, records it, and saves. How a client trains,
where it runs and what a method does at a boundary is not its business.
"""

from __future__ import annotations

import contextlib
import logging
import math
import resource
import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from fedcil.availability import Availability, make_availability
from fedcil.errors import RunFailed, Stopped, TooFewClients
from fedcil.experiment import Experiment
from fedcil.messages import BORDER, UNEXPECTED, Broadcast, Job, Outcome, Payload, Request, count_bytes
from fedcil.methods.base import Phase
from fedcil.port import Port, StopSignal
from fedcil.record.folder import RunFolder
from fedcil.rule import PLAIN, Rule
from fedcil.state import Cursor, RunState
from fedcil.stream import Task
from server import boundary
from server.cohort import choose, eligible
from server.evaluation import Evaluator

LOG = logging.getLogger("fedcil.border")


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
    """What the loop works with; none of it is part of a run's result."""

    experiment: Experiment
    port: Port
    folder: RunFolder
    watcher: Watcher
    stop: StopSignal
    evaluator: Evaluator
    availability: Availability

    def save(self, state: RunState) -> None:
        self.folder.checkpoint(state, self.experiment)

    def record(self, lines: list[dict[str, Any]]) -> None:
        """Append what a step of the loop says, all at once: a step is recorded whole or not at all."""
        for line in lines:
            self.folder.append(line)

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
    scenario = experiment.scenario
    return Session(
        experiment=experiment,
        port=port,
        folder=folder,
        watcher=watcher or Nobody(),
        stop=stop or StopSignal(),
        evaluator=Evaluator(experiment),
        availability=make_availability(scenario.availability, scenario.clients.count, experiment.key),
    )


def forget_peak() -> None:
    """Let the peak of memory count from here, where the system can: a run does not answer for the one before it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_mb() -> float:
    """Largest resident memory of this process since ``forget_peak``, or since its start where that is not known."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


class Clock:
    """Seconds by stage and CPU seconds of this process since it was made, and the peak of its memory."""

    def __init__(self) -> None:
        self.wall, self.cpu = time.perf_counter(), time.process_time()
        self.stages: dict[str, float] = {}

    def stage(self, name: str) -> None:
        """The time since the last stage ended was this one's."""
        self.stages[name] = time.perf_counter() - self.wall - sum(self.stages.values())

    def read(self) -> dict[str, Any]:
        return {
            "seconds": time.perf_counter() - self.wall,
            "stages": self.stages,
            "cpu_seconds": time.process_time() - self.cpu,
            "peak_memory_mb": peak_memory_mb(),
        }


def run_tasks(session: Session, state: RunState) -> RunState:
    """From ``state`` to the end of the stream. Stopped and TooFewClients leave a checkpoint behind."""
    experiment = session.experiment
    torch.set_num_threads(experiment.scenario.server.threads)
    forget_peak()
    session.save(state)
    try:
        for task in experiment.stream.tasks[state.cursor.task :]:
            phases = experiment.method.phases(task, experiment.scenario.training.rounds)
            while state.cursor.phase < len(phases):
                state = one_round(session, state, task, phases[state.cursor.phase])
            state = end_task(session, state, task)
    except Stopped:
        session.save(state)
        raise
    return state


def one_round(session: Session, state: RunState, task: Task, phase: Phase) -> RunState:
    """Choose a cohort, ask it, reduce what came back, evaluate when due, record, save when due."""
    session.stop.check()
    experiment, cursor, clock = session.experiment, state.cursor, Clock()
    scenario = experiment.scenario
    cohort = choose_cohort(session, cursor, task, phase)
    request = make_request(state, cohort, rule_of(experiment, phase))
    outcome = session.port.run(request, scenario.server.deadline_s, session.watcher.client_done)
    torch.set_num_threads(scenario.server.threads)  # clients in threads of this process may have set another
    clock.stage("clients")
    status = round_status(outcome, len(cohort), scenario.server.quorum, request.rule.least)
    server = state.server
    if status == "ok":
        server = experiment.method.reduce(server, phase, outcome.total)
    clock.stage("reduce")
    line = round_line(state, task, phase, request, outcome, status)
    if evaluation_due(cursor, phase, scenario.server.evaluate_every):
        evaluation = session.evaluator.evaluate(server, task)
        line |= {"accuracy": evaluation.accuracy, "task_aware": evaluation.task_aware}
    clock.stage("evaluate")
    after = replace(advance(state, cohort, outcome, phase, status), server=server)
    line["client_state_bytes"] = sum(after.client_state_bytes.values())
    line["cost"] = clock.read() | {"wire_bytes": outcome.wire_bytes}
    if outcome.attendance and outcome.attendance.events:
        line["cost"]["nodes"] = list(outcome.attendance.events)
    session.record([line])
    session.watcher.recorded(line)
    log_refused(outcome)
    refuse_broken_method(outcome, len(cohort))
    if after.short_rounds >= scenario.server.patience:
        session.save(after)
        raise too_few(after.short_rounds, task, scenario.server.quorum, outcome)
    if (cursor.round + 1) % scenario.server.checkpoint_every == 0 or after.cursor.round == 0:
        session.save(after)
    return after


def choose_cohort(session: Session, cursor: Cursor, task: Task, phase: Phase) -> tuple[int, ...]:
    experiment = session.experiment
    scenario = experiment.scenario
    here = session.availability(cursor.task, cursor.phase, cursor.round)
    present = here & session.port.reachable()
    candidates = eligible(present, experiment.counts(task))
    place = ("task", cursor.task, "phase", cursor.phase, "round", cursor.round, "cohort")
    return choose(candidates, phase, scenario.clients.per_round, experiment.key.at(*place))


def rule_of(experiment: Experiment, phase: Phase) -> Rule:
    """Limits and robust folds are for models; what else clients send keeps its sum."""
    return experiment.scenario.server.rule if phase.sends_model else PLAIN


def make_request(state: RunState, cohort: tuple[int, ...], rule: Rule = PLAIN) -> Request:
    cursor, server = state.cursor, state.server
    broadcast = Broadcast(
        task=cursor.task,
        phase=cursor.phase,
        round=cursor.round,
        tensors=server.model,
        payload=server.payload,
    )
    states = state.client_states
    jobs = (Job(client, place, states.get(client)) for place, client in enumerate(cohort))
    return Request(broadcast, tuple(jobs), len(cohort), rule)


def round_status(outcome: Outcome, asked: int, quorum: float, least: int = 0) -> str:
    """ok, empty (nobody was asked), or no_quorum: too few of the asked answered, or fewer than a robust fold needs."""
    if asked == 0:
        return "empty"
    answered = len(outcome.reports)
    enough = quorum * asked - 1e-9  # a share like 0.28 of 25 is not exact in binary
    return "ok" if answered >= max(1, least, enough) else "no_quorum"


def evaluation_due(cursor: Cursor, phase: Phase, every: int) -> bool:
    """Every n rounds of a phase, but not after its last: the end of the task is evaluated anyway."""
    return every > 0 and (cursor.round + 1) % every == 0 and cursor.round + 1 < phase.rounds


def advance(state: RunState, cohort: tuple[int, ...], outcome: Outcome, phase: Phase, status: str) -> RunState:
    """Everything of the state but the model: cursor, who holds what, rounds without quorum."""
    cursor = Cursor(state.cursor.task, state.cursor.phase, state.cursor.round + 1)
    if cursor.round == phase.rounds:
        cursor = Cursor(cursor.task, cursor.phase + 1, 0)
    kept = {r.client: r for r in outcome.reports if phase.work == "remember" and r.state}
    return replace(
        state,
        cursor=cursor,
        client_states={**state.client_states, **{c: str(r.state) for c, r in kept.items()}},
        client_state_bytes={**state.client_state_bytes, **{c: r.state_bytes for c, r in kept.items()}},
        holders=state.holders | set(cohort) if state.server.payload else state.holders,
        short_rounds=0 if status == "ok" else state.short_rounds + 1,
        nodes=outcome.attendance.shares if outcome.attendance else state.nodes,
    )


def round_line(
    state: RunState, task: Task, phase: Phase, request: Request, outcome: Outcome, status: str
) -> dict[str, Any]:
    """What the record says of a round. Bytes are logical tensors, the same on every engine."""
    cohort = [job.client for job in request.jobs]
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
        "samples": sum(report.samples for report in outcome.reports),
        "loss": mean_loss(outcome),
        "losses": [report.metrics.get("loss") for report in outcome.reports],
        "bytes": {
            "down": {"model": len(cohort) * count_bytes(state.server.model)} | payload_bytes(payload, len(newcomers)),
            "up": {SENT[phase.work]: sum(report.bytes_up for report in outcome.reports)},
        },
    }


SENT = {"train": "model", "fit": "statistics", "remember": "nothing"}  # what clients send, by the phase's work


def payload_bytes(payload: Payload | None, clients: int) -> dict[str, int]:
    """By part of the payload (teacher, generator, ...), for so many clients."""
    sizes: dict[str, int] = {}
    for name, tensor in (payload.tensors if payload else {}).items():
        part = name.partition(".")[0]
        sizes[part] = sizes.get(part, 0) + clients * tensor.numel() * tensor.element_size()
    return sizes


def mean_loss(outcome: Outcome) -> float | None:
    """Mean over the clients that trained, in the order of their ids."""
    losses = [report.metrics["loss"] for report in outcome.reports if "loss" in report.metrics]
    return math.fsum(losses) / len(losses) if losses else None


def end_task(session: Session, state: RunState, task: Task) -> RunState:
    """Evaluate, then cross the boundary unless it was the last. One step: a kill in between repeats it."""
    session.stop.check()
    experiment, clock = session.experiment, Clock()
    evaluation = session.evaluator.evaluate(state.server, task)
    line = {
        "kind": "task",
        "task": task.index,
        "classes": list(experiment.stream.order[task.old : task.seen]),
        "accuracy": evaluation.accuracy,
        "task_aware": evaluation.task_aware,
        "confusion": evaluation.confusion,
        "test_images": evaluation.test_images,
        "cost": clock.read(),
    }
    session.watcher.recorded(line)
    lines, server = [line], state.server
    if not experiment.stream.last(task):
        clock = Clock()
        crossed = boundary.cross(server, task, experiment, session.progress)
        server = crossed.state
        lines.append(crossed.line | {"cost": clock.read()})
        session.watcher.recorded(lines[-1])
    session.record(lines)
    after = replace(state, server=server, cursor=Cursor(task.index + 1), holders=frozenset())
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
    return TooFewClients(
        f"{rounds} rounds in a row without enough clients" + "".join(f" ({reason})" for reason, _ in reasons),
        where=f"task {task.index + 1}",
        allowed=f"at least one answer and server.quorum = {quorum:g} of the asked clients",
        next="bring clients back and `fedcil resume RUN`",
    )
