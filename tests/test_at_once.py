"""Clients trained at the same time, in lanes or as one stacked model: the same weights as one after the other."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import fedcil
from client.handle import Round, do_jobs
from client.lanes import Lane, local_sgd_in_lanes
from client.states import StateStore
from client.training import Recipe, cut_epoch, local_sgd
from client.worker import Shared, Worker
from fedcil.compute import Execution, resolve_execution
from fedcil.engines.workers import worker_count
from fedcil.errors import ScenarioError, Stopped
from fedcil.experiment import Experiment, open_experiment
from fedcil.keys import Key
from fedcil.messages import Broadcast, Job, Payload, Report
from fedcil.methods.base import Method, Samples, prefixed
from fedcil.methods.feder import FedER
from fedcil.methods.fedlwf import FedLwF
from fedcil.methods.fedprox import FedProx
from fedcil.methods.mfcl import MFCL
from fedcil.models.network import Backbone, load_state, snapshot, state_of
from fedcil.scenario_file import load_scenario
from fedcil.tables import TrainingSection
from scenarios.benchmarks.stacked import local_sgd_stacked, stack_draws, turns

EQUAL = 1e-12  # largest difference of a weight, a running statistic or a loss in float64
SIZES = (11, 4, 9, 11, 8, 2, 1)  # batches 4 4 3, 4, 4 5, 4 4 3, 4 4, 2, none: the last client has too few samples
TINY = {"synthetic": 6, "latent": 5, "generator_width": 4}
METHODS: dict[str, Method] = {
    "fedavg": Method(),
    "fedprox": FedProx(mu=0.5).build(),
    "fedlwf": FedLwF().build(),
    "feder": FedER().build(),
    "mfcl": MFCL(**TINY).build(),
    "mfcl_two_updates": MFCL(**TINY, bn_updates=2).build(),
    "mfcl_pool": MFCL(**TINY, pool=32).build(),
}


def noisy(stored: Tensor, index: Tensor, generator: torch.Generator) -> Tensor:
    return stored[index] + 0.1 * torch.randn(stored[index].shape, generator=generator)


def payload_for(small: Any, method: str, net: str) -> Payload | None:
    teacher = small.network(3, net, seed=3)
    if method.startswith("mfcl"):
        return small.payload(teacher, small.generator())
    return Payload.of(prefixed("teacher", state_of(teacher))) if method in ("fedlwf", "feder") else None


@pytest.mark.parametrize("way", ["stack", "lanes"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("net", ["cnn", "resnet8"])
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.usefixtures("float64")
def test_each_client_gives_what_it_gives_alone(small: Any, name: str, net: str, momentum: float, way: str) -> None:
    """Clients of unequal numbers of batches, a short last one among them; batch-norm statistics per client."""
    method, task = METHODS[name], small.second
    prepared = method.prepare(small.compute(net), task, payload_for(small, name, net), Key(0))
    network = small.network(5, net)
    start = snapshot(network)
    samples = [Samples(small.images(n, seed=n), small.labels(n, task, seed=n)) for n in SIZES]
    keys = [Key(0).at("client", client) for client in range(len(SIZES))]
    training = TrainingSection(epochs=3, batch_size=4, momentum=momentum, weight_decay=0.02)
    anchor = tuple(start[each] for each, _ in network.named_parameters())
    recipe = Recipe(method, prepared, task, training, 2.0**-4, noisy, anchor)
    if way == "stack":
        found = local_sgd_stacked(network, recipe, samples, keys)
        assert all(torch.equal(tensor, start[each]) for each, tensor in state_of(network).items())
    else:
        lanes = [Lane(small.network(5, net, seed=9), training, None) for _ in range(3)]
        for round_ in range(2):  # what the first round leaves in the lanes' memory must not reach the second
            found = [
                ({each: tensor.clone() for each, tensor in state.items()}, said)
                for first in range(0, len(SIZES), 3)
                for state, said in local_sgd_in_lanes(
                    lanes,
                    start,
                    replace(recipe, lr=0.5 if round_ == 0 else recipe.lr),
                    samples[first : first + 3],
                    keys[first : first + 3],
                )
            ]
    for mine, key, (state, said) in zip(samples, keys, found, strict=True):
        load_state(network, start)
        alone = local_sgd(network, recipe, mine, key)
        expected = state_of(network)
        assert (said.steps, state.keys()) == (alone.steps, expected.keys())
        torch.testing.assert_close(said.loss, alone.loss, rtol=0, atol=EQUAL, equal_nan=True)
        for each, tensor in state.items():
            torch.testing.assert_close(tensor, expected[each], rtol=0, atol=EQUAL, msg=each)
            assert torch.equal(tensor, start[each]) == (len(mine.labels) == 1), f"{each} has not moved"


@given(st.lists(st.integers(0, 70), min_size=1, max_size=9), st.sampled_from(["ragged", "even", "drop_last"]))
def test_every_batch_of_every_client_has_its_turn(counts: list[int], mode: str) -> None:
    plans = [cut_epoch(count, 8, mode) for count in counts]
    seen: list[list[int]] = [[] for _ in plans]
    for start, stop in turns(plans):
        taken = len(seen[start])
        (size,) = {plan[taken] for plan in plans[start:stop]}
        for client in range(start, stop):
            assert len(seen[client]) == taken
            seen[client].append(size)
    assert seen == plans


def test_draws_are_stacked_by_their_form() -> None:
    leaves, axes, _ = stack_draws([(torch.ones(2), None), (torch.zeros(2), None)], torch.device("cpu"))
    assert leaves[0].tolist() == [[1.0, 1.0], [0.0, 0.0]]
    assert axes == [0, None]
    for wrong in ([1, 2], [torch.ones(1), None], [(torch.ones(1),), [torch.ones(1)]]):
        with pytest.raises(TypeError, match="draws of"):
            stack_draws(wrong, torch.device("cpu"))


@pytest.mark.parametrize(
    ("lanes", "device", "expected", "name"),
    [
        (None, "cpu", Execution(), "fused"),
        (None, "cuda", Execution(lanes=5), "captured"),
        (0, "cuda", Execution(), "fused"),
        (2, "cpu", Execution(lanes=2), "captured"),
    ],
)
def test_lanes_on_a_gpu_and_one_by_one_on_a_cpu(lanes: int | None, device: str, expected: Execution, name: str) -> None:
    found = resolve_execution(lanes, torch.device(device), draws=False)
    assert (found, found.name) == (expected, name)


def test_where_clients_come_one_at_a_time_there_is_one_lane() -> None:
    """Flower's nodes, and rounds with a deadline: four lanes more would be memory for nobody."""
    assert resolve_execution(None, torch.device("cuda"), draws=False, alone=True) == Execution(lanes=1)
    assert resolve_execution(3, torch.device("cuda"), draws=False, alone=True) == Execution(lanes=3)
    assert resolve_execution(None, torch.device("cpu"), draws=False, alone=True) == Execution()


