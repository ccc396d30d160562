"""The round loop over a port that is a table: who answers what is written down, nothing is trained."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch

import fedcil
from fedcil.errors import InputError, RunFailed, Stopped, TooFewClients
from fedcil.experiment import Experiment, make_timeline, open_experiment
from fedcil.gather import Gathered
from fedcil.messages import Attendance, Failure, Outcome, Payload, Report, Request
from fedcil.methods.base import Boundary, Notice, Phase
from fedcil.population import make_population
from fedcil.port import ClientDone, StopSignal
from fedcil.record.folder import RunFolder
from fedcil.scenario_file import load_scenario
from fedcil.state import Cursor, RunState, ServerState
from fedcil.stream import Task
from fedcil.tensors import Contribution, content_hash, count_bytes
from server.rounds import evaluation_due, run_tasks
from server.session import Nobody, open_session
from server.verdict import BRING_BACK, round_status, too_few

CLIENTS = frozenset(range(6))
Place = tuple[int, int, int]


def experiment(*overrides: str) -> Experiment:
    """3 tasks of 2 classes, 3 rounds each, 3 of 6 clients a round; the payload is the teacher of FedLwF."""
    tables = {
        "method": {"name": "fedlwf"},
        "data": {"name": "synthetic", "classes": 6, "samples_per_class": 12, "image_size": 4, "test_per_class": 2},
        "stream": {"tasks": 3},
        "partition": {"name": "iid"},
        "clients": {"count": 6, "per_round": 3},
        "model": {"width": 2},
        "training": {"rounds": 3},
    }
    return open_experiment(load_scenario(tables, overrides))


@dataclass
class Table:
    """A port: ``here`` says who can be reached, ``lost`` who is asked in vain, ``before`` what happens first.

    A client's contribution depends on the model it was sent, on its id and on the round; after a ``remember``
    phase it keeps a state whose name says so.
    """

    here: Callable[[int], frozenset[int]] = lambda _: CLIENTS  # by the number of the call
    lost: Callable[[Place, int], bool] = lambda *_: False
    before: Callable[[Request], None] = lambda _: None
    cpu_elsewhere: float = 0.0  # what each round costs other processes
    remember: int | None = None  # the phase in which clients keep something and send nothing
    requests: list[Request] = field(default_factory=list)

    def reachable(self) -> frozenset[int]:
        return self.here(len(self.requests))

    def run(self, request: Request, deadline_s: float | None, done: ClientDone) -> Outcome:
        self.before(request)
        self.requests.append(request)
        broadcast = request.broadcast
        place = (broadcast.task, broadcast.phase, broadcast.round)
        gathered = Gathered(request, done)
        for job in request.jobs:
            if self.lost(place, job.client):
                gathered.fail(job.client, "test", "lost on purpose")
                continue
            keeps = broadcast.phase == self.remember
            state = f"{job.client:016x}{broadcast.task:016x}" if keeps else job.state
            tensors = {name: tensor + 1 + job.client + broadcast.round for name, tensor in broadcast.tensors.items()}
            report = Report(
                client=job.client,
                samples=4,
                metrics={} if keeps else {"loss": 1.0 + job.client},
                state=state,
                state_bytes=10 * (broadcast.task + 1) if keeps else 0,
                bytes_up=0 if keeps else count_bytes(tensors),
            )
            gathered.answer(report, None if keeps else Contribution(tensors, 1.0 + job.client))
        return replace(gathered.outcome(), cpu_elsewhere=self.cpu_elsewhere)

    def close(self) -> None:
        pass


@dataclass
class Ran:
    """A run that was started: its folder, the states that were saved, the one at the end, and its lines."""

    folder: RunFolder
    saved: list[RunState]
    end: RunState | None = None
    error: Exception | None = None

    @property
    def lines(self) -> list[dict[str, Any]]:
        text = (self.folder.path / "metrics.jsonl").read_text()
        return [{k: v for k, v in json.loads(line).items() if k != "cost"} for line in text.splitlines()]

    def rounds(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["kind"] == "round"]


Start = Callable[..., Ran]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """start(experiment, port, state=None, folder=None, **session): run to the end or to an error."""
    folders: list[RunFolder] = []
    checkpoint = RunFolder.checkpoint
    saved: list[RunState] = []

    def spy(folder: RunFolder, state: RunState) -> None:
        saved.append(state)
        checkpoint(folder, state)

    monkeypatch.setattr(RunFolder, "checkpoint", spy)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # nobody pulls the plug here

    def go(
        opened: Experiment, port: Table, state: RunState | None = None, folder: RunFolder | None = None, **more: Any
    ) -> Ran:
        folder = folder or RunFolder.create(tmp_path, opened)
        folders.append(folder)
        saved.clear()
        ran = Ran(folder, [])
        try:
            ran.end = run_tasks(open_session(opened, folder, port, **more), state or opened.first_state())
        except (Stopped, TooFewClients, InputError, RunFailed) as error:
            ran.error = error
        ran.saved = list(saved)
        return ran

    yield go
    for folder in folders:
        folder.close()


def bits(state: RunState | None) -> Any:
    assert state is not None
    server = state.server
    tensors = (content_hash(server.model), content_hash(server.memory), server.payload and server.payload.hash)
    return tensors, replace(state, server=ServerState(model={}))


def phased(opened: Experiment, *phases: Phase) -> Experiment:
    method = replace(opened.method, phases=lambda task, rounds: phases)
    scenario = opened.scenario
    timeline = make_timeline(method, opened.stream, scenario.training.rounds)
    population = make_population(scenario.population, scenario.clients.count, timeline, opened.key)
    return replace(opened, method=method, population=population)


TWO_PHASES = (Phase(name="train", rounds=2), Phase(name="remember", rounds=1, who="all", work="remember"))


# The way through tasks, phases and rounds


def test_a_rounds_cost_counts_the_workers_processes(start: Start) -> None:
    ran = start(experiment(), Table(cpu_elsewhere=1000.0))
    lines = (ran.folder.path / "metrics.jsonl").read_text().splitlines()
    costs = [json.loads(line)["cost"] for line in lines]
    assert [cost["cpu_seconds"] > 1000 for cost in costs].count(True) == len(ran.rounds())


def test_the_loop_goes_through_tasks_phases_and_rounds_in_order(start: Start) -> None:
    port = Table(remember=1)
    ran = start(phased(experiment(), *TWO_PHASES), port)
    places = [(r.broadcast.task, r.broadcast.phase, r.broadcast.round) for r in port.requests]
    assert places == [(task, phase, round_) for task in range(3) for phase, round_ in [(0, 0), (0, 1), (1, 0)]]
    kinds = ["round", "round", "round", "task", "boundary"]
    assert [line["kind"] for line in ran.lines] == [*kinds, *kinds, *kinds[:4]]  # none after the last task
    assert ran.end is not None
    assert ran.end.cursor == Cursor(3, 0, 0)


def test_the_cursor_passes_from_phase_to_phase_to_boundary_to_task(start: Start) -> None:
    """A cursor behind the last phase means that the boundary comes next."""
    ran = start(phased(experiment(), *TWO_PHASES), Table(remember=1))
    one = [(0, 0), (0, 1), (1, 0), (2, 0)]
    expected = [Cursor(task, *rest) for task in range(3) for rest in one] + [Cursor(3)]
    assert [state.cursor for state in ran.saved] == expected


def test_the_head_grows_after_each_task_but_the_last(start: Start) -> None:
    port = Table()
    ran = start(experiment(), port)
    assert [len(request.broadcast.tensors["head.bias"]) for request in port.requests] == [2] * 3 + [4] * 3 + [6] * 3
    assert ran.end is not None
    assert len(ran.end.server.model["head.bias"]) == 6


def test_a_round_is_the_weighted_mean_of_who_answered(start: Start) -> None:
    """x becomes sum over c of (1 + c)(x + 1 + c + r) / sum of (1 + c)."""
    port = Table()
    opened = experiment("training.rounds=1", "stream.tasks=1")
    state = opened.first_state()
    ran = start(opened, port, state)
    weights = torch.tensor([1.0 + job.client for job in port.requests[0].jobs])
    moved = (weights * weights).sum() / weights.sum()
    assert ran.end is not None
    for name, tensor in state.server.model.items():
        torch.testing.assert_close(ran.end.server.model[name], tensor + moved)


def test_a_round_s_line_says_who_was_asked_who_answered_and_what_it_cost(start: Start) -> None:
    """Loss: the mean of 1 + id over those who answered, in order of id."""
    port = Table(lost=lambda _, client: client % 2 == 0)
    opened = experiment("clients.per_round=6")
    first = start(opened, port).rounds()[0]
    model = count_bytes(opened.first_state().server.model)
    assert first == {
        "kind": "round",
        "task": 0,
        "phase": 0,
        "phase_name": "train",
        "round": 0,
        "rounds": 3,
        "status": "ok",
        "cohort": [0, 1, 2, 3, 4, 5],
        "answered": [1, 3, 5],
        "failures": [{"client": client, "stage": "test", "reason": "lost on purpose"} for client in (0, 2, 4)],
        "samples": 12,
        "loss": 4.0,
        "losses": [2.0, 4.0, 6.0],
        "bytes": {"down": {"model": 6 * model}, "up": {"model": 3 * model}},
        "accuracy": first["accuracy"],
        "task_aware": first["task_aware"],
        "client_state_bytes": 0,
    }


# Cohorts


def test_cohorts_do_not_depend_on_what_happened_before(start: Start) -> None:
    def cohorts(port: Table) -> list[list[int]]:
        return [line["cohort"] for line in start(experiment(), port).rounds()]

    whole = cohorts(Table())
    assert cohorts(Table(lost=lambda place, client: (client + place[2]) % 2 == 0)) == whole
    one_gone = cohorts(Table(here=lambda call: CLIENTS - ({0} if call == 0 else set())))
    assert one_gone[1:] == whole[1:]
    assert len({tuple(cohort) for cohort in whole}) > 3
    assert all(cohort == sorted(set(cohort)) and len(cohort) == 3 for cohort in whole)


def test_a_phase_for_all_asks_everyone_who_is_there(start: Start) -> None:
    port = Table(here=lambda call: CLIENTS - {call % 6}, remember=1)
    ran = start(phased(experiment(), *TWO_PHASES), port)
    for call, line in enumerate(ran.rounds()):
        everyone = sorted(CLIENTS - {call % 6})
        assert (line["cohort"] == everyone) == (line["phase"] == 1)
        assert set(line["cohort"]) <= set(everyone)


def test_clients_that_cannot_train_are_never_asked(start: Start) -> None:
    """8 images of a task for 6 clients: at least 2 have less than two."""
    overrides = ["data.samples_per_class=4", "partition.allow_empty=true", "clients.per_round=6"]
    opened = experiment(*overrides)
    ran = start(opened, Table())
    for line in ran.rounds():
        counts = opened.counts(opened.stream.tasks[line["task"]])
        assert line["cohort"] == [client for client in range(6) if counts[client] >= 2]
        assert 0 < len(line["cohort"]) <= 4


# Payload, client states


def test_a_payload_that_changes_in_a_round_is_sent_to_all_again(start: Start) -> None:
    """Its part "model" is no part of the model."""
    opened = experiment("stream.tasks=1", "training.rounds=3")
    rounds = iter(range(3))

    def reduce(server: ServerState, phase: Phase, total: Any) -> ServerState:
        new = Payload.of({"model.round": torch.tensor([float(next(rounds))])})
        return replace(opened.method.reduce(server, phase, total), payload=new)

    ran = start(replace(opened, method=replace(opened.method, reduce=reduce)), Table())
    assert ran.error is None
    model = count_bytes(opened.first_state().server.model)
    assert [line["bytes"]["down"] for line in ran.rounds()] == [
        {"model": 3 * model},
        {"model": 3 * (model + 4)},
        {"model": 3 * (model + 4)},
    ]


def test_payload_bytes_count_once_for_each_client_and_task(start: Start) -> None:
    ran = start(experiment(), Table(lost=lambda _, client: client == 3))
    met: dict[int, set[int]] = {0: set(), 1: set(), 2: set()}
    sizes = {1: set[int](), 2: set[int]()}
    for line in ran.rounds():
        new = set(line["cohort"]) - met[line["task"]]
        met[line["task"]] |= new
        sent = sum(line["bytes"]["down"].values()) - line["bytes"]["down"]["model"]
        if line["task"] == 0:
            assert sent == 0
        elif new:
            assert sent % len(new) == 0
            sizes[line["task"]].add(sent // len(new))
        else:
            assert sent == 0
    first = count_bytes(experiment().first_state().server.model)
    assert sizes[1] == {first}  # the teacher of task 2 is the model of task 1
    assert len(sizes[2]) == 1


def test_client_states_are_named_in_later_requests_and_counted(start: Start) -> None:
    """Each task every client keeps 10 bytes per task so far; one that was lost keeps its old version."""
    port = Table(remember=1, lost=lambda place, client: place[:2] == (1, 1) and client == 2)
    ran = start(phased(experiment(), *TWO_PHASES), port)
    assert [line["client_state_bytes"] for line in ran.rounds()] == [0, 0, 60, 60, 60, 110, 110, 110, 180]
    for request in port.requests:
        task = request.broadcast.task
        for job in request.jobs:
            version = 0 if job.client == 2 and task == 2 else task - 1
            assert job.state == (None if task == 0 else f"{job.client:016x}{version:016x}")


# Quorum, patience, empty cohorts


@pytest.mark.parametrize(
    ("asked", "answered", "quorum", "status"),
    [
        (0, 0, 0.0, "empty"),
        (0, 0, 1.0, "empty"),
        (5, 0, 0.0, "no_quorum"),
        (5, 1, 0.0, "ok"),
        (5, 2, 0.5, "no_quorum"),
        (5, 3, 0.5, "ok"),
        (5, 4, 1.0, "no_quorum"),
        (5, 5, 1.0, "ok"),
        (10, 7, 0.7, "ok"),
        (25, 7, 0.28, "ok"),  # in binary 0.28 * 25 = 7.000000000000001
        (100, 7, 0.07, "ok"),
        (100, 6, 0.07, "no_quorum"),
    ],
)
def test_a_quorum_is_a_share_of_the_asked(asked: int, answered: int, quorum: float, status: str) -> None:
    outcome = Outcome(None, tuple(Report(client=client, samples=1) for client in range(answered)), ())
    assert round_status(len(outcome.reports), asked, quorum) == status


def test_below_quorum_the_model_stays_and_the_round_counts(start: Start) -> None:
    """Two of three are lost in round 1 of each task: quorum 0.5 of 3 asks for 2."""
    port = Table(lost=lambda place, client: place[2] == 1 and client > 0)
    ran = start(experiment("server.quorum=0.5"), port)
    assert [line["status"] for line in ran.rounds()] == ["ok", "no_quorum", "ok"] * 3
    for task in range(3):
        _, before, after = (request.broadcast.tensors for request in port.requests[3 * task : 3 * task + 3])
        assert content_hash(before) == content_hash(after)


def test_rounds_with_an_empty_cohort_go_by_and_count_towards_patience(start: Start) -> None:
    ran = start(experiment("server.patience=3"), Table(here=lambda call: CLIENTS if call % 3 == 0 else frozenset()))
    assert [line["status"] for line in ran.rounds()] == ["ok", "empty", "empty"] * 3
    assert [state.short_rounds for state in ran.saved[:4]] == [0, 0, 1, 2]
    assert all(line["loss"] is None and line["answered"] == [] for line in ran.rounds() if line["status"] == "empty")


def test_patience_is_of_rounds_in_a_row_also_across_tasks(start: Start) -> None:
    """Lost from round 2 of task 0 to round 1 of task 1: three in a row."""
    port = Table(lost=lambda place, _: (0, 0, 2) <= place <= (1, 0, 1))
    assert start(experiment("server.patience=4"), port).error is None
    ran = start(experiment("server.patience=3"), port)
    assert isinstance(ran.error, TooFewClients)
    assert "3 rounds in a row" in ran.error.what
    assert ran.error.where == "task 2"
    assert ran.error.exit_code == 4
    assert [line["status"] for line in ran.rounds()] == ["ok", "ok", "no_quorum", "no_quorum", "no_quorum"]


def test_too_few_clients_leave_a_checkpoint_to_go_on_from(start: Start) -> None:
    """The rounds that failed are over; once clients are back the run ends, with a line for each round."""
    opened = experiment("server.patience=2", "server.checkpoint_every=100")
    ran = start(opened, Table(lost=lambda place, _: place[2] > 0))
    assert isinstance(ran.error, TooFewClients)
    ran.folder.close()
    folder, state = RunFolder.reopen(ran.folder.path, opened)
    resumed = start(opened, Table(), state, folder)
    assert state.cursor == Cursor(0, 1, 0)
    assert state.short_rounds == 0  # who resumes has all of the patience again
    assert resumed.error is None
    assert [(line["task"], line["round"]) for line in resumed.rounds()] == [(t, r) for t in range(3) for r in range(3)]


# Evaluation


@pytest.mark.parametrize(("every", "rounds"), [(0, []), (1, [0, 1, 2, 3, 4, 5]), (2, [1, 3, 5]), (3, [2, 5]), (7, [])])
def test_evaluation_every_n_rounds_but_not_after_the_last(every: int, rounds: list[int]) -> None:
    phase = Phase(name="train", rounds=7)
    assert [r for r in range(7) if evaluation_due(Cursor(0, 0, r), phase, every)] == rounds


def test_a_task_s_line_has_accuracy_of_all_tasks_so_far(start: Start) -> None:
    ran = start(experiment("server.evaluate_every=2"), Table())
    tasks = [line for line in ran.lines if line["kind"] == "task"]
    assert [(line["task"], len(line["accuracy"]), line["test_images"]) for line in tasks] == [
        (0, 1, [4]),
        (1, 2, [4, 4]),
        (2, 3, [4, 4, 4]),
    ]
    assert [line["classes"] for line in tasks] == [[0, 1], [2, 3], [4, 5]]
    assert [len(line.get("accuracy", [])) for line in ran.rounds()] == [0, 1, 0, 0, 2, 0, 0, 3, 0]


# Checkpoints, stopping, resuming


@pytest.mark.parametrize(("every", "rounds"), [(1, [0, 1, 2, 3, 4, 5]), (2, [0, 2, 4, 5]), (4, [0, 4, 5])])
def test_checkpoints_are_saved_every_n_rounds_and_at_the_end_of_a_phase(
    start: Start, every: int, rounds: list[int]
) -> None:
    ran = start(experiment(f"server.checkpoint_every={every}", "stream.tasks=1", "training.rounds=5"), Table())
    cursors = [state.cursor for state in ran.saved]
    assert cursors == [Cursor(0, 0, r) if r < 5 else Cursor(0, 1, 0) for r in rounds] + [Cursor(1)]


@pytest.mark.parametrize("two_phases", [False, True])
def test_a_resume_from_any_state_ends_as_the_undisturbed_run(start: Start, two_phases: bool) -> None:
    """Losses, payload, client states and short rounds included; the lines are those that were still to come."""
    port = Table(
        lost=lambda place, client: (sum(place) + client) % 3 == 0,
        remember=1 if two_phases else None,
    )
    opened = experiment("server.quorum=0.6", "server.patience=20")
    opened = phased(opened, *TWO_PHASES) if two_phases else opened
    whole = start(opened, port)
    assert {line["status"] for line in whole.rounds()} == {"ok", "no_quorum"}
    assert len(whole.saved) == 13  # before the first round, after each of 9, after each of 3 tasks
    for number, state in enumerate(whole.saved):
        again = start(opened, port, state)
        assert bits(again.end) == bits(whole.end)
        assert again.lines == whole.lines[len(whole.lines) - len(again.lines) :]
        assert sum(line["kind"] == "round" for line in again.lines) == 9 - (number - state.cursor.task)


@pytest.mark.parametrize("port_stops", [False, True])
def test_a_stop_in_a_round_leaves_the_state_of_the_last_finished_round(start: Start, port_stops: bool) -> None:
    """The signal comes while clients work in the fifth round. A port that sees it ends the round unfinished;
    one that does not is waited for, and its round counts.
    """
    opened, stop = experiment("server.checkpoint_every=100"), StopSignal()
    whole = start(opened, Table())

    def at_fifth(request: Request) -> None:
        if (request.broadcast.task, request.broadcast.round) == (1, 1):
            stop.set(143)
            if port_stops:
                stop.check()

    ran = start(opened, Table(before=at_fifth), stop=stop)
    assert isinstance(ran.error, Stopped)
    assert ran.error.exit_code == 143
    assert ran.lines == whole.lines[: 6 if port_stops else 7]  # 3 rounds, task, boundary, 1 or 2 rounds
    ran.folder.close()
    folder, state = RunFolder.reopen(ran.folder.path, opened)
    resumed = start(opened, Table(), state, folder)
    assert state.cursor == Cursor(1, 0, 1 if port_stops else 2)
    assert resumed.lines == whole.lines
    assert bits(resumed.end) == bits(whole.end)
    assert list(ran.folder.path.glob("metrics.cut-*")) == []


def name_of(opened: Experiment, label: int) -> str:
    """The data set's name of the class that came ``label``-th."""
    return opened.data.class_names[opened.stream.order[label]]


