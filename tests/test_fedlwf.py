"""FedLwF: new classes by cross-entropy, old ones by distillation from the last task's global model."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from client.training import Recipe, local_sgd
from fedcil.keys import Key
from fedcil.messages import Payload
from fedcil.methods.base import Batch, Method, Prepared, Samples, prefixed
from fedcil.methods.fedavg import FedAvg
from fedcil.methods.fedlwf import FedLwF
from fedcil.models.network import Network, freeze, grow_head, snapshot, state_of
from fedcil.state import ServerState
from fedcil.stream import Task
from fedcil.tables import TrainingSection
from fedcil.tensors import content_hash


def test_the_loss_by_hand(small: Any) -> None:
    """2 images, 2 old classes and 3 new ones; pixels are the student's logits, T = 2, weight 3.

    New: logits ln(1, 1, 2) and ln(2, 1, 1), labels 4 and 2: ln 2 each. Old, divided by 2: the student gives
    (1/2, 1/2) and (1/4, 3/4). The teacher's head doubles the image's first two pixels, so it gives
    (1/2, 1/2) and (1/10, 9/10): cross-entropies ln 2 and (ln 4 + 9 ln(4/3)) / 10.
    """
    pixels = torch.tensor([[1.0, 1, 1, 1, 2], [1, 9, 2, 1, 1]]).log()
    teacher = small.linear(2 * torch.eye(2, 5))
    freeze(teacher)
    batch = Batch(pixels[:, :, None, None], torch.tensor([4, 2]), Task(1, 2, 5), ())
    loss = FedLwF(kd_weight=3.0, temperature=2.0).build().loss(small.linear(torch.eye(5)), teacher, batch, None)
    old = (math.log(2) + (math.log(4) + 9 * math.log(4 / 3)) / 10) / 2
    assert loss.item() == pytest.approx(math.log(2) + 3 * old, rel=1e-6)


def batch_of(small: Any) -> Batch:
    return Batch(small.images(6), small.labels(6, small.second), small.second, ())


@pytest.mark.usefixtures("float64")
def test_a_student_that_is_the_teacher_feels_no_distillation(small: Any) -> None:
    """With the head grown, both in eval mode: the gradient is that of the new classes alone."""
    teacher = small.frozen(3)
    gradients = []
    for weight in (0.0, 4.0):
        student = small.compute().network(5)
        tensors = grow_head(state_of(teacher), 5, Key(0).torch())
        for name, tensor in state_of(student).items():
            tensor.copy_(tensors[name])
        student.eval()
        FedLwF(kd_weight=weight).build().loss(student, teacher, batch_of(small), None).backward()
        gradients.append([p.grad for p in student.parameters()])
    for without, with_ in zip(*gradients, strict=True):
        torch.testing.assert_close(with_, without, rtol=0, atol=1e-14)


def trained(small: Any, method: Method, prepared: Prepared, task: Task) -> Network:
    model: Network = small.network(task.seen)
    training = TrainingSection(epochs=2, batch_size=4)
    recipe = Recipe(method, prepared, task, training, 0.1, lambda stored, index, generator: stored[index])
    local_sgd(model, recipe, Samples(small.images(10), small.labels(10, task)), Key(0))
    return model


def test_without_distillation_it_is_fedavg_on_the_new_slice(small: Any) -> None:
    one = trained(small, FedLwF(kd_weight=0.0).build(), small.frozen(3), small.second)
    other = trained(small, FedAvg(loss_slice="new").build(), None, small.second)
    assert content_hash(state_of(one)) == content_hash(state_of(other))


def test_in_the_first_task_it_is_fedavg(small: Any) -> None:
    method = FedLwF().build()
    assert method.prepare(small.compute(), small.first, None, Key(0)) is None
    one = trained(small, method, None, small.first)
    other = trained(small, FedAvg().build(), None, small.first)
    assert content_hash(state_of(one)) == content_hash(state_of(other))


def test_the_teacher_does_not_move(small: Any) -> None:
    """Neither its parameters nor its running statistics, and it is given no gradient."""
    teacher = small.frozen(3)
    before = content_hash(state_of(teacher))
    trained(small, FedLwF().build(), teacher, small.second)
    assert content_hash(state_of(teacher)) == before
    assert all(p.grad is None for p in teacher.parameters())


def test_the_teacher_is_the_model_at_the_end_of_the_task(small: Any) -> None:
    """The same on all clients, by its hash; later changes of the model do not reach it."""
    method, model = FedLwF().build(), snapshot(small.network(3))
    made = method.boundary(ServerState(model=model), small.first, Key(0), small.compute(), lambda *_: None)
    payload = made.state.payload
    assert isinstance(payload, Payload)
    assert payload.hash == content_hash(prefixed("teacher", model))
    teacher = method.prepare(small.compute(), small.second, payload, Key(1))
    images = small.images(6)
    torch.testing.assert_close(teacher(images), small.network(3).eval()(images), rtol=1e-4, atol=1e-5)
    assert not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())


@pytest.mark.parametrize("changes", [{"kd_weight": 2.0}, {"temperature": 3.0}])
def test_each_setting_changes_training(small: Any, changes: dict[str, float]) -> None:
    teacher = small.frozen(3)
    one, other = (
        trained(small, FedLwF(**options).build(), teacher, small.second)  # type: ignore[arg-type]
        for options in ({}, changes)
    )
    assert content_hash(state_of(one)) != content_hash(state_of(other))