def test_a_network_that_draws_is_trained_one_by_one() -> None:
    """A captured step would draw the same everywhere, and nobody's seed would have a part in it."""
    assert resolve_execution(None, torch.device("cuda"), draws=True) == Execution()
    with pytest.raises(ScenarioError, match=r"engine.lanes = 2, but the backbone draws in training"):
        resolve_execution(2, torch.device("cpu"), draws=True)


def test_only_tensors_can_be_drawn_in_a_lane(small: Any) -> None:
    """What is not a tensor would be captured as it was for the first client."""
    method = Method(draw=lambda *_: 3, loss=lambda model, _, batch, draws: model(batch.images).sum() * draws)
    training = TrainingSection(epochs=1, batch_size=4)
    recipe = Recipe(method, None, small.first, training, 0.1, noisy)
    lane = Lane(small.network(3), training, None)
    with pytest.raises(TypeError, match="draws are tensors or None"):
        next(lane.train(lane.local.state, recipe, Samples(small.images(4), small.labels(4, small.first)), Key(0)))


def test_a_round_needs_no_more_workers_than_it_has_use_for() -> None:
    assert worker_count(experiment_of({"lanes": 6})) == 1
    assert worker_count(experiment_of({"lanes": 2, "workers": 7})) == 7


def test_each_thread_of_a_worker_has_a_core_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedcil.engines.workers.cpu_count", lambda: 5)
    counts = [worker_count(experiment_of({}, threads=threads)) for threads in (1, 2, 3, 8)]
    assert counts == [5, 2, 1, 1]


def test_workers_are_no_more_than_the_cores_that_a_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not those of the machine. joblib reads affinity, a container's quota and its own variable."""
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "1")
    assert worker_count(experiment_of({})) == 1


def test_threads_of_one_process_share_no_gpu() -> None:
    opened = experiment_of({"workers": 7})
    compute = replace(opened.compute, device=torch.device("cuda"))
    assert worker_count(replace(opened, compute=compute)) == 1


# --- a client's answer ------------------------------------------------------------------------------------


def experiment_of(engine: dict[str, int], model: str = "cnn", **training: Any) -> Experiment:
    """Six clients with 3, 3, 3, 3, 2 and 2 samples of a task."""
    return open_experiment(
        load_scenario(
            {
                "device": "cpu",
                "data": {"name": "synthetic", "classes": 4, "samples_per_class": 8},
                "stream": {"tasks": 2},
                "partition": {"name": "iid"},
                "clients": {"count": 6, "per_round": 6},
                "model": {"name": model, "width": 4},
                "method": {"name": "fedavg"},
                "training": {"epochs": 2, "batch_size": 2, **training},
                "engine": engine,
            }
        )
    )