def test_a_boundary_that_diverged_ends_the_run_with_its_checkpoint(start: Start) -> None:
    """Otherwise NaN would travel to every client of the next task."""

    def boundary(state: ServerState, *args: Any) -> Boundary:
        payload = Payload.of({"generator.weight": torch.tensor([float("nan")])})
        return Boundary(ServerState(model=state.model, memory=state.memory, payload=payload))

    opened = experiment()
    opened = replace(opened, method=replace(opened.method, boundary=boundary))
    ran = start(opened, Table())
    assert isinstance(ran.error, RunFailed)
    assert "generator.weight" in str(ran.error)
    assert [line["kind"] for line in ran.lines] == ["round"] * 3


def test_what_a_boundary_logs_may_be_any_table(start: Start) -> None:
    log = MappingProxyType({"loss": 1.0})
    opened = experiment()
    opened = replace(opened, method=replace(opened.method, boundary=lambda state, *_: Boundary(state, log=log)))
    ran = start(opened, Table())
    assert ran.error is None
    assert [line["loss"] for line in ran.lines if line["kind"] == "boundary"] == [1.0, 1.0]


@pytest.mark.parametrize(
    ("log", "says"),
    [
        ({"task": 7}, r"has \['task'\] of the record"),
        ({"loss": float("inf")}, "cannot be recorded"),
        ({"loss": torch.ones(1)}, "cannot be recorded"),
    ],
)
def test_what_a_boundary_logs_must_fit_into_the_record(start: Start, log: dict[str, Any], says: str) -> None:
    opened = experiment()
    opened = replace(opened, method=replace(opened.method, boundary=lambda state, *_: Boundary(state, log=log)))
    ran = start(opened, Table())
    assert isinstance(ran.error, RunFailed)
    assert re.search(f"the log of the method's boundary {says}", ran.error.what)
    assert [line["kind"] for line in ran.lines] == ["round"] * 3


