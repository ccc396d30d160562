"""Accuracy of the global model on every task seen so far, from one pass over the test images."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fedcil.data.store import StoredSplit
from fedcil.experiment import Experiment
from fedcil.methods.base import predict_with_head, returned
from fedcil.models.network import Network, load_state
from fedcil.state import ServerState
from fedcil.stream import Task
from fedcil.tensors import Tensors
from server.method_calls import calling, failed

BATCH = 256
PATIENCE_S = 2.0  # a shorter evaluation is finished where a run is to stop: without it the round would be lost


@dataclass(frozen=True, slots=True)
class Evaluation:
    """By task, of those seen so far: accuracies as fractions; ``confusion[i][j]``, the share of task i's images put
    into a class of task j; how many test images there are.
    """

    accuracy: list[float]
    task_aware: list[float]
    confusion: list[list[float]]
    test_images: list[int]


@dataclass(frozen=True, slots=True)
class Seen:
    """What all evaluations within a task share: a network, the rows of test images of classes seen so far (n,), and
    which task each of these classes is of (classes,).
    """

    task: Task
    network: Network
    rows: Tensor
    task_of: Tensor


class Evaluator:
    """Holds the test images of the stream, on the device, once; in the scenario's precision, as training."""

    def __init__(self, experiment: Experiment, check: Callable[[], None] = lambda: None) -> None:
        """``check`` may raise between two batches of an evaluation that takes its time, and nothing is changed then."""
        self.experiment, self._check = experiment, check
        data, device = experiment.data, experiment.compute.device
        self.stored = StoredSplit(data, data.test, experiment.stream.relabel(data.test.labels), device)
        self._seen: Seen | None = None

    def _ready_for(self, task: Task, model: Tensors) -> Seen:
        if self._seen is not None and self._seen.task == task:
            load_state(self._seen.network, model)
            return self._seen
        experiment, labels = self.experiment, self.stored.labels
        tasks = experiment.stream.tasks[: task.index + 1]
        self._seen = Seen(
            task=task,
            network=experiment.compute.frozen(model),
            rows=((labels >= 0) & (labels < task.seen)).nonzero()[:, 0],
            task_of=torch.tensor([t.index for t in tasks for _ in t.classes], device=labels.device),
        )
        return self._seen

    @torch.no_grad()
    def evaluate(self, state: ServerState, task: Task) -> Evaluation:
        """Scores over all classes seen so far; task-aware: the best among the image's own task's classes."""
        seen, tasks, started = self._ready_for(task, state.model), task.index + 1, time.monotonic()
        guesses = []
        for rows in seen.rows.split(BATCH):
            if time.monotonic() - started > PATIENCE_S:
                self._check()
            with calling("predict", self.experiment):
                guesses.append(self._guess(state, seen, rows))
        guess, aware = torch.cat(guesses, dim=1)
        if (guess < 0).any():
            raise failed("predict", "gave scores that are not numbers")
        labels = self.stored.labels[seen.rows]
        own = seen.task_of[labels]
        pairs = own * tasks + seen.task_of[guess]
        confusion = torch.bincount(pairs, minlength=tasks * tasks).view(tasks, tasks).cpu()
        right, right_aware = (
            torch.bincount(own[guessed == labels], minlength=tasks).cpu() for guessed in (guess, aware)
        )
        counts = confusion.sum(1)
        return Evaluation(
            accuracy=_shares(right, counts),
            task_aware=_shares(right_aware, counts),
            confusion=[_shares(row, counts[t]) for t, row in enumerate(confusion)],
            test_images=counts.tolist(),
        )

    def _guess(self, state: ServerState, seen: Seen, rows: Tensor) -> Tensor:
        """(2, n): the best of all classes, -1 if an own ``predict`` gives NaN, and the best of those of the image's own
        task. Nothing here waits for the device.
        """
        images = self.stored.normalised(self.stored.images(rows))
        scores = returned(self.experiment.method.predict(seen.network, state.memory, images), Tensor, "predict")
        wanted = (len(images), seen.task.seen)
        if scores.shape != wanted:
            raise failed("predict", f"gave scores of shape {tuple(scores.shape)}, not {wanted}: (images, classes seen)")
        elsewhere = seen.task_of[None, :] != seen.task_of[self.stored.labels[rows]][:, None]
        best = scores.argmax(1)
        if self.experiment.method.predict is not predict_with_head:  # the head of a model that diverged may
            best = best.masked_fill(scores.isnan().any(1), -1)
        return torch.stack([best, scores.masked_fill(elsewhere, -torch.inf).argmax(1)])


def _shares(part: Tensor, whole: Tensor) -> list[float]:
    """Fractions; 0 where a task has no test images."""
    return (part.double() / whole.clamp(min=1).double()).tolist()
