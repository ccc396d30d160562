"""Runs on a GPU that is played (played_card): the same results as on a CPU, nothing that waits for the device in a
step, no stream that works on what another has not finished, and no more memory than was asked for.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from played_card import Card, played_card

import fedcil
from client.handle import handle
from client.states import StateStore
from client.worker import Shared, Worker
from fedcil.engines import gpu
from fedcil.experiment import open_experiment
from fedcil.messages import Broadcast, Job, Payload, Request
from fedcil.methods import METHODS
from fedcil.methods.afcl import projection
from fedcil.scenario_file import load_scenario
from fedcil.tensors import moved
from scenarios.benchmarks.ladder import EQUAL, differ
from scenarios.benchmarks.material import TINY as TINY_WORK
from scenarios.benchmarks.material import Material
from scenarios.benchmarks.rungs import RUNGS
from server import evaluation
from server.boundary import cross

pytestmark = [
    pytest.mark.skipif("FEDCIL_TEST_GPU" in os.environ, reason="torch has a GPU of its own"),
    pytest.mark.usefixtures("one_thread"),
]

TINY = str(Path(__file__).with_name("tiny.toml"))
MFCL = "name='mfcl', preset='small', steps=5, pool=64"
FRESH = "name='mfcl', preset='paper', steps=5, synthetic=16, generator_width=8"
ALL = [MFCL, FRESH, *(f"name='{name}'" for name in METHODS if name != "mfcl")]
RESNET = "model={name='resnet18', width=8}"
CPU = torch.device("cpu")


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@contextmanager
def a_card(memory: int = 1 << 40) -> Iterator[Card]:
    """On which nothing goes wrong, and from which nothing stays."""
    projection.cache_clear()
    with pytest.MonkeyPatch().context() as monkeypatch, played_card(monkeypatch, memory) as card:
        yield card
        assert not card.races, "\n".join(card.races[:3])
        projection.cache_clear()


def overrides(device: str, method: str, lanes: int, *more: str) -> list[str]:
    return [f"device='{device}'", f"method={{{method}}}", f"engine.lanes={lanes}", *more]


def run(folder: Path, *words: Any) -> fedcil.Run:
    return fedcil.run(TINY, overrides=overrides(*words), output=folder, figures=False)


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("lanes", [0, 2])
@pytest.mark.parametrize("method", ALL)
def test_a_run_gives_what_it_gives_on_a_cpu(method: str, lanes: int, precision: str, tmp_path: Path) -> None:
    """Step by step as by captured graphs, to the last bit: the arithmetic is the same CPU's."""
    words = (method, lanes, f"training.precision='{precision}'")
    with a_card():
        found = run(tmp_path, "cuda", *words)
    assert found.scenario.device == "cuda"
    assert found.results == run(tmp_path, "cpu", *words).results


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", ["merged", "lane", "lanes3"])
def test_a_captured_round_gives_the_weights_of_the_authors_order(name: str) -> None:
    with a_card():
        material = Material(TINY_WORK, "fp32", torch.device("cuda"))
        found, expected = (RUNGS[each].open(material)() for each in (name, "authors"))
        assert differ(found, expected, material.start) <= EQUAL


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module of a person's own."""
    (tmp_path / f"own_{tmp_path.name}.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    return f"own_{tmp_path.name}"


def test_layers_that_draw_draw_from_the_cards_generator(tmp_path: Path) -> None:
    """What a client draws does not follow what was drawn on the card before."""
    found = []
    for seed in (1, 2):
        with a_card() as card:
            card.draws.manual_seed(seed)
            found.append(run(tmp_path, "cuda", "name='fedavg'", 0, "model.name='dropping:build'").results)
    assert found[0] == found[1]


def test_a_step_that_waits_is_launched_kernel_by_kernel(own: str, tmp_path: Path) -> None:
    words = (f"name='{own}:Waiting'", 2)
    with a_card(), pytest.warns(UserWarning, match="a step cannot be captured and is launched kernel by kernel"):
        found = run(tmp_path, "cuda", *words)
    assert found.results == run(tmp_path, "cpu", *words).results


def test_a_client_that_breaks_takes_no_other_of_its_lanes_along(own: str, tmp_path: Path) -> None:
    words = (f"name='{own}:Breaking'", 4, "clients.per_round=4", f"partition={{name='{own}:share'}}")
    with a_card(), pytest.warns(UserWarning, match="one by one, not in lanes"):
        found = run(tmp_path, "cuda", *words)
    assert [line["answered"] for line in found.kind("round")] == [[0, 1, 2]] * 4
    with pytest.warns(UserWarning, match="one by one, not in lanes"):
        assert found.results == run(tmp_path, "cpu", *words).results


MODULE = """
import numpy as np
from torch.nn import functional as F
from fedcil.methods.base import Method
from fedcil.methods.settings import MethodSettings


class Waiting(MethodSettings):
    def build(self):
        return Method(loss=waiting)


def waiting(model, prepared, batch, draws):
    loss = F.cross_entropy(model(batch.images), batch.labels)
    return loss * 2 if loss.item() > 1 else loss


class Breaking(MethodSettings):
    def build(self):
        return Method(loss=breaking)


def breaking(model, prepared, batch, draws):
    if len(batch.labels) == 22:
        raise ValueError("what client 3 alone has")
    return F.cross_entropy(model(batch.images), batch.labels)


def share(labels, clients, section, rng):
    return np.split(np.arange(len(labels)), [6, 12, 18])
"""


@pytest.mark.parametrize("lanes", [0, 2])
@pytest.mark.parametrize(
    ("method", "augment"),
    [
        (MFCL, "crop_flip"),
        (FRESH, "rotate_flip"),
        ("name='fedlwf'", "crop_flip"),
        ("name='fedprox', mu=0.1", "rotate_flip"),
    ],
)
def test_a_step_waits_for_nothing_and_sends_no_image(augment: str, method: str, lanes: int, tmp_path: Path) -> None:
    """Three epochs wait as often as one. What they send more is an order, corners and flips: 8 x 8 x 3 bytes a sample
    would be its image.
    """
    waits, sent = [], []
    for epochs in (1, 3):
        with a_card() as card:
            run(tmp_path, "cuda", method, lanes, f"training.epochs={epochs}", f"data.augment='{augment}'")
        waits.append(dict(card.waits))
        sent.append(card.sent)
    assert waits[0] == waits[1]
    samples = 2 * 2 * 2 * 2 * 10  # of the two epochs more: tasks, rounds, clients, samples of each
    assert 0 < sent[1] - sent[0] < samples * 8 * 8 * 3


def test_rounds_wait_a_few_times_for_each_client(tmp_path: Path) -> None:
    """For its samples, its loss, and whether its weights are finite."""
    waits = []
    for count in (2, 4):
        with a_card() as card:
            run(tmp_path, "cuda", "name='fedavg'", 0, f"clients.per_round={count}")
        waits.append(card.waits.total())
    rounds, more = 4, 2
    assert waits[1] - waits[0] == 3 * rounds * more


def test_lanes_replay_each_step_once(tmp_path: Path) -> None:
    """Of the generator, too: a task but the last ends with five steps."""
    with a_card() as card:
        found = run(tmp_path, "cuda", MFCL, 2, "training.batch_size=4", "training.epochs=2")
    steps = sum(2 * 3 * len(line["answered"]) for line in found.kind("round"))  # 10 samples: 4, 4 and 2
    assert card.replays == steps + 5


def test_lanes_that_do_not_fit_give_way(tmp_path: Path) -> None:
    words = ("name='fedlwf'", 0, RESNET, "clients.per_round=4")
    with a_card() as card:
        alone = run(tmp_path, "cuda", *words)
    with a_card(int(1.05 * card.peak)), pytest.warns(UserWarning, match=r"one by one, not in lanes .*out of memory"):
        lanes = run(tmp_path, "cuda", *words, "engine.lanes=4")
    assert lanes.results == alone.results


def test_an_evaluation_waits_as_often_for_one_batch_as_for_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = []
    for batch in (1000, 3):
        monkeypatch.setattr(evaluation, "BATCH", batch)
        with a_card() as card:
            run(tmp_path, "cuda", "name='fedavg'", 0)
        waits.append(card.waits)
    assert waits[0] == waits[1]


@pytest.mark.parametrize("lanes", [0, 2])
def test_a_run_that_was_stopped_goes_on(lanes: int, stopped_run: Callable[..., Path], tmp_path: Path) -> None:
    with a_card():
        folder = stopped_run(TINY, 3, tmp_path / "stopped", overrides("cuda", MFCL, lanes))
    with a_card():
        assert fedcil.resume(folder, figures=False).results == run(tmp_path, "cuda", MFCL, lanes).results


@pytest.mark.parametrize("model", ["model={name='cnn', width=16}", RESNET])
@pytest.mark.parametrize("lanes", [0, 4])
@pytest.mark.parametrize("method", [MFCL, FRESH, "name='fedavg'", "name='fedlwf'"])
def test_a_worker_holds_no_more_than_it_asks_for(method: str, lanes: int, model: str, tmp_path: Path) -> None:
    """Whatever CUDA takes for itself comes to it: a fixed part of what is asked for."""
    words = overrides("cuda", method, lanes, model, "clients.per_round=4", "training.momentum=0.9")
    with a_card() as card:
        experiment = open_experiment(load_scenario(TINY, words))
        asked = gpu.worker_bytes(experiment, gpu.measured_peak(experiment)) - gpu.CONTEXT_BYTES
        state, _ = cross(experiment.first_state().server, experiment.stream.tasks[0], experiment, lambda *_: None)
        payload = state.payload and Payload(moved(state.payload.tensors, CPU), state.payload.hash)
        broadcast = Broadcast(task=1, phase=0, round=0, tensors=moved(state.model, CPU), payload=payload)
        del state
        gc.collect()
        assert card.used == 0
        card.peak = 0
        worker = Worker(Shared(experiment, StateStore(tmp_path)))
        reply = handle(Request(broadcast, tuple(Job(client, client) for client in range(4)), cohort=4), worker)
    assert len(reply.reports) == 4
    assert card.peak <= asked <= 8 * card.peak