def test_a_stop_in_a_boundary_repeats_the_end_of_the_task(start: Start) -> None:
    """The watcher has seen the task's figures by then; they are recorded with the boundary, or not at all."""
    stop = StopSignal()

    def boundary(state: ServerState, *args: Any) -> Boundary:
        args[-1](1, 2, {})
        return Boundary(state, log={"histogram": [1]}, warnings=(Notice("look out for {classes}", (1, 0)),))

    opened = experiment()
    opened = replace(opened, method=replace(opened.method, boundary=boundary))
    whole = start(opened, Table())

    class StopAtTask:
        def recorded(self, line: Mapping[str, Any]) -> None:
            if line["kind"] == "task" and line["task"] == 1:
                stop.set(5)

        def client_done(self, client: int) -> None:
            pass

        def boundary_step(self, step: int, steps: int, terms: Mapping[str, float]) -> None:
            assert (step, steps) == (1, 2)

    ran = start(opened, Table(), stop=stop, watcher=StopAtTask())
    assert isinstance(ran.error, Stopped)
    assert ran.lines == whole.lines[:8]  # 3 rounds, task, boundary, 3 rounds
    ran.folder.close()
    folder, state = RunFolder.reopen(ran.folder.path, opened)
    resumed = start(opened, Table(), state, folder)
    assert state.cursor == Cursor(1, 1, 0)
    assert resumed.lines == whole.lines
    assert resumed.lines[4] == {
        "kind": "boundary",
        "task": 0,
        "classes": list(opened.stream.order[: opened.stream.tasks[0].seen]),
        "warnings": [f"look out for classes {', '.join(repr(name_of(opened, label)) for label in (1, 0))}"],
        "histogram": [1],
    }
    assert bits(resumed.end) == bits(whole.end)


