"""FedAvg: cross-entropy over all or new classes, and the mean of what clients give."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from fedcil.fold import Fold
from fedcil.keys import Key
from fedcil.methods.base import Batch, Phase
from fedcil.methods.fedavg import FedAvg
from fedcil.models.network import state_of
from fedcil.state import ServerState
from fedcil.stream import Task
from fedcil.tensors import Contribution, content_hash

TASK = Task(1, 2, 4)
TRAIN = Phase(name="train", rounds=1)


def loss_of(small: Any, loss_slice: str) -> float:
    """Pixels are logits: ln(1, 9, 3, 1) of class 2 and ln(5, 5, 1, 1) of class 3."""
    network = small.linear(torch.eye(4))
    images = torch.tensor([[1.0, 9, 3, 1], [5, 5, 1, 1]]).log()[:, :, None, None]
    batch = Batch(images, torch.tensor([2, 3]), TASK, ())
    return FedAvg(loss_slice=loss_slice).build().loss(network, None, batch, None).item()  # type: ignore[arg-type]


def test_cross_entropy_over_all_classes_seen(small: Any) -> None:
    """Probabilities 3/14 and 1/12."""
    assert loss_of(small, "all") == pytest.approx((math.log(14 / 3) + math.log(12)) / 2)


def test_cross_entropy_over_new_classes_alone(small: Any) -> None:
    """Probabilities 3/4 and 1/2."""
    assert loss_of(small, "new") == pytest.approx((math.log(4 / 3) + math.log(2)) / 2)


def test_in_the_first_task_both_slices_are_the_same(small: Any) -> None:
    batch = Batch(small.images(6), small.labels(6, small.first), small.first, ())
    network = small.frozen(3)
    values = {FedAvg(loss_slice=part).build().loss(network, None, batch, None).item() for part in ("all", "new")}  # type: ignore[arg-type]
    assert values == {F.cross_entropy(network(batch.images), batch.labels).item()}


def reduced(small: Any, given: dict[int, tuple[Any, float]], leaves: int) -> ServerState:
    fold = Fold.empty(leaves)
    for position, (network, weight) in given.items():
        fold.add(position, Contribution(state_of(network), weight))
    state = ServerState(model=state_of(small.network(3, seed=9)), memory={"kept": torch.ones(1)})
    return FedAvg().build().reduce(state, TRAIN, fold.total())


def test_clients_that_agree_change_nothing(small: Any) -> None:
    """n x / n, and sums of powers of two are exact."""
    network = small.network(3)
    after = reduced(small, dict.fromkeys(range(4), (network, 2.0)), 4)
    assert content_hash(after.model) == content_hash(state_of(network))


def test_the_mean_is_weighted_and_has_running_statistics_in_it(small: Any) -> None:
    one, two = small.network(3, seed=1), small.network(3, seed=2)
    after = reduced(small, {0: (one, 1.0), 2: (two, 3.0)}, 3)
    assert after.memory == {"kept": torch.ones(1)}
    a, b = state_of(one), state_of(two)
    assert any(name.endswith("running_var") for name in after.model)
    assert after.model.keys() == a.keys()
    for name, tensor in after.model.items():
        torch.testing.assert_close(tensor, 0.25 * a[name] + 0.75 * b[name])


def test_a_round_that_nobody_answers_keeps_the_model(small: Any) -> None:
    state = ServerState(model=state_of(small.network(3)))
    assert FedAvg().build().reduce(state, TRAIN, Fold.empty(3).total()) is state


def test_defaults_are_fedavgs(small: Any) -> None:
    """One phase of all rounds, this task's data, one update of the running statistics, nothing at a boundary."""
    method = FedAvg().build()
    (phase,) = method.phases(TASK, 7)
    assert (phase.rounds, phase.who, phase.work) == (7, "sampled", "train")
    assert (method.data, method.client_memory, method.norm_updates(TASK)) == ("task", None, 1)
    state = ServerState(model=state_of(small.network(3)))
    made = method.boundary(state, TASK, Key(0), small.compute(), lambda *_: None)
    assert made.state is state
    assert (made.log, made.warnings) == ({}, ())
    network, images = small.frozen(3), small.images(2)
    assert torch.equal(method.predict(network, {}, images), network(images))
