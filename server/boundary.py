"""The end of a task that is not the last: the method's own work, then a head that has room for what comes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fedcil.errors import RunFailed
from fedcil.experiment import Experiment
from fedcil.methods.base import Notice, Progress
from fedcil.models.network import grow_head
from fedcil.state import ServerState
from fedcil.stream import Task
from server.method_calls import at_boundary, not_finite


def cross(
    state: ServerState, task: Task, experiment: Experiment, progress: Progress
) -> tuple[ServerState, dict[str, Any]]:
    """The state for the next task, and what the record says of the boundary.

    Sees model and memory, never data. The method works on the head as it is; it grows afterwards, on the
    server, so that all clients of the next task start from the same new rows. RunFailed if what was made is not finite.
    """
    made = at_boundary(experiment, state, task, progress)
    refuse_diverged(made.state, state, task)
    after = experiment.stream.tasks[task.index + 1]
    key = experiment.key.at("boundary", task.index, "head")
    model = grow_head(made.state.model, after.seen, key.torch())
    names = [experiment.data.class_names[place] for place in experiment.stream.order]
    line = {
        "kind": "boundary",
        "task": task.index,
        "classes": list(experiment.stream.order[: task.seen]),
        "warnings": [in_words(notice, names) for notice in made.warnings],
    }
    refuse_unrecordable(made.log, line)
    line |= made.log
    return replace(made.state, model=model), line


def in_words(notice: Notice, names: list[str]) -> str:
    """With the data set's names of the classes, whatever the order in which they came."""
    classes = "classes " + ", ".join(repr(names[label]) for label in notice.labels)
    return notice.text.replace("{classes}", classes)


def refuse_unrecordable(log: Mapping[str, Any], line: Mapping[str, Any]) -> None:
    """RunFailed for a method's log that takes a key of the record's, or is no JSON."""
    problem = f"has {sorted(taken)} of the record" if (taken := log.keys() & {*line, "cost"}) else ""
    try:
        json.dumps(dict(log), allow_nan=False)
    except (TypeError, ValueError) as error:
        problem = f"cannot be recorded: {error}"
    if problem:
        raise RunFailed(
            f"the log of the method's boundary {problem}",
            where="method",
            allowed="finite numbers, text, lists and tables of these, under keys of its own",
            next="mend the method's boundary and `fedcil resume RUN`",
        )


def refuse_diverged(state: ServerState, before: ServerState, task: Task) -> None:
    """RunFailed for tensors that are not finite."""
    broken = not_finite(state, before)
    if broken:
        raise RunFailed(
            f"the boundary after task {task.index + 1} diverged: {', '.join(broken[:3])} are not finite",
            where="method",
            next="lower the rate of what the method trains there (mfcl: method.generator_lr) or its loss weights and "
            "start a new run; a resume would only repeat it",
        )
