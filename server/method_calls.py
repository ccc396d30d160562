"""The functions of a method that the server calls: what they raise, or give and must not, ends the run before anything
of it is saved, so that a mended method can go on from the last checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from fedcil.errors import FedcilError, RunFailed, asked_to_end, described
from fedcil.experiment import Experiment
from fedcil.messages import Payload
from fedcil.methods import METHODS
from fedcil.methods.base import Boundary, Notice, Phase, Progress, replace_model, returned
from fedcil.state import ServerState
from fedcil.stream import Task
from fedcil.tensors import Tensors, Total, content_hash


@contextmanager
def calling(function: str, experiment: Experiment) -> Iterator[None]:
    """What a person's own function raises, or exits with, is told as theirs; a shipped one's is a bug of ours."""
    try:
        yield
    except FedcilError:
        raise
    except (Exception, SystemExit) as error:
        if experiment.scenario.method.name in METHODS or asked_to_end(error):
            raise
        raise failed(function, f"raised {described(error)}") from error


def reduced(experiment: Experiment, state: ServerState, phase: Phase, total: Total | None) -> ServerState:
    """The state after a round. RunFailed for one that is not of the same form, or not finite. A mean of models needs no
    look: each of them had one.
    """
    default = experiment.method.reduce is replace_model
    with calling("reduce", experiment):
        made = returned(experiment.method.reduce(state, phase, total), ServerState, "reduce")
        if not (default and phase.sends_model) and (problem := _problem(made, state)):
            hint = " (a phase without local training needs a reduce of its own)" if default else ""
            raise failed("reduce", f"gave {problem}{hint}")
    return made


def at_boundary(experiment: Experiment, state: ServerState, task: Task, progress: Progress) -> Boundary:
    """What the end of a task made. RunFailed for a state that is not of the same form."""
    key = experiment.key.at("boundary", task.index)
    with calling("boundary", experiment):
        made = returned(
            experiment.method.boundary(state, task, key, experiment.compute, progress), Boundary, "boundary"
        )
        problem = _form(returned(made.state, ServerState, "boundary"), state)
        if problem := problem or _unsayable(made, task):
            raise failed("boundary", f"gave {problem}")
    return made


def failed(function: str, what: str) -> RunFailed:
    """The error for a method's ``function`` that did not keep to its contract."""
    return RunFailed(
        f"the method's {function} {what}",
        where="method",
        allowed="what docs/extending.md says of it",
        next="mend it, then `fedcil resume RUN`",
    )


def _problem(after: ServerState, before: ServerState) -> str:
    """Why the server cannot go on with it; empty if it can."""
    return _form(after, before) or next((f"{name} that is not finite" for name in not_finite(after, before)), "")


def _form(after: ServerState, before: ServerState) -> str:
    if problem := _other_model(after.model, before.model):
        return problem
    if after.payload is not None and not isinstance(after.payload, Payload):
        return f"a payload that is a {type(after.payload).__name__}, not a fedcil.messages.Payload"
    new = after.payload if after.payload is not before.payload else None
    for where, tensors in (("memory", after.memory), ("the payload", after.payload and after.payload.tensors)):
        if tensors is not None and not _named_tensors(tensors):
            return f"{where} that is not tensors by name"
    if new and new.hash != content_hash(new.tensors):  # clients would go on with another one
        return "a payload under a name of its own: make it by fedcil.messages.Payload.of(tensors)"
    return ""


def _unsayable(made: Boundary, task: Task) -> str:
    """What is wrong with the words of a boundary; empty if nothing is."""
    if not isinstance(made.log, Mapping):
        return f"a log that is a {type(made.log).__name__}, not a mapping"
    if not (isinstance(made.warnings, tuple) and all(isinstance(each, Notice) for each in made.warnings)):
        return "warnings that are no tuple of fedcil.methods.base.Notice"
    for notice in made.warnings:
        if not isinstance(notice.text, str) or not set(notice.labels) <= set(range(task.seen)):
            return f"{notice!r:.100}, not a text with labels of 0 to {task.seen - 1}"
    return ""


def _named_tensors(tensors: object) -> bool:
    return isinstance(tensors, Mapping) and all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in tensors.items()
    )


def _other_model(model: object, before: Tensors) -> str:
    if not isinstance(model, Mapping):
        return f"a model that is a {type(model).__name__}, not tensors by name"
    if model.keys() != before.keys():
        lacking, more = sorted(before.keys() - model.keys()), sorted(map(str, model.keys() - before.keys()))
        return f"a model without {lacking[:3]}" if lacking else f"a model with {more[:3]}, which it does not have"
    for name, old in before.items():
        new = model[name]
        if not isinstance(new, Tensor):
            return f"{name} as a {type(new).__name__}, not as a tensor"
        if new.shape != old.shape or new.dtype != old.dtype:
            return f"{name} as {new.dtype} {tuple(new.shape)}, not {old.dtype} {tuple(old.shape)}"
    return ""


def not_finite(after: ServerState, before: ServerState) -> list[str]:
    """Names of tensors with NaN or infinity, among those that are not the same as before. A norm of numbers is a number
    (unless their squares are too large), and is found in a tenth of the time; waits once for a device.
    """
    groups = [(after.model, before.model), (after.memory, before.memory)]
    if after.payload is not None and after.payload is not before.payload:
        groups.append((after.payload.tensors, {}))
    new = [(name, each) for now, old in groups for name, each in now.items() if each is not old.get(name)]
    new = [(name, each) for name, each in new if each.is_floating_point()]
    if not new:
        return []
    well = torch.stack(torch._foreach_norm([each for _, each in new])).isfinite().tolist()
    doubtful = [pair for pair, is_well in zip(new, well, strict=True) if not is_well]
    return [name for name, each in doubtful if not each.isfinite().all()]