def test_a_stop_before_the_first_round_leaves_the_first_state(start: Start) -> None:
    stop = StopSignal()
    stop.set(130)
    ran = start(experiment(), Table(), stop=stop)
    assert isinstance(ran.error, Stopped)
    assert ran.lines == []
    assert ran.folder.checkpoints.load().state.cursor == Cursor()


def test_a_run_that_is_over_has_nothing_left_to_do(start: Start) -> None:
    whole = start(experiment(), Table())
    port = Table()
    again = start(experiment(), port, whole.end)
    assert (again.lines, port.requests) == ([], [])
    assert bits(again.end) == bits(whole.end)


# Availability


def test_bernoulli_availability_is_a_matter_of_the_place(start: Start) -> None:
    opened = experiment("availability={name='bernoulli', probability=0.5}", "clients.per_round=6", "server.patience=99")
    whole = start(opened, Table())
    for line in reversed(whole.rounds()):
        there = opened.conditions.availability(line["task"], line["phase"], line["round"])
        assert line["cohort"] == np.flatnonzero(there).tolist()
    assert len({len(line["cohort"]) for line in whole.rounds()}) > 1


def test_a_recorded_run_is_replayed_by_who_answered(start: Start) -> None:
    """Who was lost then is not asked now; the sums are over the same clients, so the models are the same."""
    lost = Table(lost=lambda place, client: (place[0] + place[2] + client) % 2 == 0 or place == (1, 0, 1))
    first = start(experiment(), lost)
    metrics = first.folder.path / "metrics.jsonl"
    again = start(experiment(f"availability={{name='recorded', file='{metrics}'}}"), Table())
    assert [line["cohort"] for line in again.rounds()] == [line["answered"] for line in first.rounds()]
    assert all(line["failures"] == [] for line in again.rounds())
    assert again.rounds()[4]["status"] == "empty"
    assert first.end is not None
    assert again.end is not None
    for name, tensor in first.end.server.model.items():
        torch.testing.assert_close(again.end.server.model[name], tensor, rtol=1e-5, atol=1e-5)


