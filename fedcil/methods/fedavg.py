"""FedAvg (McMahan et al., arXiv 1602.05629): local SGD, weighted mean. The floor: it forgets old classes."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from fedcil.losses import cross_entropy_new
from fedcil.methods.base import Batch, Draws, Method, Prepared
from fedcil.methods.settings import MethodSettings
from fedcil.models.network import Network


class FedAvg(MethodSettings):
    name: Literal["fedavg"] = "fedavg"
    loss_slice: Literal["all", "new"] = Field(
        "all", description="cross-entropy over all classes seen, or new ones alone"
    )

    def build(self) -> Method:
        if self.loss_slice == "all":
            return Method()
        return Method(loss=new_classes_only, takes_old_labels=False)


def new_classes_only(model: Network, prepared: Prepared, batch: Batch, draws: Draws) -> Tensor:
    task = batch.task
    return cross_entropy_new(model(batch.images), batch.labels, task.old, task.seen)
