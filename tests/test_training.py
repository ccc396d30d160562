"""Local training: batches, schedule, plain SGD step for step, and a client's answer to a request."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from client import handle
from client.handle import Round, do_job
from client.states import StateStore
from client.training import LocalSGD, Recipe, Trained, cut_epoch, grouped, learning_rate, local_sgd
from client.worker import Shared, Worker
from fedcil.errors import Stopped
from fedcil.experiment import Experiment, open_experiment
from fedcil.gradients import as_stored, gradients
from fedcil.keys import Key
from fedcil.messages import Answer, Broadcast, Failure, Job, Report, Request
from fedcil.methods.base import Batch, Method, Phase, Samples
from fedcil.models.network import Network, grow_head, snapshot, state_of
from fedcil.scenario_file import load_scenario
from fedcil.tables import TrainingSection
from fedcil.tensors import Contribution, Tensors, content_hash
from server.cohort import eligible

# --- schedule ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("place", "expected"), [(0, 0.1), (1, 0.0977237), (50, 0.0316228), (99, 0.0102329)])
def test_the_rate_falls_exponentially_from_lr_to_nearly_lr_end(place: int, expected: float) -> None:
    """mfcl section 3: 0.1 (0.01 / 0.1)^(r / 100); 10^-0.01 = 0.977237."""
    assert learning_rate(TrainingSection(), place, 100) == pytest.approx(expected, rel=1e-5)


def test_the_mean_rate_is_that_of_the_specification() -> None:
    """A geometric series: 0.1 (1 - 0.1) / (1 - 0.1^(1/100)) / 100 = 0.03954."""
    rates = [learning_rate(TrainingSection(), place, 100) for place in range(100)]
    assert sum(rates) / 100 == pytest.approx(0.0009 / (1 - 0.1**0.01))
    assert sum(rates) / 100 == pytest.approx(0.03954, abs=5e-6)


def test_a_rate_may_be_constant() -> None:
    training = TrainingSection(lr=0.3, lr_end=0.3)
    assert {learning_rate(training, place, 7) for place in range(7)} == {0.3}


# --- batches ----------------------------------------------------------------------------------------------

COUNTS = st.integers(2, 300)
SIZES = st.integers(2, 40)


@settings(max_examples=200, deadline=None)
@given(COUNTS, SIZES)
def test_ragged_batches_are_full_but_for_the_last(count: int, size: int) -> None:
    """A rest of one joins the batch before it: batch norm needs two."""
    sizes = cut_epoch(count, size, "ragged")
    assert sum(sizes) == count
    assert set(sizes[:-1]) <= {size}
    assert 2 <= sizes[-1] <= size + 1
    assert sizes[-1] != size + 1 or count % size == 1


@settings(max_examples=200, deadline=None)
@given(COUNTS, SIZES)
def test_even_batches_differ_by_one_at_most(count: int, size: int) -> None:
    """As few as possible, except that none has one sample: pairs of an odd number have a three among them."""
    sizes = cut_epoch(count, size, "even")
    assert sum(sizes) == count
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 2
    if size > 2:
        assert len(sizes) == math.ceil(count / size)
        assert max(sizes) <= size


@settings(max_examples=200, deadline=None)
@given(COUNTS, SIZES)
def test_dropping_the_last_leaves_full_batches(count: int, size: int) -> None:
    assert cut_epoch(count, size, "drop_last") == [size] * (count // size)


def test_batches_by_hand() -> None:
    assert cut_epoch(100, 32, "ragged") == [32, 32, 32, 4]
    assert cut_epoch(97, 32, "ragged") == [32, 32, 33]
    assert cut_epoch(100, 32, "even") == [25, 25, 25, 25]
    assert cut_epoch(101, 32, "even") == [26, 25, 25, 25]
    assert cut_epoch(100, 32, "drop_last") == [32, 32, 32]
    assert cut_epoch(31, 32, "drop_last") == []


# --- local SGD --------------------------------------------------------------------------------------------


def plain_images(stored: Tensor, index: Tensor, generator: torch.Generator) -> Tensor:
    return stored[index]


def train(
    small: Any,
    model: Network,
    training: TrainingSection,
    *,
    method: Method | None = None,
    count: int = 11,
    augment: Callable[[Tensor, Tensor, torch.Generator], Tensor] = plain_images,
    key: Key | None = None,
    check: Callable[[], None] = lambda: None,
) -> Trained:
    recipe = Recipe(method or Method(), None, small.first, training, 0.1, augment, check=check)
    samples = Samples(small.images(count), small.labels(count, small.first))
    return local_sgd(model, recipe, samples, key or Key(0).at("client", 1))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.usefixtures("float64")
def test_one_client_with_all_data_is_centralised_sgd_step_for_step(small: Any, momentum: float) -> None:
    """torch.optim.SGD and plain cross-entropy on the same batches: the same model before every step."""
    training = TrainingSection(epochs=3, batch_size=4, momentum=momentum, weight_decay=0.02)
    ours, theirs = small.network(3), small.network(3).train()
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=momentum, weight_decay=0.02)
    before: list[Tensors] = []
    batches: list[Tensor] = []

    def record(stored: Tensor, index: Tensor, generator: torch.Generator) -> Tensor:
        batches.extend(index.split([4, 4, 3]))
        return stored[index]

    result = train(small, ours, training, augment=record, check=lambda: before.append(snapshot(ours)))
    images, labels, losses = small.images(11), small.labels(11, small.first), []
    for start, index in zip(before, batches, strict=True):
        for name, tensor in state_of(theirs).items():
            torch.testing.assert_close(start[name], tensor, rtol=0, atol=1e-12)
        loss = F.cross_entropy(theirs(images[index]), labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    for name, tensor in state_of(theirs).items():
        torch.testing.assert_close(state_of(ours)[name], tensor, rtol=0, atol=1e-12)
    assert result.steps == len(batches) == 9
    assert result.loss == pytest.approx(sum(losses) / 9, rel=1e-12)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", ["cnn", "resnet8", "resnet18"])
def test_gradients_lie_in_memory_as_their_parameters(small: Any, name: str, layout: torch.memory_format) -> None:
    """A fused optimiser does not look at strides: channels-last gradients of contiguous weights would be scrambled."""
    model = small.network(3, name).to(memory_format=torch.contiguous_format).train()
    images = small.images(4).contiguous(memory_format=layout)
    parameters = list(model.parameters())
    loss = F.cross_entropy(model(images), small.labels(4, small.first))
    found = gradients(loss, parameters)
    if layout == torch.channels_last:
        raw = torch.autograd.grad(model(images).sum(), parameters)
        assert any(g.stride() != p.stride() for g, p in zip(raw, parameters, strict=True))
    flat = [p.detach().clone() for p in parameters]
    torch._fused_sgd_(
        flat,
        found,
        [],
        weight_decay=0.0,
        momentum=0.0,
        lr=1.0,
        dampening=0.0,
        nesterov=False,
        maximize=False,
        is_first_step=False,
    )
    for after, parameter, gradient in zip(flat, parameters, found, strict=True):
        torch.testing.assert_close(after, parameter.detach() - gradient)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_channels_last_weights_are_updated_in_place_without_a_copy(momentum: float) -> None:
    """To the bits of torch's own optimiser."""
    ours, theirs = (torch.nn.Conv2d(3, 8, 3).requires_grad_().to(memory_format=torch.channels_last) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(4, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    step = LocalSGD(list(ours.parameters()), 0.1, TrainingSection(momentum=momentum, weight_decay=0.01))
    reference = torch.optim.SGD(theirs.parameters(), 0.1, momentum=momentum, weight_decay=0.01, fused=True)
    with torch.profiler.profile() as seen:
        for _ in range(3):
            step.step(ours(images).square().mean())
    inside = [event.name for event in seen.events() or () if "fused_sgd" in getattr(event.cpu_parent, "name", "")]
    assert inside == []
    for _ in range(3):
        reference.zero_grad()
        theirs(images).square().mean().backward()
        reference.step()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_weight_that_a_loss_reaches_late_begins_with_its_first_gradient() -> None:
    """As in torch, with momentum: stochastic depth leaves layers out of a step."""
    ours, theirs = ([torch.ones(3, requires_grad=True) for _ in range(2)] for _ in range(2))
    step = LocalSGD(ours, 0.1, TrainingSection(momentum=0.9, weight_decay=0.01))
    reference = torch.optim.SGD(theirs, 0.1, momentum=0.9, weight_decay=0.01)
    for reached in ((0,), (0, 1), (1,), (0, 1)):
        step.step(sum((ours[place] ** 2).sum() for place in reached))  # type: ignore[arg-type]
        reference.zero_grad()
        sum((theirs[place] ** 2).sum() for place in reached).backward()  # type: ignore[union-attr]
        reference.step()
    torch.testing.assert_close(ours, theirs)


def test_weights_with_gaps_in_memory_are_refused() -> None:
    with pytest.raises(ValueError, match="not dense"):
        as_stored(torch.zeros(4, 6)[:, ::2])


def test_each_epoch_has_each_sample_once_in_an_order_of_its_own(small: Any) -> None:
    batches: list[list[int]] = []

    def record(stored: Tensor, index: Tensor, generator: torch.Generator) -> Tensor:
        batches.extend(batch.tolist() for batch in index.split([4, 4, 3]))
        return stored[index]

    train(small, small.network(3), TrainingSection(epochs=3, batch_size=4), augment=record)
    assert [len(batch) for batch in batches] == [4, 4, 3] * 3
    epochs = [[i for batch in batches[start : start + 3] for i in batch] for start in (0, 3, 6)]
    assert all(sorted(epoch) == list(range(11)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


@given(sizes=st.lists(st.integers(1, 40), max_size=12), most=st.integers(1, 60))
def test_grouped_batches_are_all_of_them_in_their_order(sizes: list[int], most: int) -> None:
    groups = list(grouped(sizes, most))
    assert [size for group in groups for size in group] == sizes
    assert all(sum(group) <= most or len(group) == 1 for group in groups)


def test_images_made_ahead_are_the_same_for_any_number_at_once(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without random augmentation only the calls differ; memory is bounded for large images."""
    results = []
    for at_once in (1, 10**9):
        monkeypatch.setattr("client.training.AHEAD_BYTES", at_once)
        model = small.network(3)
        train(small, model, TrainingSection(epochs=2, batch_size=4))
        results.append(content_hash(state_of(model)))
    assert results[0] == results[1]


def test_without_epochs_nothing_happens(small: Any) -> None:
    model = small.network(3)
    before = content_hash(state_of(model))
    result = train(small, model, TrainingSection(epochs=0))
    assert (result.steps, math.isnan(result.loss)) == (0, True)
    assert content_hash(state_of(model)) == before


def test_too_few_samples_for_a_full_batch_make_no_step(small: Any) -> None:
    """What SuperImageNet's loader does with fewer than 32 images."""
    model = small.network(3)
    before = content_hash(state_of(model))
    result = train(small, model, TrainingSection(epochs=2, batch_size=12, batches="drop_last"))
    assert result.steps == 0
    assert content_hash(state_of(model)) == before


def noisy(stored: Tensor, index: Tensor, generator: torch.Generator) -> Tensor:
    return stored[index] + 0.1 * torch.randn(stored[index].shape, generator=generator)


def trained_hash(small: Any, key: Key) -> str:
    model = small.network(3)
    train(small, model, TrainingSection(epochs=2, batch_size=4), augment=noisy, key=key)
    return content_hash(state_of(model))


def test_all_randomness_comes_from_the_key(small: Any) -> None:
    """Global seeds change nothing, and no global generator is touched."""
    first = trained_hash(small, Key(0).at("client", 1))
    with torch.random.fork_rng():
        torch.manual_seed(5)
        random.seed(5)
        np.random.seed(5)
        before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # type: ignore[index]
        assert trained_hash(small, Key(0).at("client", 1)) == first
        assert before[0] == random.getstate()
        assert before[1] == np.random.get_state()[1].tolist()  # type: ignore[index]
        assert torch.equal(before[2], torch.get_rng_state())
    assert trained_hash(small, Key(0).at("client", 2)) != first
    assert trained_hash(small, Key(1).at("client", 1)) != first


def test_each_step_draws_from_a_key_of_its_own(small: Any) -> None:
    keys: list[Key] = []

    def draw(prepared: object, real: int, task: object, key: Key) -> None:
        keys.append(key)

    train(small, small.network(3), TrainingSection(epochs=3, batch_size=4), method=Method(draw=draw))
    assert len(keys) == len(set(keys)) == 9


def test_check_is_called_before_each_step_and_may_stop(small: Any) -> None:
    calls: list[int] = []

    def stop_at_4() -> None:
        calls.append(len(calls))
        if len(calls) == 4:
            raise Stopped(130)

    steps: list[int] = []

    def loss(model: Network, prepared: object, batch: Batch, draws: object) -> Tensor:
        steps.append(len(batch.labels))
        return F.cross_entropy(model(batch.images), batch.labels)

    training = TrainingSection(epochs=3, batch_size=4)
    with pytest.raises(Stopped):
        train(small, small.network(3), training, method=Method(loss=loss), check=stop_at_4)
    assert (len(calls), len(steps)) == (4, 3)


@pytest.mark.parametrize(("updates", "momentum"), [(1, 0.1), (2, 0.19)])
def test_running_statistics_move_as_often_as_the_method_says(small: Any, updates: int, momentum: float) -> None:
    """Set anew each time: a worker's network comes from another task."""
    model = small.network(3)
    for part in model.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.momentum = 0.5
    train(small, model, TrainingSection(epochs=1), method=Method(norm_updates=lambda task: updates))
    (found,) = {part.momentum for part in model.modules() if isinstance(part, torch.nn.BatchNorm2d)}
    assert found == pytest.approx(momentum, rel=1e-14)


# --- a client's answer ------------------------------------------------------------------------------------


def experiment_of(**sections: dict[str, Any]) -> Experiment:
    """Synthetic data, 4 classes in 2 tasks, 3 clients of 8 images each."""
    scenario: dict[str, Any] = {
        "device": "cpu",
        "data": {"name": "synthetic", "classes": 4, "samples_per_class": 12},
        "stream": {"tasks": 2},
        "clients": {"count": 3, "per_round": 2},
        "model": {"name": "cnn", "width": 4},
        "method": {"name": "fedavg"},
        "training": {"rounds": 4, "epochs": 2, "batch_size": 4},
    }
    for name, values in sections.items():
        scenario[name] = {**scenario.get(name, {}), **values}
    return open_experiment(load_scenario(scenario))


def worker_of(experiment: Experiment, folder: Path) -> Worker:
    return Worker(Shared(experiment, StateStore(folder)))


def broadcast_of(experiment: Experiment, **place: int) -> Broadcast:
    where = {"task": 0, "phase": 0, "round": 0, **place}
    model = experiment.first_state().server.model
    seen = experiment.stream.tasks[where["task"]].seen
    return Broadcast(**where, tensors=grow_head(model, seen, Key(0).torch()))


def gift(broadcast: Broadcast, client: int, worker: Worker) -> Contribution:
    answer = do_job(Round(broadcast, worker), Job(client, 0))
    assert isinstance(answer.result, Report), answer.result
    assert answer.contribution is not None
    return answer.contribution


def test_a_client_without_epochs_gives_the_model_back(tmp_path: Path) -> None:
    experiment = experiment_of(training={"epochs": 0})
    broadcast = broadcast_of(experiment)
    given = gift(broadcast, 0, worker_of(experiment, tmp_path))
    assert content_hash(given.tensors) == content_hash(broadcast.tensors)


def test_the_anchor_is_where_the_round_started(tmp_path: Path) -> None:
    """At each step, though the model has moved: the parameters of the broadcast, in the model's order."""
    anchors: list[tuple[Tensor, ...]] = []

    def loss(network: Network, prepared: object, batch: Batch, draws: object) -> Tensor:
        anchors.append(batch.anchor)
        return F.cross_entropy(network(batch.images), batch.labels)

    experiment = experiment_of()
    experiment = replace(experiment, method=replace(experiment.method, loss=loss))
    broadcast, worker = broadcast_of(experiment), worker_of(experiment, tmp_path)
    gift(broadcast, 0, worker)
    names = [name for name, _ in experiment.compute.network(2).named_parameters()]
    assert len(anchors) > 1
    for anchor in anchors:
        assert all(torch.equal(a, broadcast.tensors[name]) for a, name in zip(anchor, names, strict=True))


def test_training_leaves_the_broadcast_alone(tmp_path: Path) -> None:
    """Inside a process the global model travels by reference."""
    experiment = experiment_of()
    broadcast = broadcast_of(experiment)
    before = content_hash(broadcast.tensors)
    given = gift(broadcast, 0, worker_of(experiment, tmp_path))
    assert content_hash(broadcast.tensors) == before != content_hash(given.tensors)


def test_a_workers_past_does_not_show_in_an_answer(tmp_path: Path) -> None:
    """A fresh worker and one that served other clients, another task and two updates of batch norm before."""
    experiment = experiment_of()
    first, second = broadcast_of(experiment), broadcast_of(experiment, task=1)
    fresh = content_hash(gift(first, 0, worker_of(experiment, tmp_path)).tensors)
    used = worker_of(experiment, tmp_path)
    twice = replace(experiment, method=replace(experiment.method, norm_updates=lambda task: 2))
    used.shared.experiment = twice
    gift(second, 1, used)
    gift(first, 2, used)
    used.shared.experiment = experiment
    assert content_hash(gift(first, 0, used).tensors) == fresh


def test_clients_rounds_and_tasks_are_places_of_their_own(tmp_path: Path) -> None:
    experiment = experiment_of()
    worker = worker_of(experiment, tmp_path)
    keys = {
        experiment.round_key(broadcast_of(experiment, task=task, round=round_)).at("client", client)
        for task in (0, 1)
        for round_ in (0, 1)
        for client in (0, 1)
    }
    assert len(keys) == 8
    answers = [content_hash(gift(broadcast_of(experiment, round=round_), 0, worker).tensors) for round_ in (0, 1)]
    assert answers[0] != answers[1]


def test_the_rate_restarts_with_every_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """4 rounds: 0.1 (0.1)^(r / 4)."""
    rates: list[float] = []

    def record(model: Network, recipe: Recipe, samples: Samples, key: Key) -> Trained:
        rates.append(recipe.lr)
        return Trained(1, 0.5)

    monkeypatch.setattr(handle, "local_sgd", record)
    experiment = experiment_of()
    worker = worker_of(experiment, tmp_path)
    for task in (0, 1):
        for round_ in range(4):
            gift(broadcast_of(experiment, task=task, round=round_), 0, worker)
    assert rates == pytest.approx([0.1 * 0.1 ** (r / 4) for r in range(4)] * 2)


@pytest.mark.parametrize(("weighting", "expected"), [("samples", 8.0), ("uniform", 1.0)])
def test_a_client_weighs_its_samples_or_one(tmp_path: Path, weighting: str, expected: float) -> None:
    experiment = experiment_of(server={"weighting": weighting})
    given = gift(broadcast_of(experiment), 0, worker_of(experiment, tmp_path))
    assert given.weight == expected


def test_a_client_gives_no_counters(tmp_path: Path) -> None:
    experiment = experiment_of()
    given = gift(broadcast_of(experiment), 0, worker_of(experiment, tmp_path))
    assert all(tensor.is_floating_point() for tensor in given.tensors.values())
    assert any(name.endswith("running_mean") for name in given.tensors)


def test_one_sample_is_too_few(tmp_path: Path) -> None:
    experiment = experiment_of(
        data={"classes": 2, "samples_per_class": 1}, stream={"tasks": 1}, clients={"count": 2, "per_round": 1}
    )
    answer = do_job(Round(broadcast_of(experiment), worker_of(experiment, tmp_path)), Job(1, 0))
    assert answer == Answer(Failure(1, "samples", "too_few_samples"))


def test_a_client_without_a_whole_batch_gives_nothing_where_rests_are_dropped(tmp_path: Path) -> None:
    """The model that it was sent is no update."""
    experiment = experiment_of(training={"batch_size": 64, "batches": "drop_last"})
    answer = do_job(Round(broadcast_of(experiment), worker_of(experiment, tmp_path)), Job(0, 0))
    assert answer == Answer(Failure(0, "samples", "fewer samples than a batch, and training.batches = 'drop_last'"))


def test_who_has_one_sample_is_asked_for_statistics_and_not_for_training() -> None:
    counts = np.array([0, 1, 2, 3])
    experiment = experiment_of()
    train, remember = Phase(name="train", rounds=1), Phase(name="remember", rounds=1, work="remember")
    here = np.ones(4, dtype=np.bool_)
    assert eligible(here, None, (), counts, experiment.least_samples(train)).tolist() == [2, 3]
    assert eligible(here, None, (), counts, experiment.least_samples(remember)).tolist() == [1, 2, 3]


def test_a_loss_that_is_not_finite_gives_nothing(tmp_path: Path) -> None:
    experiment = experiment_of(training={"lr": 1e20, "lr_end": 1e20})
    answer = do_job(Round(broadcast_of(experiment), worker_of(experiment, tmp_path)), Job(0, 0))
    assert isinstance(answer.result, Failure)
    assert answer.result.stage == "training"
    assert "lower training.lr" in answer.result.reason
    assert answer.contribution is None


@pytest.mark.parametrize("lr", [1e12, 1e17])
def test_tensors_that_are_not_finite_are_not_given(tmp_path: Path, lr: float) -> None:
    """The last step's loss is of the weights before it: two steps may end in infinity with finite losses,
    in running variances (1e12) or in weights (1e17). In a mean one such client is the end of the model.
    """
    training = {"lr": lr, "lr_end": lr, "epochs": 1, "batch_size": 4}
    experiment = experiment_of(training=training)
    answer = do_job(Round(broadcast_of(experiment), worker_of(experiment, tmp_path)), Job(0, 0))
    assert isinstance(answer.result, Failure), answer.result.metrics
    assert answer.result.stage == "training"
    assert answer.contribution is None


def test_a_request_is_answered_job_by_job(tmp_path: Path) -> None:
    """Whom it holds and whom not: a broken client is a failure and an absent leaf, the others count."""
    experiment = experiment_of()
    worker = worker_of(experiment, tmp_path)
    broadcast = broadcast_of(experiment)
    jobs = (Job(0, 0), Job(99, 1), Job(2, 2))  # there is no client 99
    reply = handle.handle(Request(broadcast, jobs, cohort=3), worker)
    assert [report.client for report in reply.reports] == [0, 2]
    assert [failure.client for failure in reply.failures] == [99]
    total = reply.fold.total()
    assert total is not None
    assert total.weight == 16.0
    expected = [gift(broadcast, client, worker_of(experiment, tmp_path)).tensors for client in (0, 2)]
    for name, tensor in total.mean().items():
        torch.testing.assert_close(tensor, (expected[0][name] + expected[1][name]) / 2)


def test_a_stop_goes_through(tmp_path: Path) -> None:
    experiment = experiment_of()

    def stop() -> None:
        raise Stopped(130)

    worker = Worker(Shared(experiment, StateStore(tmp_path)), check=stop)
    with pytest.raises(Stopped):
        handle.handle(Request(broadcast_of(experiment), (Job(0, 0),), cohort=1), worker)


def test_a_network_that_was_looked_at_is_trained_like_a_new_one(small: Any) -> None:
    """A phase of work "fit" or "remember" leaves a worker's network in eval mode; the next may train it."""
    new, used = small.network(3), small.network(3)
    used.eval()
    for network in (new, used):
        train(small, network, TrainingSection(epochs=1, batch_size=4))
    assert content_hash(state_of(used)) == content_hash(state_of(new))


@pytest.mark.parametrize("lanes", [None, 2])
def test_each_client_of_a_round_has_draws_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lanes: int | None
) -> None:
    used, one, many = [], handle.local_sgd, handle.local_sgd_in_lanes

    def alone(network: Network, recipe: Recipe, samples: Samples, key: Key) -> Trained:
        used.append(key.path)
        return one(network, recipe, samples, key)

    def side_by_side(*given: Any) -> Any:
        used.extend(key.path for key in given[-1])
        return many(*given)

    monkeypatch.setattr(handle, "local_sgd", alone)
    monkeypatch.setattr(handle, "local_sgd_in_lanes", side_by_side)
    experiment = experiment_of(engine={"name": "inline", "lanes": lanes} if lanes else {})
    request = Request(broadcast_of(experiment), (Job(0, 0), Job(2, 1)), cohort=2)
    handle.handle(request, worker_of(experiment, tmp_path))
    assert len(set(used)) == len(used) == 2


@pytest.mark.parametrize(("method", "phase"), [("afcl", 0), ("feder", 1)])
def test_statistics_and_memories_are_made_in_eval_mode(tmp_path: Path, method: str, phase: int) -> None:
    """Batch norms by what they know, and not by the batch."""
    experiment = experiment_of(method={"name": method})
    worker = worker_of(experiment, tmp_path)
    answer = do_job(Round(broadcast_of(experiment, phase=phase), worker), Job(0, 0))
    assert isinstance(answer.result, Report)
    assert answer.result.samples == 8
    assert not worker.local.network.training


def test_a_single_sample_beyond_one_full_batch_joins_it() -> None:
    assert cut_epoch(9, 8, "ragged") == [9]
