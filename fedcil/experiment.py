"""A scenario opened on data: everything that follows from it before the first round, the same in every process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fedcil.compute import (
    Compute,
    apply_precision,
    numeric_configuration,
    resolve_device,
    resolve_precision,
    resolve_stack,
)
from fedcil.data import Dataset, load_dataset
from fedcil.errors import ScenarioError
from fedcil.keys import Key
from fedcil.messages import Tensors
from fedcil.methods.base import Method, Samples
from fedcil.models import make_architecture
from fedcil.models.network import initialise, snapshot
from fedcil.partition import TaskPartition, make_partition
from fedcil.scenario import Scenario
from fedcil.state import RunState, ServerState
from fedcil.stream import Stream, Task, make_stream


@dataclass(frozen=True, slots=True)
class Experiment:
    """The frozen values that server and clients share. A client is its id and its offsets in an index array."""

    scenario: Scenario
    key: Key
    data: Dataset
    stream: Stream
    partition: Sequence[TaskPartition]
    method: Method
    compute: Compute

    def tasks_of_data(self, task: Task) -> range:
        """The tasks whose samples a client has in this task."""
        return range(task.index + 1) if self.method.data == "so_far" else range(task.index, task.index + 1)

    def counts(self, task: Task) -> NDArray[np.int64]:
        """Samples of each client in this task, (clients,)."""
        counts = [self.partition[t].counts() for t in self.tasks_of_data(task)]
        total: NDArray[np.int64] = np.stack(counts).sum(axis=0)
        return total

    def label_counts(self) -> NDArray[np.int32]:
        """Training samples by task, client and label: (tasks, clients, classes)."""
        labels = self.stream.relabel(self.data.train.labels)
        shape = (self.scenario.clients.count, len(self.stream.order))
        tables = np.zeros((len(self.partition), *shape), dtype=np.int32)
        for table, part in zip(tables, self.partition, strict=True):
            owners = np.repeat(np.arange(shape[0]), part.counts())
            np.add.at(table, (owners, labels[part.indices]), 1)
        return tables

    def indices(self, client: int, task: Task) -> NDArray[np.int64]:
        """Where a client's samples of this task stand in the training set."""
        parts = [self.partition[t].of(client) for t in self.tasks_of_data(task)]
        return np.concatenate(parts).astype(np.int64)

    def statistics(self, task: Task) -> Tensors:
        """What a client sends in a phase of work ``fit``, as it would be for no samples: names, shapes and types."""
        network = self.compute.network(task.seen)
        nothing = Samples(torch.zeros(0, 1, 1, 1, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64))
        return self.method.fit(network, nothing, task, lambda images: images).tensors

    def first_state(self) -> RunState:
        """Before round 0: a model with a head for the first task, drawn on the CPU whatever the device."""
        network = self.compute.architecture.build(self.stream.tasks[0].seen)
        initialise(network, self.key.at("model").torch())
        model = {name: tensor.to(self.compute.device) for name, tensor in snapshot(network).items()}
        return RunState(server=ServerState(model=model))

    def numeric(self) -> dict[str, str | int]:
        """The numeric configuration (fedcil/compute.py)."""
        scenario = self.scenario
        return numeric_configuration(self.compute, scenario.training.threads, scenario.server.threads, self.stack)

    @property
    def stack(self) -> int:
        """How many clients a worker trains as one model."""
        return resolve_stack(self.scenario.engine.stack, self.compute.device)


def open_experiment(scenario: Scenario, data_root: Path | None = None, *, show_progress: bool = False) -> Experiment:
    """Load the data and derive stream, partition and method. Raises ScenarioError or DataMissing."""
    key = Key(scenario.seed)
    device = resolve_device(scenario.device)
    precision = resolve_precision(scenario.training.precision, device)
    apply_precision(precision)
    data = load_dataset(scenario.data, scenario.seed, root=data_root, show_progress=show_progress)
    stream = make_stream(scenario.stream, len(data.class_names), key)
    refuse_untested_tasks(stream, data)
    labels = stream.relabel(data.train.labels)
    height, width, channels = data.train.images.shape[1:]
    architecture = make_architecture(scenario.model, (channels, height, width))
    scenario.method.check_image(architecture.image)
    return Experiment(
        scenario=scenario,
        key=key,
        data=data,
        stream=stream,
        partition=make_partition(scenario.partition, scenario.clients.count, stream, labels, key),
        method=scenario.method.build(),
        compute=Compute(architecture, device, precision),
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
