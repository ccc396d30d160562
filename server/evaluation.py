"""Accuracy of the global model on every task seen so far, from one pass over the test images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedcil.data.augment import make_batch
from fedcil.experiment import Experiment
from fedcil.state import ServerState
from fedcil.stream import Task

BATCH = 256


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Per task seen so far. ``confusion[i][j]``: share of task i's images put into a class of task j."""

    accuracy: list[float]
    task_aware: list[float]
    confusion: list[list[float]]
    test_images: list[int]


class Evaluator:
    """Holds the test images of the stream, on the device, once."""

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        device = experiment.compute.device
        data = experiment.data
        labels = torch.from_numpy(experiment.stream.relabel(data.test.labels))
        self.images = torch.from_numpy(data.test.images).to(device)
        self.labels = labels.to(device)
        self.mean = torch.tensor(data.mean, device=device)
        self.std = torch.tensor(data.std, device=device)

    @torch.no_grad()
    def evaluate(self, state: ServerState, task: Task) -> Evaluation:
        """Scores over all classes seen so far; task-aware: the best among the image's own task's classes."""
        experiment = self.experiment
        network = experiment.compute.frozen(state.model)
        tasks = experiment.stream.tasks[: task.index + 1]
        task_of = torch.tensor([t.index for t in tasks for _ in t.classes], device=self.labels.device)
        rows = ((self.labels >= 0) & (self.labels < task.seen)).nonzero()[:, 0]
        confusion = torch.zeros(len(tasks), len(tasks), dtype=torch.int64)
        right = torch.zeros(2, len(tasks), dtype=torch.int64)
        for index in rows.split(BATCH):
            images = make_batch(self.images, index, "none", torch.Generator(), self.mean, self.std)
            scores = experiment.method.predict(network, state.memory, images)
            labels = self.labels[index]
            own = task_of[labels]
            guess = scores.argmax(1)
            aware = scores.masked_fill(task_of[None, :] != own[:, None], -torch.inf).argmax(1)
            for place, hits in enumerate((guess == labels, aware == labels)):
                right[place] += torch.bincount(own[hits], minlength=len(tasks)).cpu()
            pairs = own * len(tasks) + task_of[guess]
            confusion += torch.bincount(pairs, minlength=confusion.numel()).view_as(confusion).cpu()
        counts = confusion.sum(1)
        return Evaluation(
            accuracy=_shares(right[0], counts),
            task_aware=_shares(right[1], counts),
            confusion=[_shares(row, counts[t]) for t, row in enumerate(confusion)],
            test_images=counts.tolist(),
        )


def _shares(part: Tensor, whole: Tensor) -> list[float]:
    """Fractions; 0 where a task has no test images."""
    return (part.double() / whole.clamp(min=1).double()).tolist()
