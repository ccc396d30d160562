"""A scenario opened on data: everything that follows from it before the first round, the same in every process."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedcil.availability import Availability, make_availability
from fedcil.clock import Devices, make_devices
from fedcil.compute import (
    Compute,
    Execution,
    apply_precision,
    numeric_configuration,
    resolve_device,
    resolve_execution,
    resolve_precision,
)
from fedcil.data import Dataset, load_dataset
from fedcil.dotted import MEND, own_code
from fedcil.errors import ScenarioError, described
from fedcil.keys import Key
from fedcil.messages import Broadcast
from fedcil.methods import METHODS
from fedcil.methods.base import TRAINABLE, Method, Phase, Samples, no_fit, returned
from fedcil.methods.settings import ExtraImages
from fedcil.models import make_architecture
from fedcil.models.network import snapshot
from fedcil.models.own import try_out
from fedcil.partition import TaskPartition, make_partition
from fedcil.population import Population, make_population
from fedcil.rule import PLAIN
from fedcil.scenario import Scenario
from fedcil.state import Cursor, RunState, ServerState
from fedcil.stream import Stream, Task, make_stream
from fedcil.tensors import Contribution, Tensors, moved
from fedcil.timeline import Timeline

PROCESSES_POSSIBLE = sys.platform == "linux"  # memory without a name (fedcil/engines/channel.py)


class Conditions(NamedTuple):
    """Who can be reached when, and how fast clients are."""

    availability: Availability
    devices: Devices | None


@dataclass(frozen=True)
class Experiment:
    """The frozen values that server and clients share. A client is its id and its offsets in an index array."""

    scenario: Scenario
    key: Key
    data: Dataset
    stream: Stream
    population: Population
    partition: Sequence[TaskPartition]
    method: Method
    compute: Compute
    execution: Execution
    frozen: frozenset[str]  # parameters, by name, that nobody trains

    @property
    def timeline(self) -> Timeline:
        return self.population.timeline

    @property
    def notes(self) -> tuple[str, ...]:
        """What a person should know of this scenario, its data and this machine."""
        return (*self.scenario.notes, *self.scenario.stale_code, *self.data.notes, *self.compute.notes)

    def round_number(self, cursor: Cursor) -> int:
        """Of the round that the cursor stands before, counted from the start of the run."""
        return self.timeline.round_number(cursor.task, cursor.phase, cursor.round)

    def round_key(self, place: Cursor | Broadcast) -> Key:
        """The place of a round's draws; ``at("client", c)`` is that of one client's work."""
        return self.key.at("task", place.task, "phase", place.phase, "round", place.round)

    @cached_property
    def conditions(self) -> Conditions:
        """What a server alone has to know; a file is read once. Raises InputError for one that is missing or broken,
        and ScenarioError for a clock that cannot be computed with.
        """
        scenario, clients = self.scenario, self.scenario.clients.count
        there = make_availability(scenario.availability, clients, self.key, self.timeline)
        return Conditions(there, make_devices(scenario.clock, clients, self.key))

    def phases(self, task: Task) -> tuple[Phase, ...]:
        """Of a task, in their order."""
        return tuple(self.method.phases(task, self.scenario.training.rounds))

    def counts(self, task: Task) -> NDArray[np.int64]:
        """Samples of each client in this task, (clients,), whether it is a member now or not."""
        if self.method.data == "so_far":
            total: NDArray[np.int64] = np.sum([self.partition[t].counts() for t in range(task.index + 1)], axis=0)
            return total
        counts = self.partition[task.index].counts()
        if self.method.takes_old_labels and self.population.behind[task.index].any():
            sources = self.population.sources(task.index)
            for earlier in range(task.index):
                counts = np.where(sources == earlier, self.partition[earlier].counts(), counts)
        return counts

    def least_samples(self, phase: Phase) -> int:
        """Of its own, without which a client is not asked. Who keeps old ones may have enough with those."""
        return TRAINABLE if phase.work == "train" and self.method.client_memory is None else 1

    def counts_at(self, task: Task, number: int) -> NDArray[np.int64]:
        """Samples of each member in a round of this task, (clients,); 0 for who is no member then."""
        return np.where(self.population.present(number), self.counts(task), 0)

    def task_counts(self) -> NDArray[np.int64]:
        """Training samples of each client in each task, (clients, tasks)."""
        return np.stack([part.counts() for part in self.partition], axis=1)

    @property
    def label_counts_shape(self) -> tuple[int, int, int]:
        """(tasks, clients, classes)."""
        return len(self.partition), self.scenario.clients.count, len(self.stream.order)

    def label_counts(self) -> NDArray[np.int32]:
        """Training samples by task, client and label: (tasks, clients, classes)."""
        labels = self.stream.relabel(self.data.train.labels)
        tables = np.zeros(self.label_counts_shape, dtype=np.int32)
        for table, part in zip(tables, self.partition, strict=True):
            owners = np.repeat(np.arange(len(table)), part.counts())
            np.add.at(table, (owners, labels[part.indices]), 1)
        return tables

    def indices(self, client: int, task: Task) -> NDArray[np.int64]:
        """Where a client's samples of this task stand in the training set."""
        so_far = self.method.data == "so_far"
        tasks = range(task.index + 1) if so_far else [self.population.source(client, task.index)]
        parts = [self.partition[t].of(client) for t in tasks]
        return np.concatenate(parts).astype(np.int64)

    def sent(self, phase: Phase, task: Task, model: Tensors) -> Tensors:
        """What a client hands in, by names, shapes and types: a model, the statistics of no samples, or nothing."""
        if phase.work == "train":
            return model
        if phase.work == "remember":
            return {}
        network, device = self.compute.network(task.seen).eval(), self.compute.device
        channels, height, width = self.compute.architecture.image
        images = torch.zeros(0, height, width, channels, dtype=torch.uint8, device=device)
        nothing = Samples(images, torch.zeros(0, dtype=torch.int64, device=device))
        try:
            with torch.no_grad():
                given = self.method.fit(network, nothing, task, _as_floats)
        except Exception as error:
            raise ScenarioError(
                f"the method's fit fails for no samples, as it is asked for names and shapes: {described(error)}",
                where="method.name, model.name",
                allowed="a fit, and a backbone, that take images of shape (0, channels, height, width)",
                next="mend them (flatten(1) knows a shape that reshape(len(x), -1) does not)",
            ) from error
        return returned(given, Contribution, "fit").tensors

    def weight(self, samples: int) -> float:
        """Of a model that was trained on so many samples, in its round's mean."""
        return 1.0 if self.scenario.server.weighting == "uniform" else float(samples)

    def pool_bytes(self) -> int:
        """Of the synthetic images that a process makes ahead, in the last task."""
        return int(4 * self.extra_images.kept * math.prod(self.compute.architecture.image))

    @property
    def extra_images(self) -> ExtraImages:
        """The method's, in the last task."""
        return self.scenario.method.extra_images(self.scenario.training.batch_size, self.stream.tasks[-1])

    def first_state(self) -> RunState:
        """Before round 0: a model with a head for the first task, drawn on the CPU whatever the device."""
        network = self.compute.architecture.start(self.stream.tasks[0].seen, self.key.at("model").torch())
        return RunState(server=ServerState(model=moved(snapshot(network), self.compute.device)))

    def numeric(self) -> dict[str, str | int]:
        """The numeric configuration (fedcil/compute.py)."""
        scenario = self.scenario
        return numeric_configuration(self.compute, scenario.training.threads, scenario.server.threads, self.execution)