def answers(
    engine: dict[str, int], folder: Path, clients: tuple[int, ...] = (0, 1, 2, 3, 4, 5), **training: Any
) -> Any:
    experiment = experiment_of(engine, **training)
    broadcast = Broadcast(task=0, phase=0, round=0, tensors=experiment.first_state().server.model)
    jobs = [Job(client, place) for place, client in enumerate(clients)]
    worker = Worker(Shared(experiment, StateStore(folder)))
    return [
        (
            job,
            answer.result,
            (given := answer.contribution) and {name: tensor.clone() for name, tensor in given.tensors.items()},
            given and given.weight,
        )
        for job, answer in do_jobs(Round.of(broadcast, worker), jobs)
    ]


class Rebinding(Backbone):
    """Puts another tensor where a buffer was, as a person's layer may."""

    def __init__(self, channels: int) -> None:
        super().__init__(4)
        self.conv = nn.Conv2d(channels, 4, 3)
        self.register_buffer("level", torch.zeros(4))

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.conv(images).mean((2, 3))
        if self.training:
            self.level = 0.5 * self.level + features.detach().mean(0) + 1
        return features


def rebinding(channels: int, _: object) -> Backbone:
    return Rebinding(channels)


@pytest.mark.parametrize("lanes", [1, 4])
def test_a_buffer_that_a_layer_replaces_is_handed_in_from_a_lane_too(lanes: int, tmp_path: Path) -> None:
    model = f"{__name__}:rebinding"
    one_by_one = answers({"lanes": 0}, tmp_path, model=model)
    found = answers({"lanes": lanes}, tmp_path, model=model)
    for (_, _, tensors, _), (_, _, expected, _) in zip(found, one_by_one, strict=True):
        assert tensors["backbone.level"].abs().min() > 0
        torch.testing.assert_close(tensors["backbone.level"], expected["backbone.level"])


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("lanes", [1, 2, 4, 6])
def test_answers_do_not_depend_on_how_many_are_trained_at_once(lanes: int, tmp_path: Path) -> None:
    exact = {"lr": 2.0**-5, "lr_end": 2.0**-5}  # lanes hold the learning rate in float32
    for one, other in zip(answers({}, tmp_path, **exact), answers({"lanes": lanes}, tmp_path, **exact), strict=True):
        assert (one[0], one[3]) == (other[0], other[3])
        assert isinstance(one[1], Report)
        assert (one[1].samples, one[1].bytes_up, one[1].state) == (
            other[1].samples,
            other[1].bytes_up,
            other[1].state,
        )
        assert other[1].metrics == pytest.approx(one[1].metrics, abs=EQUAL)
        for name, tensor in one[2].items():
            torch.testing.assert_close(other[2][name], tensor, rtol=0, atol=EQUAL)


def test_a_client_that_breaks_takes_no_other_along(tmp_path: Path) -> None:
    """There is no client 99; the others are trained as they would be without it."""
    found = {job.client: (result, state) for job, result, state, _ in answers({"lanes": 3}, tmp_path, (0, 99, 1))}
    assert "IndexError" in found[99][0].reason
    for job, _, state, _ in answers({"lanes": 3}, tmp_path, (0, 1)):
        assert all(torch.equal(found[job.client][1][name], tensor) for name, tensor in state.items())


def test_where_it_cannot_be_clients_are_trained_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("client.handle.local_sgd_in_lanes", lambda *_: 1 / 0)
    with pytest.warns(UserWarning, match="one by one.*ZeroDivisionError"):
        found = answers({"lanes": 3}, tmp_path, (0, 1))
    alone = answers({}, tmp_path, (0,))
    assert all(torch.equal(found[0][2][name], tensor) for name, tensor in alone[0][2].items())


