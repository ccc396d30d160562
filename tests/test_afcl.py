"""AFCL: sums of statistics give the ridge solution on all data ever seen, whoever had which part of it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedcil.fold import Fold
from fedcil.keys import Key
from fedcil.methods.afcl import AFCL, projection, symmetric, upper
from fedcil.methods.base import Samples
from fedcil.models.network import Network, snapshot, state_of
from fedcil.state import ServerState
from fedcil.stream import Task
from fedcil.tensors import Contribution, content_hash, count_bytes

PIXELS = 4
Shares = Sequence[tuple[Task, Sequence[Samples | None]]]
"""For each task what its clients have; None for a client that does not answer."""


def network_of(small: Any, classes: int) -> Network:
    network: Network = small.linear(torch.eye(classes, PIXELS))
    return network.eval()


def draw(count: int, classes: Sequence[int], seed: int) -> Samples:
    """Images are their own features."""
    generator = Key(seed).torch()
    images = torch.randn(count, PIXELS, 1, 1, generator=generator)
    return Samples(images, torch.tensor(classes)[torch.randint(len(classes), (count,), generator=generator)])


def cut(samples: Samples, clients: int, seed: int) -> list[Samples]:
    """Each sample to a client at random; some may get none."""
    rng = random.Random(seed)
    owner = torch.tensor([rng.randrange(clients) for _ in samples.labels], dtype=torch.int64)
    return [Samples(samples.images[owner == k], samples.labels[owner == k]) for k in range(clients)]


def answer(small: Any, options: AFCL, samples: Samples, task: Task) -> Contribution:
    return options.build().fit(network_of(small, task.seen), samples, task, lambda images: images)


def federate(small: Any, options: AFCL, shares: Shares) -> ServerState:
    """The product's own path: fit on each client, the summation tree, reduce."""
    method = options.build()
    state = ServerState(model=state_of(network_of(small, 1)))
    for task, clients in shares:
        (phase,) = method.phases(task, 5)
        fold = Fold.empty(len(clients))
        for place, samples in enumerate(clients):
            if samples is not None:
                fold.add(place, answer(small, options, samples, task))
        state = method.reduce(state, phase, fold.total())
    return state


def features(options: AFCL, images: Tensor) -> np.ndarray[Any, Any]:
    x = images.flatten(1).double().numpy()
    if options.expansion:
        x = np.maximum(x @ projection(PIXELS, options.expansion, torch.device("cpu")).numpy(), 0)
    return np.concatenate([x, np.ones((len(x), 1))], axis=1)


def ridge(options: AFCL, parts: Sequence[Samples], classes: int) -> np.ndarray[Any, Any]:
    """argmin_W ||F W - Y||^2 + gamma ||W||^2 by least squares on F with sqrt(gamma) I below it."""
    x = np.concatenate([features(options, part.images) for part in parts])
    y = np.concatenate([np.eye(classes)[part.labels.numpy()] for part in parts])
    below = np.sqrt(options.gamma) * np.eye(x.shape[1])
    zeros = np.zeros((x.shape[1], classes))
    return np.linalg.lstsq(np.concatenate([x, below]), np.concatenate([y, zeros]), rcond=None)[0]


def weight(state: ServerState) -> np.ndarray[Any, Any]:
    return state.memory["weight"].numpy()


FIRST, SECOND, THIRD = Task(0, 0, 2), Task(1, 2, 4), Task(2, 4, 6)
SMALL = AFCL(expansion=0)


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=3),
    clients=st.integers(1, 5),
    expansion=st.sampled_from([0, 9]),
    gamma=st.sampled_from([0.1, 1.0, 30.0]),
    seed=st.integers(0, 10**6),
)
def test_any_partition_gives_the_joint_ridge_solution(
    small: Any, sizes: list[int], clients: int, expansion: int, gamma: float, seed: int
) -> None:
    """Clients that have nothing are among them, and blocks of a lower rank than the features."""
    options = AFCL(expansion=expansion, gamma=gamma)
    tasks = (FIRST, SECOND, THIRD)[: len(sizes)]
    data = [draw(n, task.classes, seed + i) for i, (n, task) in enumerate(zip(sizes, tasks, strict=True))]
    shares = [(task, cut(part, clients, seed)) for task, part in zip(tasks, data, strict=True)]
    state = federate(small, options, shares)
    expected = ridge(options, data, tasks[-1].seen)
    np.testing.assert_allclose(weight(state), expected, rtol=0, atol=1e-10)


def test_the_order_of_tasks_permutes_columns(small: Any) -> None:
    """Classes 0, 1 then 2, 3 against the same samples the other way round, renumbered in order of arrival."""
    one, two = draw(20, [0, 1], 0), draw(20, [2, 3], 1)
    forward = federate(small, SMALL, [(FIRST, [one]), (SECOND, [two])])
    shares = [
        (FIRST, [Samples(two.images, two.labels - 2)]),
        (SECOND, [Samples(one.images, one.labels + 2)]),
    ]
    backward = federate(small, SMALL, shares)
    np.testing.assert_allclose(weight(forward), weight(backward)[:, [2, 3, 0, 1]], rtol=0, atol=1e-12)