def _as_floats(images: Tensor) -> Tensor:
    """Stored images (n, h, w, c) uint8 -> (n, c, h, w), as normalised ones are."""
    return images.permute(0, 3, 1, 2).float()


def open_experiment(scenario: Scenario, data_root: Path | None = None, *, show_progress: bool = False) -> Experiment:
    """Load the data and derive stream, partition and method; sets how precisely torch multiplies in this process.
    Raises ScenarioError or DataMissing.
    """
    key = Key(scenario.seed)
    device = resolve_device(scenario.device)
    precision = resolve_precision(scenario.training.precision, device)
    apply_precision(precision)
    data = load_dataset(scenario.data, scenario.seed, root=data_root, show_progress=show_progress)
    stream = make_stream(scenario.stream, len(data.class_names), key)
    refuse_untested_tasks(stream, data)
    labels = stream.relabel(data.train.labels)
    height, width, channels = data.train.stored.shape[1:]
    architecture = make_architecture(scenario.model, (channels, height, width), key.at("backbone"))
    manners = try_out(architecture, scenario.model.name)
    scenario.method.check_model(architecture)
    method = build_method(scenario, stream)
    refuse_idle_rule(scenario, method, stream)
    alone = scenario.engine.name == "flower" or scenario.server.deadline_s is not None
    execution = resolve_execution(scenario.engine.lanes, device, manners.draws, alone)
    refuse_processes(scenario)
    clients, timeline = scenario.clients.count, make_timeline(method, stream, scenario.training.rounds)
    population = make_population(scenario.population, clients, timeline, key)
    return Experiment(
        scenario=scenario,
        key=key,
        data=data,
        stream=stream,
        population=population,
        partition=make_partition(scenario.partition, clients, stream, labels, key, population.sharing),
        method=method,
        compute=Compute(architecture, device, precision),
        execution=execution,
        frozen=manners.frozen,
    )


