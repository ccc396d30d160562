"""A worker's share of a GPU: the arithmetic, and the step that is measured, without a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedcil.engines.gpu import (
    CONTEXT_BYTES,
    PRECISION,
    gpus_per_worker,
    largest_step,
    measured_peak,
    share,
    worker_bytes,
)
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
    assert share(need, usable, wanted) == expected


@given(st.integers(1, 10**12), st.integers(-(10**12), 10**12), st.integers(1, 500))
def test_shares_never_ask_for_more_memory_or_more_gpus_than_there_are(need: int, usable: int, wanted: int) -> None:
    """Workers as Ray counts them, in ten-thousandths of a GPU."""
    workers = PRECISION // round(PRECISION * share(need, usable, wanted))
    assert workers * share(need, usable, wanted) <= 1.0
    assert workers == 1 or workers * need <= usable


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


def test_on_a_cpu_nothing_is_measured_and_nothing_asked_for() -> None:
    assert gpus_per_worker(experiment_of(), workers=2) == 0.0


def test_what_the_scenario_says_is_taken() -> None:
    given_ = experiment_of(device="auto", engine={"gpus_per_worker": 0.25})
    assert gpus_per_worker(given_, workers=2) == 0.25


def test_the_largest_step_has_real_and_synthetic_images_of_each_client_of_the_lanes() -> None:
    assert largest_step(experiment_of()) == 28
    assert largest_step(experiment_of(engine={"lanes": 3})) == 84


def test_a_worker_holds_images_models_payload_and_pool() -> None:
    """Each of them, and the step, with the allocator's margin."""
    plain = worker_bytes(experiment_of(), 0)
    assert plain > CONTEXT_BYTES
    assert worker_bytes(experiment_of(), 4_000) - plain == 5_000
    without = experiment_of().scenario.method.model_copy(update={"pool": 0})
    image = 4 * torch.Size(experiment_of().compute.architecture.image).numel()
    assert plain - worker_bytes(experiment_of(method=without), 0) == pytest.approx(1.25 * 64 * image, abs=1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: nothing to measure")
def test_the_peak_is_that_of_the_step() -> None:
    found = experiment_of(device="cuda")
    assert measured_peak(found) > 0
    assert 0 < gpus_per_worker(found, workers=2) <= 0.5