def test_the_order_of_clients_changes_no_bit_of_a_solution_by_much(small: Any) -> None:
    parts = cut(draw(40, [0, 1], 0), 4, 0)
    one, other = (federate(small, SMALL, [(FIRST, order)]) for order in (parts, parts[::-1]))
    np.testing.assert_allclose(weight(one), weight(other), rtol=0, atol=1e-12)


def test_a_client_that_does_not_answer_was_never_there(small: Any) -> None:
    """Leaving is not having joined; who comes back for a later task counts with that task."""
    parts = cut(draw(30, [0, 1], 0), 3, 0)
    later = cut(draw(30, [2, 3], 1), 3, 0)
    state = federate(small, SMALL, [(FIRST, [parts[0], None, parts[2]]), (SECOND, [None, *later[1:]])])
    joint = [parts[0], parts[2], later[1], later[2]]
    np.testing.assert_allclose(weight(state), ridge(SMALL, joint, 4), rtol=0, atol=1e-11)


def test_a_client_without_samples_changes_nothing(small: Any) -> None:
    whole = draw(20, [0, 1], 0)
    nothing = Samples(whole.images[:0], whole.labels[:0])
    with_, without = (federate(small, SMALL, [(FIRST, clients)]) for clients in ([whole, nothing], [whole]))
    assert content_hash(with_.memory) == content_hash(without.memory)


def test_a_task_that_nobody_answered_leaves_the_state(small: Any) -> None:
    first = draw(20, [0, 1], 0)
    once = federate(small, SMALL, [(FIRST, [first])])
    skipped = federate(small, SMALL, [(FIRST, [first]), (SECOND, [None, None])])
    assert content_hash(skipped.memory) == content_hash(once.memory)


def test_a_task_after_one_that_nobody_answered_is_the_joint_solution(small: Any) -> None:
    first, third = draw(20, [0, 1], 0), draw(20, [4, 5], 1)
    state = federate(small, SMALL, [(FIRST, [first]), (SECOND, [None]), (THIRD, [third])])
    np.testing.assert_allclose(weight(state), ridge(SMALL, [first, third], 6), rtol=0, atol=1e-11)


def test_samples_that_are_there_twice_weigh_two(small: Any) -> None:
    """2 ||F W - Y||^2 + gamma ||W||^2 has the solution of gamma / 2."""
    part = draw(20, [0, 1], 0)
    twice = federate(small, SMALL, [(FIRST, [part, part])])
    half = federate(small, AFCL(expansion=0, gamma=0.5), [(FIRST, [part])])
    np.testing.assert_allclose(weight(twice), weight(half), rtol=0, atol=1e-12)


def test_a_class_that_comes_again_is_added(small: Any) -> None:
    first, again = draw(20, [0, 1], 0), draw(20, [1, 2, 3], 1)
    state = federate(small, SMALL, [(FIRST, [first]), (SECOND, [again])])
    np.testing.assert_allclose(weight(state), ridge(SMALL, [first, again], 4), rtol=0, atol=1e-11)


def test_columns_of_old_classes_change_with_new_data(small: Any) -> None:
    """Not forgetting: the old samples say 0 for the new classes, the new ones 0 for the old."""
    first, second = draw(20, [0, 1], 0), draw(20, [2, 3], 1)
    before = federate(small, SMALL, [(FIRST, [first])])
    after = federate(small, SMALL, [(FIRST, [first]), (SECOND, [second])])
    assert np.abs(weight(after)[:, :2] - weight(before)).max() > 0.01


