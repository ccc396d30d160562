"""Where clients are trained: what a process has once, and what each of its threads has."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import Any

import torch

from client.lanes import Lane, make_streams
from client.local_model import LocalModel
from client.states import StateStore
from fedcil.data.store import StoredSplit
from fedcil.experiment import Experiment
from fedcil.messages import Broadcast, Job
from fedcil.methods.base import Prepared, Samples
from fedcil.stream import Task
from fedcil.tensors import Tensors, moved


class Shared:
    """What the workers of one process share: the training images, and what a task's payload was made into."""

    def __init__(self, experiment: Experiment, states: StateStore) -> None:
        self.experiment = experiment
        self.states = states
        self.device = device = experiment.compute.device
        data = experiment.data
        self.stored = StoredSplit(data, data.train, experiment.stream.relabel(data.train.labels), device)
        self._lock = threading.Lock()
        self._prepared: tuple[tuple[int, str | None], Prepared] | None = None

    def prepared(self, broadcast: Broadcast, task: Task) -> Prepared:
        """The method's prepared objects, made once per task and process."""
        payload = broadcast.payload
        name = (task.index, payload.hash if payload else None)
        with self._lock:
            if self._prepared is None or self._prepared[0] != name:
                self._prepared = None  # let go of the last task's before this one's are made
                experiment = self.experiment
                key = experiment.key.at("prepare", task.index)
                made = experiment.method.prepare(experiment.compute, task, payload, key)
                self._prepared = (name, made)
            return self._prepared[1]

    def samples(self, client: int, task: Task) -> Samples:
        """A client's own stored samples of this task."""
        index = torch.from_numpy(self.experiment.indices(client, task)).to(self.device)
        return Samples(self.stored.images(index), self.stored.labels.index_select(0, index))

    def kept(self, job: Job) -> Tensors | None:
        """What the client kept, on the device; None if it keeps nothing yet."""
        if job.state is None:
            return None
        return moved(self.states.load(job.state), self.device)


class Worker:
    """One thread's place to train: its own networks, reused from client to client."""

    def __init__(self, shared: Shared, check: Callable[[], None] = lambda: None) -> None:
        self.shared, self.check = shared, check
        self.local: LocalModel | None = None
        self.lanes: list[Lane] = []
        self.streams: list[Any] = []  # of the lanes of all tasks: libraries keep memory for each
        self.no_lanes = -1  # the task in which they cannot be had: not tried again until the next

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of those of its networks, in their order: the same in all of them."""
        return (self.local or self.lanes[0].local).parameters

    def begin(self, classes: int, tensors: Tensors) -> LocalModel:
        """A model with the broadcast tensors in it; made anew only when the head has grown."""
        if self.local is None or self.local.network.head.out_features != classes:
            self.local = LocalModel(self.shared.experiment.compute.network(classes))
        self.local.begin(tensors)
        return self.local

    def lanes_for(self, classes: int) -> list[Lane]:
        """As many as the scenario has; made anew only when the head has grown."""
        if not self.lanes or self.lanes[0].local.network.head.out_features != classes:
            self.drop_lanes()  # before new ones take memory
            experiment = self.shared.experiment
            training, count = experiment.scenario.training, experiment.execution.lanes
            self.streams = self.streams or make_streams(count, self.shared.device)
            self.lanes = [Lane(experiment.compute.network(classes), training, stream) for stream in self.streams]
        return self.lanes

    def drop_lanes(self) -> None:
        """At once: a lane whose steps could not be captured is part of a circle."""
        if self.lanes:
            self.lanes = []
            gc.collect()
