"""One table of methods, one list of properties that all must have. A new method joins by one line."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fedcil
from fedcil.methods import METHODS
from fedcil.record.run import Run
from fedcil.stream import Task

# method -> (settings that make it quick, and for each of its settings another value that must matter)
SMALL_MFCL = {"preset": "small", "steps": 3, "pool": 16, "latent": 8, "generator_width": 8, "generator_batch": 8}
TABLE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "fedavg": ({}, {"loss_slice": "new"}),
    "fedprox": ({"mu": 0.1}, {"mu": 1.0}),
    "oracle": ({}, {}),
    "fedlwf": ({}, {"kd_weight": 3.0, "temperature": 4.0}),
    "feder": ({"memory": 6}, {"memory": 12, "kd_weight": 0.5, "temperature": 4.0}),
    "afcl": ({"expansion": 16}, {"backbone": "task1", "expansion": 24, "gamma": 100.0}),
    "mfcl": (
        SMALL_MFCL,
        {
            "synthetic_ratio": 2.0,
            "pool": 0,
            "bn_updates": 2,
            "w_ce": 0.5,
            "w_ft": 0.5,
            "w_kd": 1.0,
            "latent": 9,
            "generator_width": 10,
            "upsamplings": 1,
            "steps": 4,
            "generator_batch": 9,
            "generator_lr": 0.05,
            "continue_generator": False,
            "temperature": 5.0,
            "entropy": "plain",
            "w_label": 3.0,
            "w_ie": 1.0,
            "w_bn": 1.0,
            "w_prior": 1.0,
            "w_act": 1.0,
        },
    ),
}
Base = Callable[[str], Run]
STATELESS = [name for name in TABLE if name not in ("feder", "oracle")]  # oracle keeps all data by definition


def scenario(method: str, **settings: Any) -> dict[str, Any]:
    """Three tasks of two classes over six clients: the smallest run in which everything happens."""
    return {
        "name": method,
        "data": {"name": "synthetic", "classes": 6, "samples_per_class": 24, "test_per_class": 10},
        "stream": {"tasks": 3},
        "partition": {"name": "iid"},
        "clients": {"count": 6, "per_round": 3},
        "model": {"name": "cnn", "width": 4},
        "method": {"name": method, **TABLE[method][0], **settings},
        "training": {"rounds": 2, "epochs": 1, "batch_size": 4, "lr": 0.05},
        "engine": {"workers": 1},
    }


def run(plain: dict[str, Any], output: Path, *overrides: str) -> Run:
    return fedcil.run(plain, overrides=overrides, output=output, figures=False)


def final_state(finished: Run) -> dict[str, str]:
    """Content hashes of the last checkpoint's tensors: every bit of the final server state."""
    states = sorted((finished.path / "checkpoints").glob("state-*.json"), key=lambda path: int(path.stem[6:]))
    tensors: dict[str, str] = json.loads(states[-1].read_text())["tensors"]
    return tensors


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """The uninterrupted run of a method with one worker, made once."""
    return lru_cache(lambda method: run(scenario(method), tmp_path_factory.mktemp(method)))


def test_the_table_is_the_table() -> None:
    assert TABLE.keys() == METHODS.keys()


@pytest.mark.parametrize("method", TABLE)
def test_same_seed_same_bits_for_any_number_of_workers(method: str, base: Base, tmp_path: Path) -> None:
    one = base(method)
    two = run(scenario(method), tmp_path, "engine.workers=2")
    assert one.results == two.results
    assert final_state(one) == final_state(two)


@pytest.mark.parametrize("method", TABLE)
def test_another_seed_is_another_run(method: str, base: Base, tmp_path: Path) -> None:
    assert final_state(base(method)) != final_state(run(scenario(method), tmp_path, "seed=1"))


@pytest.mark.parametrize("method", TABLE)
@pytest.mark.parametrize("lines", [1, 3, 4, 7])  # 3: between a task and its boundary
def test_a_stopped_run_resumes_to_the_same_bits(
    method: str, lines: int, base: Base, stopped_run: Any, tmp_path: Path
) -> None:
    whole = base(method)
    folder = stopped_run(scenario(method), lines, tmp_path)
    resumed = fedcil.resume(folder, figures=False)
    assert resumed.results == whole.results
    assert final_state(resumed) == final_state(whole)


@pytest.mark.parametrize("method", TABLE)
def test_drop_outs_and_empty_rounds_are_survived(method: str, tmp_path: Path) -> None:
    plain = scenario(method) | {"availability": {"name": "bernoulli", "probability": 0.25}}
    plain["training"] = plain["training"] | {"rounds": 6}
    finished = run(plain, tmp_path, "server.patience=100")
    statuses = {line["status"] for line in finished.kind("round")}
    assert statuses <= {"ok", "empty"}
    assert method == "afcl" or statuses == {"ok", "empty"}  # afcl has one round per task
    assert 0.0 <= finished.summary["final_accuracy"] <= 1.0


@pytest.mark.parametrize(
    ("method", "setting"), [(method, setting) for method, (_, others) in TABLE.items() for setting in others]
)
def test_each_setting_changes_the_result(method: str, setting: str, base: Base, tmp_path: Path) -> None:
    changed = run(scenario(method, **{setting: TABLE[method][1][setting]}), tmp_path)
    assert final_state(base(method)) != final_state(changed)


def test_every_setting_of_every_method_is_tried() -> None:
    for method, (_, others) in TABLE.items():
        fields = type(fedcil.load_scenario(scenario(method)).method).model_fields
        untried = set(fields) - {"name", "preset"} - set(others)
        assert untried <= {"synthetic"}, f"{method}: {untried}"  # excludes synthetic_ratio, which is tried


@pytest.mark.parametrize("method", TABLE)
def test_no_global_generator_is_touched(method: str, tmp_path: Path) -> None:
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state(), random.getstate()
    run(scenario(method), tmp_path)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert str(np.random.get_state()) == str(numpy_state)
    assert random.getstate() == python_state


@pytest.mark.parametrize("method", STATELESS)
def test_stateless_methods_leave_nothing_on_clients(method: str, base: Base) -> None:
    """Who is there in a later task need not have been there before: full turnover is the same experiment."""
    finished = base(method)
    assert all(line["client_state_bytes"] == 0 for line in finished.kind("round"))
    assert not (finished.path / "client_states").exists()


@pytest.mark.parametrize("method", STATELESS)
def test_stateless_methods_survive_full_turnover(method: str, tmp_path: Path) -> None:
    """Clients 0-2 are there in task 1, 3-5 in task 2, 0-2 again in task 3."""
    there = [[0, 1, 2], [3, 4, 5], [0, 1, 2]]
    phases = fedcil.load_scenario(scenario(method)).method.build().phases
    lines = []
    for task, clients in enumerate(there):
        for index, phase in enumerate(phases(Task(task, 2 * task, 2 * task + 2), 2)):
            lines += [
                {"kind": "round", "task": task, "phase": index, "round": r, "answered": clients}
                for r in range(phase.rounds)
            ]
    record = tmp_path / "who.jsonl"
    record.write_text("".join(json.dumps(line) + "\n" for line in lines))
    plain = scenario(method) | {"availability": {"name": "recorded", "file": str(record)}}
    finished = run(plain, tmp_path)
    assert all(line["status"] == "ok" and not line["failures"] for line in finished.kind("round"))
    assert next(line["answered"] for line in finished.kind("round") if line["task"] == 1) == [3, 4, 5]
