"""A worker's share of a GPU: the arithmetic, and the step that is measured, without a GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedcil.engines import gpu, workers
from fedcil.engines.gpu import (
    CONTEXT_BYTES,
    PRECISION,
    even,
    gpus_per_worker,
    largest_step,
    measured_peak,
    share_of_gpu,
    worker_bytes,
)
from fedcil.engines.ray_room import room_on
from fedcil.engines.workers import WorkerShare, worker_count
from fedcil.experiment import Experiment, open_experiment
from fedcil.scenario_file import load_scenario


@pytest.mark.parametrize(
    ("need", "usable", "wanted", "expected"),
    [
        (10, 80, 8, 0.125),
        (10, 80, 5, 0.2),  # more would have nothing to do
        (10, 39, 8, 0.3333),  # three fit
        (10, 9, 8, 1.0),  # not one fits: a GPU of its own is the best there is
        (10, -5, 8, 1.0),
    ],
)
def test_the_share_is_one_over_the_workers_that_fit(need: int, usable: int, wanted: int, expected: float) -> None:
    assert share_of_gpu(need, usable, wanted) == expected


@given(st.integers(1, 10**12), st.integers(-(10**12), 10**12), st.integers(1, 500))
def test_shares_never_ask_for_more_memory_or_more_gpus_than_there_are(need: int, usable: int, wanted: int) -> None:
    """Workers as Ray counts them, in ten-thousandths of a GPU."""
    count = PRECISION // round(PRECISION * share_of_gpu(need, usable, wanted))
    assert count * share_of_gpu(need, usable, wanted) <= 1.0
    assert count == 1 or count * need <= usable


def experiment_of(**sections: dict[str, Any]) -> Experiment:
    scenario: dict[str, Any] = {
        "device": "cpu",
        "data": {"name": "synthetic", "classes": 4, "samples_per_class": 12},
        "stream": {"tasks": 2},
        "clients": {"count": 3, "per_round": 2},
        "model": {"name": "cnn", "width": 4},
        "method": {
            "name": "mfcl",
            "synthetic": 20,
            "generator_batch": 5,
            "latent": 4,
            "generator_width": 4,
            "pool": 64,
        },
        "training": {"batch_size": 8},
    }
    return open_experiment(load_scenario(scenario | sections))


def on_a_gpu(experiment: Experiment) -> Experiment:
    """Which computes nothing there."""
    return replace(experiment, compute=replace(experiment.compute, device=torch.device("cuda")))


def test_on_a_cpu_nothing_is_measured_and_nothing_asked_for() -> None:
    assert gpus_per_worker(experiment_of(), workers=2) == 0.0


def test_what_the_scenario_says_is_taken() -> None:
    given_ = experiment_of(device="auto", engine={"gpus_per_worker": 0.25})
    assert gpus_per_worker(given_, workers=2) == 0.25


def test_the_largest_step_has_real_and_synthetic_images_of_each_client_of_the_lanes() -> None:
    assert largest_step(experiment_of()) == 28
    assert largest_step(experiment_of(engine={"lanes": 3})) == 84


def test_a_boundary_that_takes_more_is_the_largest_step() -> None:
    settings = experiment_of().scenario.method.model_copy(update={"generator_batch": 100})
    assert largest_step(experiment_of(method=settings)) == 200


def test_a_step_that_does_not_fit_leaves_a_whole_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where not even that is enough, clients are trained one by one."""

    def out_of_memory(_: Experiment) -> int:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(gpu, "measured_peak", out_of_memory)
    assert gpus_per_worker(on_a_gpu(experiment_of()), workers=4) == 1.0


@pytest.mark.parametrize("parts", range(1, 120))
def test_flower_makes_as_many_workers_as_ray_has_room_for(parts: int) -> None:
    """Flower divides all GPUs of a node by the share; Ray puts a share on one of them."""
    for given_ in (1 / parts, 1 / parts - 0.3 * (1 / parts - 1 / (parts + 1))):
        found = even(given_)
        assert 0 < found < 1 or parts == 1
        assert 1 / found <= 1.2 * parts
        for gpus in range(1, 17):
            assert int(gpus / found) == room_on({"CPU": 10_000, "GPU": gpus}, WorkerShare(1, found)), (gpus, found)


def test_no_gpu_is_without_work_where_one_workers_lanes_would_take_it_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(workers, "cpu_count", lambda: 16)
    lanes = experiment_of(engine={"name": "ray", "lanes": 5})
    assert (worker_count(lanes), worker_count(on_a_gpu(lanes))) == (1, 2)


def test_a_worker_holds_images_models_payload_and_pool() -> None:
    """Each of them, and the step, with the allocator's margin."""
    plain = worker_bytes(experiment_of(), 0)
    assert plain > CONTEXT_BYTES
    assert worker_bytes(experiment_of(), 4_000) - plain == 5_000
    without = experiment_of().scenario.method.model_copy(update={"pool": 0})
    image = 4 * torch.Size(experiment_of().compute.architecture.image).numel()
    assert plain - worker_bytes(experiment_of(method=without), 0) == pytest.approx(1.25 * 64 * image, abs=1)


@pytest.mark.gpu
def test_the_peak_is_that_of_the_step() -> None:
    found = experiment_of(device="cuda")
    assert measured_peak(found) > 0
    assert 0 < gpus_per_worker(found, workers=2) <= 0.5