def test_a_record_that_is_too_short_begins_no_run(start: Start) -> None:
    first = start(experiment("stream.tasks=1"), Table())
    metrics = first.folder.path / "metrics.jsonl"
    with pytest.raises(InputError, match="task 1, phase 0, round 0 was not recorded") as caught:
        start(experiment(f"availability={{name='recorded', file='{metrics}'}}"), Table())
    assert caught.value.where == str(metrics)


class Silent(Table):
    """In task 1, client 2 remembers without saying what: the border lets a report without a state through."""

    def run(self, request: Request, deadline_s: float | None, done: ClientDone) -> Outcome:
        outcome = super().run(request, deadline_s, done)
        if (request.broadcast.task, request.broadcast.phase) != (1, 1):
            return outcome
        reports = (replace(r, state=None, state_bytes=0) if r.client == 2 else r for r in outcome.reports)
        return replace(outcome, reports=tuple(reports))


def test_who_remembers_nothing_new_keeps_what_it_had(start: Start) -> None:
    port = Silent(remember=1)
    ran = start(phased(experiment("clients.per_round=6"), *TWO_PHASES), port)
    assert ran.error is None
    states = {
        request.broadcast.task: {job.client: job.state for job in request.jobs}
        for request in port.requests
        if request.broadcast.phase == 0
    }
    assert states[1][2] == states[2][2] == f"{2:016x}{0:016x}"
    assert states[2][3] == f"{3:016x}{1:016x}"


