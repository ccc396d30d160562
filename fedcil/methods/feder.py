"""FedER: experience replay on the client (iCaRL-style memory, arXiv 1611.07725, inside federated averaging).

At the end of each task every client picks exemplars of its new classes by herding and keeps at most
``memory`` images in all; later it trains on new images and exemplars together, with distillation on the old
classes. A client that joins late has no memory, one that leaves takes its memory along: the opposite of MFCL.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from fedcil.compute import Compute
from fedcil.losses import distillation
from fedcil.methods.base import Batch, ClientMemory, Draws, Method, Phase, Prepared, Samples
from fedcil.methods.settings import MethodSettings
from fedcil.methods.teacher import teacher_becomes_payload, teacher_from
from fedcil.models.network import Network
from fedcil.section import Above0, NonNegative, Positive
from fedcil.stream import Task
from fedcil.tensors import Tensors, count_bytes


class FedER(MethodSettings):
    name: Literal["feder"] = "feder"
    memory: Positive = Field(200, description="images that a client may keep, over all classes")
    kd_weight: NonNegative = Field(1.0, description="factor of the distillation term")
    temperature: Above0 = Field(2.0, description="divides both sets of logits")

    def payload_bytes(self, model: Tensors, compute: Compute) -> int:
        return count_bytes(model)

    def build(self) -> Method:
        return Method(
            phases=train_then_remember,
            prepare=teacher_from,
            loss=self._loss,
            client_memory=ClientMemory(join, self._update),
            boundary=teacher_becomes_payload,
        )

    def _loss(self, model: Network, teacher: Prepared, batch: Batch, draws: Draws) -> Tensor:
        logits = model(batch.images)
        loss = F.cross_entropy(logits, batch.labels)
        if teacher is None or self.kd_weight == 0:
            return loss
        with torch.no_grad():
            past = teacher(batch.images)
        return loss + self.kd_weight * distillation(past, logits[:, : batch.task.old], self.temperature)

    def _update(
        self,
        network: Network,
        own: Samples,
        kept: Tensors | None,
        task: Task,
        images: Callable[[Tensor], Tensor],
    ) -> Tensors:
        """Equal quota for each class the client has seen; old lists are cut, new classes are herded."""
        old = {} if kept is None else _by_class(kept["images"], kept["labels"])
        new = _by_class(own.images, own.labels)
        labels = [*old, *sorted(new.keys() - old.keys())][: self.memory]  # if not one of each fits, the older classes
        quota = self.memory // max(1, len(labels))
        chosen = {label: stack[:quota] for label, stack in old.items() if label in labels}
        for label, stack in new.items():
            if label not in labels:
                continue
            features = F.normalize(network.features(images(stack)), dim=1)
            chosen[label] = stack[herding(features, min(quota, len(stack)))]
        return _as_tensors(chosen, own.images)


def train_then_remember(task: Task, rounds: int) -> tuple[Phase, ...]:
    return (
        Phase(name="train", rounds=rounds),
        Phase(name="remember", rounds=1, who="all", work="remember"),
    )


def join(own: Samples, kept: Tensors | None) -> Samples:
    """New samples followed by the exemplars, without those of classes that the new ones are of: a client that stays
    behind with its samples has them already.
    """
    if kept is None:
        return own
    old = ~torch.isin(kept["labels"], own.labels)
    return Samples(torch.cat([own.images, kept["images"][old]]), torch.cat([own.labels, kept["labels"][old]]))


def herding(features: Tensor, count: int) -> Tensor:
    """Indices (count,) whose running mean stays nearest to the class mean (iCaRL, algorithm 4).

    features (n, d), count <= n. The list for m is a prefix of that for m + 1.
    """
    mean = features.mean(0)
    total = torch.zeros_like(mean)
    free = torch.ones(len(features), dtype=torch.bool, device=features.device)
    picked: list[int] = []
    for size in range(1, count + 1):
        distance = (mean - (total + features) / size).norm(dim=1)
        best = int(distance.masked_fill(~free, float("inf")).argmin())
        free[best] = False
        total = total + features[best]
        picked.append(best)
    return torch.tensor(picked, dtype=torch.int64, device=features.device)


def _by_class(images: Tensor, labels: Tensor) -> dict[int, Tensor]:
    return {int(label): images[labels == label] for label in labels.unique()}


def _as_tensors(chosen: dict[int, Tensor], like: Tensor) -> Tensors:
    labels = [torch.full((len(stack),), label, dtype=torch.int64) for label, stack in chosen.items()]
    return {
        "images": torch.cat([like[:0], *chosen.values()]),
        "labels": torch.cat([torch.zeros(0, dtype=torch.int64), *labels]).to(like.device),
    }