def build_method(scenario: Scenario, stream: Stream) -> Method:
    """ScenarioError if a person's own settings class builds none, or one without phases."""
    name = scenario.method.name
    with nullcontext() if name in METHODS else own_code(repr(name), "method.name"):
        method = scenario.method.build()
        if not isinstance(method, Method):
            problem = f"build() gave {type(method).__name__}, not a fedcil.methods.base.Method"
        else:
            problem = wrong_phases(method, stream, scenario.training.rounds)
    if problem:
        raise ScenarioError(f"{name!r}: {problem}", where="method.name", next=MEND)
    return method


def wrong_phases(method: Method, stream: Stream, rounds: int) -> str:
    """What is wrong with a method's phases, or nothing."""
    for task in stream.tasks:
        phases = method.phases(task, rounds)
        if not isinstance(phases, tuple | list) or not all(isinstance(phase, Phase) for phase in phases):
            return f"phases gave {phases!r:.100}, not a tuple of fedcil.methods.base.Phase"
        if not phases:
            return "phases gave none for a task"
        if odd := [phase.rounds for phase in phases if type(phase.rounds) is not int]:
            return f"phases gave one of {odd[0]!r:.100} rounds, not a whole number"
        updates = method.norm_updates(task)
        if type(updates) is not int or updates < 0:
            return f"norm_updates gave {updates!r:.100}, not a whole number from 0 on"
        lacking = {"remember": ("client_memory", method.client_memory), "fit": ("fit", method.fit)}
        for work, (name, there) in lacking.items():
            if there in (None, no_fit) and any(phase.work == work for phase in phases):
                return f"phases has one of work {work!r}, but there is no {name}"
    return ""


def refuse_processes(scenario: Scenario) -> None:
    """Where they cannot be had."""
    if scenario.engine.processes and scenario.engine.name == "inline" and not PROCESSES_POSSIBLE:
        raise ScenarioError(
            "workers can be processes on Linux only",
            where="engine.processes",
            allowed="false, or nothing",
            next="leave engine.processes out: workers are threads then",
        )


def make_timeline(method: Method, stream: Stream, rounds: int) -> Timeline:
    """The rounds of every phase of every task."""
    return Timeline.of([[phase.rounds for phase in method.phases(task, rounds)] for task in stream.tasks])


def refuse_idle_rule(scenario: Scenario, method: Method, stream: Stream) -> None:
    """Robust folds and limits are for clients that send the model: over statistics they do nothing."""
    phases = [phase for task in stream.tasks for phase in method.phases(task, scenario.training.rounds)]
    if scenario.server.rule != PLAIN and not any(phase.sends_model for phase in phases):
        raise ScenarioError(
            f"no client of {scenario.method.name!r} ever sends the model",
            where="server.fold, server.norm_limit, server.clip_norm",
            allowed="a method with a phase of local training",
            next="leave these keys out, or choose another method",
        )


def refuse_untested_tasks(stream: Stream, data: Dataset) -> None:
    """A task without test images has no accuracy."""
    tested = set(np.unique(stream.relabel(data.test.labels)).tolist())
    for task in stream.tasks:
        if not tested & set(task.classes):
            names = ", ".join(data.class_names[place] for place in stream.order[task.old : task.seen])
            raise ScenarioError(
                f"task {task.index + 1} has no test images (classes {names})",
                where="data",
                allowed="test images of at least one class of every task",
                next="add test images, or leave these classes out",
            )