DIVERGED, AWAY = Failure(0, "training", "the loss is nan"), Failure(1, "deadline", "no answer")
FEW, DEAD = Failure(2, "samples", "fewer than a batch"), Failure(3, "worker", "its worker died")


NODES = Attendance({}, ())


@pytest.mark.parametrize(
    ("failures", "nodes", "reason", "advice"),
    [
        ((), NODES, "", BRING_BACK),
        ((AWAY,), NODES, " (deadline: no answer)", BRING_BACK),
        ((DIVERGED, AWAY, AWAY), NODES, " (deadline: no answer)", BRING_BACK),
        ((DIVERGED, DIVERGED), NODES, " (training: the loss is nan)", "lower training.lr"),
        ((), None, "", "begin anew with another availability or server.quorum"),
        ((DIVERGED, AWAY, AWAY), None, " (deadline: no answer)", "begin anew with another server.deadline_s or"),
        ((DIVERGED,), None, " (training: the loss is nan)", "lower training.lr"),
        ((FEW,), None, " (samples: fewer than a batch)", "begin anew with another training.batch_size, training.ba"),
        ((DEAD, DIVERGED, DEAD), None, " (worker: its worker died)", "see whether memory runs out"),
    ],
)
def test_too_few_clients_say_why_and_what_to_do(
    failures: tuple[Failure, ...], nodes: Attendance | None, reason: str, advice: str
) -> None:
    """Nodes can be brought back, a simulation is what its scenario says. Only where every failure is a loss that
    diverged is it the method's doing.
    """
    error = too_few(3, Task(0, 0, 2), 0.5, Outcome(None, (), failures, attendance=nodes))
    assert error.what == f"3 rounds in a row without enough clients{reason}"
    assert advice in str(error.next)


def test_a_watcher_cannot_change_what_is_recorded(tmp_path: Path) -> None:
    class Careless(Nobody):
        def recorded(self, line: Any) -> None:
            line.pop("cost")
            line.clear()

    tables = {
        "method": {"name": "fedlwf"},
        "data": {"name": "synthetic", "classes": 4, "samples_per_class": 8, "image_size": 4},
        "stream": {"tasks": 2},
        "partition": {"name": "iid"},
        "clients": {"count": 2, "per_round": 2},
        "model": {"width": 2},
        "training": {"rounds": 1, "epochs": 1},
    }
    run = fedcil.run(tables, output=tmp_path, figures=False, watcher=Careless())
    assert [line["kind"] for line in run.lines] == ["round", "task", "boundary", "round", "task"]
    assert all("cost" in line for line in run.lines)