@pytest.mark.parametrize(
    ("error", "tries"),
    [(torch.OutOfMemoryError("full"), 1), (TypeError("draws"), 1), (ZeroDivisionError("a client's"), 2)],
)
def test_lanes_that_cannot_be_had_are_not_tried_again_in_the_task(
    error: Exception, tries: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []

    def refuse(*_: object) -> None:
        tried.append(1)
        raise error

    monkeypatch.setattr("client.handle.local_sgd_in_lanes", refuse)
    with pytest.warns(UserWarning, match="one by one"):
        found = answers({"lanes": 3}, tmp_path)  # six clients: twice three
    assert len(tried) == tries
    assert all(state is not None for _, _, state, _ in found)


def test_when_lanes_are_dropped_nothing_holds_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Least of all the trace of the error: the memory is for who is trained alone next."""
    made: list[weakref.ref[Any]] = []
    left: list[int] = []

    def refuse(lanes: list[Any], *_: object) -> None:
        made.extend(map(weakref.ref, lanes))
        for lane in lanes:
            lane.itself = lane  # as a step that could not be captured
        raise torch.OutOfMemoryError("full")

    def alone(*given: Any, **named: Any) -> Any:
        left.append(sum(lane() is not None for lane in made))
        return local_sgd(*given, **named)

    monkeypatch.setattr("client.handle.local_sgd_in_lanes", refuse)
    monkeypatch.setattr("client.handle.local_sgd", alone)
    with pytest.warns(UserWarning, match="one by one"):
        answers({"lanes": 3}, tmp_path, (0, 1))
    assert len(made) == 3
    assert left == [0, 0]


def test_a_run_in_lanes_goes_on_after_it_was_stopped_in_mid_training(tmp_path: Path) -> None:
    """The lanes are used again, and what the stop left in them reaches nobody."""
    experiment = experiment_of({"lanes": 2})
    broadcast = Broadcast(task=0, phase=0, round=0, tensors=experiment.first_state().server.model)
    calls = iter(range(100))

    def check() -> None:
        if next(calls) == 5:
            raise Stopped("enough")

    worker = Worker(Shared(experiment, StateStore(tmp_path)), check=check)
    with pytest.raises(Stopped):
        list(do_jobs(Round.of(broadcast, worker), [Job(0, 0), Job(1, 1)]))
    worker.check = lambda: None
    expected = answers({"lanes": 2}, tmp_path, (0, 1))
    for place, (_, answer) in enumerate(do_jobs(Round.of(broadcast, worker), [Job(0, 0), Job(1, 1)])):
        gift = answer.contribution
        assert gift is not None
        assert all(torch.equal(gift.tensors[name], tensor) for name, tensor in expected[place][2].items())


def test_each_of_several_clients_fails_for_itself(tmp_path: Path) -> None:
    """At this rate all diverge; without a warning, since training at the same time itself works."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = answers({"lanes": 6}, tmp_path, lr=1e20, lr_end=1e20)
    assert {result.stage for _, result, _, _ in found} == {"training"}
    assert all(given is None for _, _, given, _ in found)


# --- whole runs -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
def test_a_whole_run_in_float64_gives_the_same_accuracies(tmp_path: Path) -> None:
    """Three tasks of digits with MFCL: two boundaries between them."""
    sets = ["stream.tasks=3", "data.classes=6", "training.rounds=3", "method.steps=60", "engine.workers=1"]
    sets += ["training.lr=0.0625", "training.lr_end=0.0625"]  # lanes hold it in float32
    runs = [
        fedcil.run("digits_mfcl", overrides=[*sets, f"engine.lanes={lanes}"], output=tmp_path, figures=False)
        for lanes in (0, 3)
    ]
    one, other = runs
    for mine, theirs in zip(one.kind("round"), other.kind("round"), strict=True):
        assert theirs["losses"] == pytest.approx(mine["losses"], abs=1e-7)
        assert {**mine, "losses": 0, "loss": 0, "cost": 0} == {**theirs, "losses": 0, "loss": 0, "cost": 0}
    assert one.summary["final_accuracy"] == other.summary["final_accuracy"] > 0.3


@pytest.mark.slow
def test_digits_by_the_command_line(tmp_path: Path) -> None:
    """float32: the first task's losses agree to 1e-3; a boundary's 200 steps of Adam then make rounding visible, so
    the accuracies of the run agree as those of two seeds do.
    """
    accuracy, losses = [], []
    for lanes in (0, 5):
        command = ["run", "digits_mfcl", "--set", f"engine.lanes={lanes}", "--set", "engine.workers=1", "--no-figures"]
        command += ["--output", str(tmp_path / str(lanes)), "--json"]
        done = subprocess.run([sys.executable, "-m", "fedcil", *command], capture_output=True, text=True, check=True)
        run = fedcil.load(json.loads(done.stdout)["run_dir"])
        accuracy.append(run.summary["average_incremental_accuracy"])
        losses.append([loss for line in run.kind("round") if line["task"] == 0 for loss in line["losses"]])
        environment = json.loads((run.path / "environment.json").read_text())
        assert environment["numeric_configuration"]["execution"] == {0: "fused", 5: "captured"}[lanes]
    assert losses[1] == pytest.approx(losses[0], abs=1e-3)
    assert accuracy[1] == pytest.approx(accuracy[0], abs=0.06)
    assert min(accuracy) > 0.85