@pytest.mark.parametrize(("expansion", "width"), [(0, PIXELS + 1), (7, 8)])
def test_an_upload_has_the_bytes_of_the_formula(small: Any, expansion: int, width: int) -> None:
    """d (d + 1) / 2 + d C numbers in float64, d with the constant feature; however many samples."""
    for count in (1, 50):
        given = answer(small, AFCL(expansion=expansion), draw(count, [2, 3], 0), SECOND)
        assert count_bytes(given.tensors) == 8 * (width * (width + 1) // 2 + width * 4)
        assert {tensor.dtype for tensor in given.tensors.values()} == {torch.float64}
        assert given.weight == 1.0


def test_samples_come_in_stacks(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    part = draw(25, [0, 1], 0)
    whole = answer(small, SMALL, part, FIRST)
    monkeypatch.setattr("fedcil.methods.afcl.BATCH", 10)
    stacks = answer(small, SMALL, part, FIRST)
    for name, tensor in whole.tensors.items():
        torch.testing.assert_close(stacks.tensors[name], tensor, rtol=0, atol=1e-12)


def test_a_triangle_is_a_symmetric_matrix() -> None:
    """Rows of the upper half, one after another."""
    full = torch.tensor([[1.0, 2, 3], [2, 4, 5], [3, 5, 6]])
    assert upper(full).tolist() == [1, 2, 3, 4, 5, 6]
    assert torch.equal(symmetric(upper(full), 3), full)


def test_predictions_are_features_times_weights(small: Any) -> None:
    for expansion in (0, 9):
        options = AFCL(expansion=expansion)
        state = federate(small, options, [(FIRST, [draw(20, [0, 1], 0)])])
        images = draw(5, [0, 1], 3).images
        scores = options.build().predict(network_of(small, 2), state.memory, images)
        np.testing.assert_allclose(scores, features(options, images) @ weight(state), rtol=0, atol=1e-12)


def test_before_any_statistics_the_head_predicts(small: Any) -> None:
    images, network = draw(5, [0, 1], 3).images, network_of(small, 2)
    assert torch.equal(SMALL.build().predict(network, {}, images), network(images))


@pytest.mark.parametrize("later", [False, True])
def test_a_class_without_statistics_is_never_predicted(small: Any, later: bool) -> None:
    """Nobody answered in the second task; whether a third one was answered makes no difference to that."""
    shares: list[tuple[Task, list[Samples | None]]] = [(FIRST, [draw(20, [0, 1], 0)]), (SECOND, [None])]
    if later:
        shares.append((THIRD, [draw(20, [4, 5], 1)]))
    state = federate(small, SMALL, shares)
    classes = 6 if later else 4
    scores = SMALL.build().predict(network_of(small, classes), state.memory, draw(50, [0], 3).images)
    assert scores.shape == (50, classes)
    assert scores[:, [0, 1, *([4, 5] if later else [])]].isfinite().all()
    assert scores[:, 2:4].eq(-torch.inf).all()


def test_a_matrix_that_is_not_definite_is_solved_all_the_same(small: Any) -> None:
    """Two equal features of 1e8: their 2 x 2 block has determinant 0 up to rounding, and gamma drowns in it."""
    images = 1e8 * torch.randn(30, 1, 1, 1, generator=Key(0).torch()).expand(30, PIXELS, 1, 1)
    state = federate(small, AFCL(expansion=0, gamma=1e-9), [(FIRST, [Samples(images, torch.arange(30) % 2)])])
    assert state.memory["weight"].isfinite().all()


def test_the_random_layer_is_the_same_everywhere() -> None:
    """From a key of its own: N(0, 1 / inputs), whatever the run's seed and the global generator."""
    state = torch.get_rng_state()
    cpu = torch.device("cpu")
    one, same = projection(20, 500, cpu), projection.__wrapped__(20, 500, cpu)
    assert torch.equal(one, same)
    assert torch.equal(state, torch.get_rng_state())
    assert one.std().item() == pytest.approx(20**-0.5, rel=0.05)


def test_phases_are_one_round_of_all_clients() -> None:
    (only,) = AFCL().build().phases(FIRST, 9)
    assert (only.rounds, only.who, only.work) == (1, "all", "fit")
    train, statistics = AFCL(backbone="task1").build().phases(FIRST, 9)
    assert (train.work, train.rounds) == ("train", 9)
    assert statistics == only
    assert AFCL(backbone="task1").build().phases(SECOND, 9) == (only,)


def test_training_rounds_of_the_first_task_move_the_model_and_statistics_do_not(small: Any) -> None:
    method = AFCL(backbone="task1", expansion=0).build()
    train, statistics = method.phases(FIRST, 1)
    trained = small.linear(torch.ones(2, PIXELS))
    fold = Fold.empty(1)
    fold.add(0, Contribution(snapshot(trained), 2.0))
    state = method.reduce(ServerState(model=snapshot(network_of(small, 2))), train, fold.total())
    assert content_hash(state.model) == content_hash(state_of(trained))
    fold = Fold.empty(1)
    fold.add(0, answer(small, SMALL, draw(20, [0, 1], 0), FIRST))
    assert method.reduce(state, statistics, fold.total()).model is state.model
    assert method.reduce(state, statistics, None) is state


@pytest.mark.parametrize("changes", [{"gamma": 2.0}, {"expansion": 8}])
def test_each_setting_changes_the_scores(small: Any, changes: dict[str, Any]) -> None:
    images, scores = draw(5, [0], 3).images, []
    for options in (AFCL(expansion=9), AFCL(**{"expansion": 9, **changes})):
        state = federate(small, options, [(FIRST, [draw(20, [0, 1], 0)])])
        scores.append(options.build().predict(network_of(small, 2), state.memory, images))
    assert not torch.allclose(*scores)
