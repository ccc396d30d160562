"""What the record says of a round and of the end of a task."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from fedcil.messages import Outcome, Payload
from fedcil.methods.base import Phase
from fedcil.state import RunState
from fedcil.stream import Stream, Task
from fedcil.tensors import Tensors, count_bytes
from server.asking import Answered
from server.evaluation import Evaluation


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
        "failures": [asdict(failure) for failure in outcome.failures],
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


def task_line(task: Task, stream: Stream, evaluation: Evaluation) -> dict[str, Any]:
    """Of the end of a task: how well the model knows each of those seen."""
    return {
        "kind": "task",
        "task": task.index,
        "classes": list(stream.order[task.old : task.seen]),
        **asdict(evaluation),
    }
