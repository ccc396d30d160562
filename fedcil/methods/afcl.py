"""AFCL: analytic federated continual learning (arXiv 2505.12245; AFL, 2405.16240): closed form, no forgetting of sums.

The backbone is frozen; one round per task. With features F (n, d) and one-hot labels Y of a client,
G = sum F^T F and Q = sum F^T Y over all clients and tasks so far, and the head is W = (G + gamma I)^-1 Q: the ridge
solution on all data ever seen, for any partition, order, or number of clients and tasks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from fedcil.keys import Key
from fedcil.methods.base import Method, Phase, Samples, predict_with_head, replace_model
from fedcil.methods.settings import MethodSettings
from fedcil.models.network import Network
from fedcil.section import Above0
from fedcil.state import ServerState
from fedcil.stream import Task
from fedcil.tensors import Contribution, Tensors, Total

BATCH = 512


class AFCL(MethodSettings):
    name: Literal["afcl"] = "afcl"
    backbone: Literal["random", "task1"] = Field(
        "random", description="task1: trained by FedAvg on the first task, then frozen"
    )
    expansion: Annotated[int, Field(ge=0, le=10**6)] = Field(
        1024, description="width of the fixed random layer relu(f P) on top of the features; 0: none"
    )
    gamma: Above0 = Field(1.0, description="ridge strength, added once on the server")

    def build(self) -> Method:
        return Method(
            takes_old_labels=False,  # what is in the sums already must not be counted twice
            phases=self._phases,
            fit=self._fit,
            reduce=self._reduce,
            predict=self._predict,
        )

    def _phases(self, task: Task, rounds: int) -> tuple[Phase, ...]:
        statistics = Phase(name="statistics", rounds=1, who="all", work="fit")
        if self.backbone == "task1" and task.old == 0:
            return (Phase(name="train", rounds=rounds), statistics)
        return (statistics,)

    def _features(self, network: Network, images: Tensor) -> Tensor:
        """(n, c, h, w) -> float64 (n, d + 1): features, expanded if asked for, and a 1 for the bias."""
        features = network.features(images).double()
        if self.expansion:
            features = F.relu(features @ projection(features.shape[1], self.expansion, features.device))
        return F.pad(features, (0, 1), value=1.0)

    def _fit(self, network: Network, samples: Samples, task: Task, images: Callable[[Tensor], Tensor]) -> Contribution:
        """Upper triangle of G, and Q (d + 1, seen): float64, since float32 sums lose definiteness."""
        width = (self.expansion or network.backbone.width) + 1
        gram = torch.zeros(width, width, dtype=torch.float64, device=samples.labels.device)
        cross = gram.new_zeros(width, task.seen)
        for start in range(0, len(samples.labels), BATCH):
            stack = slice(start, start + BATCH)
            features = self._features(network, images(samples.images[stack]))
            gram += features.T @ features
            cross += features.T @ F.one_hot(samples.labels[stack], task.seen).to(features)
        return Contribution({"gram": upper(gram), "cross": cross}, weight=1.0)

    def _reduce(self, state: ServerState, phase: Phase, total: Total | None) -> ServerState:
        if phase.sends_model or total is None:
            return replace_model(state, phase, total)
        gram, cross = total.tensors["gram"], total.tensors["cross"]
        if state.memory:
            gram = state.memory["gram"] + gram
            past = state.memory["cross"]  # a class not seen before had label 0 in all past samples
            cross = F.pad(past, (0, cross.shape[1] - past.shape[1])) + cross
        memory = {"gram": gram, "cross": cross, "weight": self._solve(gram, cross)}
        return replace(state, memory=memory)

    def _solve(self, gram: Tensor, cross: Tensor) -> Tensor:
        """W (d + 1, classes) by Cholesky; a matrix that is not definite gets a little more on its diagonal."""
        full = symmetric(gram, len(cross))
        identity = torch.eye(len(full)).to(full)
        factor, failed = torch.linalg.cholesky_ex(full + self.gamma * identity)
        if failed:
            factor = torch.linalg.cholesky(full + (self.gamma + 1e-8 * full.trace() / len(full)) * identity)
        return torch.cholesky_solve(cross, factor)

    def _predict(self, network: Network, memory: Tensors, images: Tensor) -> Tensor:
        """Scores (n, classes seen): minus infinity for classes of which no statistics came in."""
        if "weight" not in memory:
            return predict_with_head(network, memory, images)
        scores = self._features(network, images) @ memory["weight"]
        counts = memory["cross"][-1]  # the row of the constant feature
        scores = scores.masked_fill(counts == 0, -torch.inf)
        return F.pad(scores, (0, network.head.out_features - scores.shape[1]), value=-torch.inf)


@lru_cache(maxsize=2)
def projection(inputs: int, outputs: int, device: torch.device) -> Tensor:
    """The fixed random layer, the same on every machine: N(0, 1 / inputs), float64 (inputs, outputs); drawn once."""
    generator = Key(0).at("afcl projection", inputs, outputs).torch()
    return (torch.randn(inputs, outputs, generator=generator, dtype=torch.float64) / math.sqrt(inputs)).to(device)


def upper(matrix: Tensor) -> Tensor:
    """Symmetric (d, d) -> its upper triangle (d (d + 1) / 2,)."""
    row, column = torch.triu_indices(len(matrix), len(matrix), device=matrix.device)
    return matrix[row, column]


def symmetric(triangle: Tensor, size: int) -> Tensor:
    """The inverse of ``upper``."""
    row, column = torch.triu_indices(size, size, device=triangle.device)
    matrix = triangle.new_zeros(size, size)
    matrix[row, column] = triangle
    matrix[column, row] = triangle
    return matrix
