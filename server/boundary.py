"""The end of a task that is not the last: the method's own work, then a head that has room for what comes."""

from __future__ import annotations

from dataclasses import replace

from fedcil.experiment import Experiment
from fedcil.methods.base import Boundary, Progress
from fedcil.models.network import grow_head
from fedcil.state import ServerState
from fedcil.stream import Task


def cross(state: ServerState, task: Task, experiment: Experiment, progress: Progress) -> Boundary:
    """Sees model and memory, never data. The method works on the head as it is; it grows afterwards, on the
    server, so that all clients of the next task start from the same new rows.
    """
    key = experiment.key.at("boundary", task.index)
    made = experiment.method.boundary(state, task, key, experiment.compute, progress)
    after = experiment.stream.tasks[task.index + 1]
    model = grow_head(made.state.model, after.seen, key.at("head").torch())
    return replace(made, state=replace(made.state, model=model))
