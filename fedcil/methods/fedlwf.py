"""FedLwF: learning without forgetting (Li and Hoiem, arXiv 1606.09282, section 3) inside federated averaging.

Task 1: cross-entropy. Later: L = CE(new logits) + kd_weight KD_T(old logits of the teacher and the student),
both on the new task's images; the teacher is the global model at the end of the last task.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from fedcil.compute import Compute
from fedcil.losses import cross_entropy_new, distillation
from fedcil.methods.base import Batch, Draws, Method, Prepared
from fedcil.methods.settings import MethodSettings
from fedcil.methods.teacher import teacher_becomes_payload, teacher_from
from fedcil.models.network import Network
from fedcil.section import Above0, NonNegative
from fedcil.tensors import Tensors, count_bytes


class FedLwF(MethodSettings):
    name: Literal["fedlwf"] = "fedlwf"
    kd_weight: NonNegative = Field(1.0, description="factor of the distillation term")
    temperature: Above0 = Field(2.0, description="divides both sets of logits")

    def payload_bytes(self, model: Tensors, compute: Compute) -> int:
        return count_bytes(model)

    def build(self) -> Method:
        return Method(takes_old_labels=False, prepare=teacher_from, loss=self._loss, boundary=teacher_becomes_payload)

    def _loss(self, model: Network, teacher: Prepared, batch: Batch, draws: Draws) -> Tensor:
        old, seen = batch.task.old, batch.task.seen
        logits = model(batch.images)
        new = cross_entropy_new(logits, batch.labels, old, seen)
        if teacher is None or self.kd_weight == 0:
            return new
        with torch.no_grad():
            past = teacher(batch.images)
        return new + self.kd_weight * distillation(past, logits[:, :old], self.temperature)
