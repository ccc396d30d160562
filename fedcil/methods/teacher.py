"""A frozen teacher for distillation: the global model at the end of the last task."""

from __future__ import annotations

from dataclasses import replace

from fedcil.compute import Compute
from fedcil.keys import Key
from fedcil.messages import Payload
from fedcil.methods.base import Boundary, Progress, part, prefixed
from fedcil.models.network import Network
from fedcil.state import ServerState
from fedcil.stream import Task


def teacher_from(compute: Compute, task: Task, payload: Payload | None, key: Key) -> Network | None:
    """None in the first task, where there is nothing to keep yet."""
    return None if payload is None else compute.teacher(part("teacher", payload.tensors))


def teacher_becomes_payload(state: ServerState, task: Task, key: Key, compute: Compute, progress: Progress) -> Boundary:
    """The model as it is now, before its head grows, is what later clients distil from."""
    return Boundary(replace(state, payload=Payload.of(prefixed("teacher", state.model))))
