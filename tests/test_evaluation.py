"""Accuracy, task-aware accuracy and confusion, counted by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fedcil
from fedcil.compute import Compute
from fedcil.data.dataset import Split
from fedcil.errors import Stopped
from fedcil.experiment import Experiment, open_experiment
from fedcil.methods.base import Method, predict_with_head
from fedcil.methods.settings import MethodSettings
from fedcil.models.network import Network, grow_head
from fedcil.port import StopSignal
from fedcil.scenario_file import load_scenario
from fedcil.state import ServerState
from fedcil.tensors import Tensors
from server import evaluation
from server.evaluation import Evaluator

SCORES = [  # two test images of each of four classes; tasks {0, 1} and {2, 3}
    [9.0, 1.0, 0.0, 0.0],  # 0: right
    [1.0, 2.0, 9.0, 0.0],  # 0: taken for 2; among its own task's for 1
    [1.0, 2.0, 0.0, 9.0],  # 1: taken for 3; among its own right
    [9.0, 2.0, 0.0, 0.0],  # 1: taken for 0; among its own too
    [0.0, 0.0, 9.0, 1.0],  # 2: right
    [0.0, 0.0, 9.0, 1.0],  # 2: right
    [9.0, 0.0, 1.0, 2.0],  # 3: taken for 0; among its own right
    [0.0, 0.0, 9.0, 2.0],  # 3: taken for 2; among its own too
]


TINY_TABLES = {
    "method": {"name": "fedavg"},
    "data": {"name": "synthetic", "classes": 4, "samples_per_class": 3, "image_size": 4, "test_per_class": 2},
    "stream": {"tasks": 2},
    "partition": {"name": "iid"},
    "clients": {"count": 2, "per_round": 1},
    "model": {"width": 2},
}


def experiment(*overrides: str) -> Experiment:
    return open_experiment(load_scenario(TINY_TABLES, overrides))


def answering(opened: Experiment, scores: list[list[float]]) -> Experiment:
    """A method that gives these scores, row after row, however the images come in batches."""
    rows = torch.tensor(scores)

    def predict(network: Network, memory: Tensors, images: Tensor) -> Tensor:
        nonlocal rows
        now, rows = rows[: len(images)], rows[len(images) :]
        return now

    return replace(opened, method=replace(opened.method, predict=predict))


def state(opened: Experiment, classes: int) -> ServerState:
    model = grow_head(opened.first_state().server.model, classes, torch.Generator())
    return ServerState(model=model)


@pytest.mark.parametrize("batch", [1, 3, 256])
def test_all_figures_of_a_second_task_by_hand(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Task 1: 1 of 4 right, 2 with the task known, 2 put into task 2. Task 2: 2, 3, and 1 put into task 1."""
    monkeypatch.setattr(evaluation, "BATCH", batch)
    opened = answering(experiment(), SCORES)
    result = Evaluator(opened).evaluate(state(opened, 4), opened.stream.tasks[1])
    assert result.accuracy == [0.25, 0.5]
    assert result.task_aware == [0.5, 0.75]
    assert result.confusion == [[0.5, 0.5], [0.25, 0.75]]
    assert result.test_images == [4, 4]


def test_only_tasks_seen_so_far_are_tested() -> None:
    opened = answering(experiment(), [row[:2] for row in SCORES[:4]])
    result = Evaluator(opened).evaluate(state(opened, 2), opened.stream.tasks[0])
    assert result.accuracy == [0.5]  # 0 as 0; 0 as 1; 1 as 1; 1 as 0
    assert result.task_aware == [0.5]
    assert result.confusion == [[1.0]]
    assert result.test_images == [4]


def test_labels_are_those_of_the_stream() -> None:
    """Class order 3, 1, 0, 2: the set's images 0 0 1 1 2 2 3 3 have the labels 2 2 1 1 3 3 0 0."""
    right = torch.nn.functional.one_hot(torch.tensor([2, 2, 1, 1, 3, 3, 0, 0])).float().tolist()
    opened = answering(experiment("stream.class_order=[3, 1, 0, 2]"), right)
    result = Evaluator(opened).evaluate(state(opened, 4), opened.stream.tasks[1])
    assert result.accuracy == [1.0, 1.0]


def test_a_task_without_test_images_has_accuracy_0() -> None:
    opened = experiment()
    test = opened.data.test
    opened = replace(opened, data=replace(opened.data, test=Split(test.images[:4], test.labels[:4])))
    result = Evaluator(answering(opened, SCORES)).evaluate(state(opened, 4), opened.stream.tasks[1])
    assert result.accuracy == [0.25, 0.0]
    assert result.confusion == [[0.5, 0.5], [0.0, 0.0]]
    assert result.test_images == [4, 0]


def test_classes_that_cannot_be_scored_are_never_guessed() -> None:
    """A closed-form head has minus infinity for classes of which nothing came in."""
    scores = [[*row[:3], -torch.inf] for row in SCORES]
    opened = answering(experiment(), scores)
    result = Evaluator(opened).evaluate(state(opened, 4), opened.stream.tasks[1])
    assert result.accuracy == [0.5, 0.5]  # image 3 is now taken for 1
    assert result.task_aware == [0.5, 0.5]


def test_the_model_decides_and_stays_as_it_is() -> None:
    """A head that always says class 1: half of task 1, nothing of task 2. Running statistics are not touched."""
    opened = experiment()
    given = state(opened, 4)
    model: dict[str, Any] = {**given.model, "head.weight": torch.zeros_like(given.model["head.weight"])}
    model["head.bias"] = torch.tensor([0.0, 1.0, 0.0, 0.5])
    before = {name: tensor.clone() for name, tensor in model.items()}
    result = Evaluator(opened).evaluate(ServerState(model=model), opened.stream.tasks[1])
    assert result.accuracy == [0.5, 0.0]
    assert result.task_aware == [0.5, 0.5]
    assert result.confusion == [[1.0, 0.0], [1.0, 0.0]]
    assert all(torch.equal(model[name], tensor) for name, tensor in before.items())


def test_evaluations_within_a_task_share_a_network_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = experiment()
    made = []
    frozen = Compute.frozen

    def counted(self: Compute, tensors: Tensors) -> Network:
        made.append(frozen(self, tensors))
        return made[-1]

    monkeypatch.setattr(Compute, "frozen", counted)
    first, second = state(opened, 2), state(opened, 4)
    other = ServerState(model={name: tensor + 0.5 for name, tensor in second.model.items()})
    evaluator, (one, two) = Evaluator(opened), opened.stream.tasks
    asked = [(first, one), (second, two), (other, two)]
    found = [evaluator.evaluate(*each) for each in (*asked, asked[0])]
    assert len(made) == 3
    expected = [Evaluator(opened).evaluate(*each) for each in asked]
    assert found == [*expected, expected[0]]


class Halting(MethodSettings):
    """Somebody asks the run to stop while the first test images are looked at."""

    def build(self) -> Method:
        return Method(predict=stopping)


STOPS: list[StopSignal] = []
LOOKS: list[int] = []


def stopping(network: Network, memory: Tensors, images: Tensor) -> Tensor:
    LOOKS.append(len(images))
    if STOPS:
        STOPS[0].set(143)
    return predict_with_head(network, memory, images)


def test_a_run_can_be_stopped_between_two_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "BATCH", 2)
    monkeypatch.setattr(evaluation, "PATIENCE_S", 0.0)
    scenario = TINY_TABLES | {"method": {"name": f"{__name__}:Halting"}, "training": {"rounds": 2}}
    expected = fedcil.run(scenario, output=tmp_path / "whole", figures=False).results
    LOOKS.clear()
    monkeypatch.setattr(f"{__name__}.STOPS", [StopSignal()])
    with pytest.raises(Stopped):
        fedcil.run(scenario, output=tmp_path / "halted", figures=False, stop=STOPS[0])
    assert LOOKS == [2]
    STOPS.clear()
    (folder,) = (tmp_path / "halted").iterdir()
    assert fedcil.resume(folder, figures=False).results == expected


def test_a_test_image_is_seen_in_the_precision_of_training() -> None:
    def types(precision: str) -> set[torch.dtype]:
        opened = experiment(f"training.precision={precision}")
        seen = set()

        def predict(network: Network, memory: Tensors, images: Tensor) -> Tensor:
            convolutions = [part for part in network.modules() if isinstance(part, torch.nn.Conv2d)]
            for part in convolutions:
                part.register_forward_hook(lambda layer, inputs, output: seen.add(output.dtype))
            return opened.method.predict(network, memory, images)

        watched = replace(opened, method=replace(opened.method, predict=predict))
        Evaluator(watched).evaluate(state(opened, 2), opened.stream.tasks[0])
        return seen

    assert types("fp32") == {torch.float32}
    assert types("bf16") == {torch.bfloat16}
