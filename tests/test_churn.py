"""A federation in which nearly everyone is replaced within three rounds: nothing fails, nothing of leavers is left."""

from __future__ import annotations

import gc
import json
import weakref
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

import fedcil
from client.states import StateStore
from fedcil.experiment import open_experiment
from fedcil.record.run import Run
from fedcil.scenario_file import load_scenario
from fedcil.tensors import Tensors
from scenarios.reliability import churn
from scenarios.reliability.churn import MEMBERS, TASKS

ROUNDS = 4
METHODS: dict[str, dict[str, Any]] = {
    "fedavg": {},
    "fedprox": {},
    "oracle": {},
    "fedlwf": {},
    "feder": {"memory": 4},
    "afcl": {"expansion": 8},
    "mfcl": {"preset": "small", "steps": 2, "pool": 16, "latent": 8, "generator_width": 8, "generator_batch": 8},
}


DATA = {"name": "synthetic", "classes": 10, "image_size": 4, "test_per_class": 5}


def scenario(method: str, seed: int = 0) -> dict[str, Any]:
    return churn.scenario({"name": method, **METHODS[method]}, seed, ROUNDS)


@pytest.fixture
def kept_alive(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[Tensor]]:
    """Weak references to everything that clients stored or read back in this process."""
    seen: list[weakref.ref[Tensor]] = []

    class Watched(StateStore):
        def save(self, tensors: Tensors) -> str:
            seen.extend(map(weakref.ref, tensors.values()))
            return super().save(tensors)

        def load(self, name: str) -> Tensors:
            tensors = super().load(name)
            seen.extend(map(weakref.ref, tensors.values()))
            return tensors

    monkeypatch.setattr("fedcil.engines.inline.StateStore", Watched)
    return seen


def assert_memory_leaves(finished: Run) -> None:
    """FedER's memory is that of at most the members, though 1340 clients came by, and falls as they leave."""
    image = 4 * 4 * 3 + 8  # 4 x 4 pixels in three colours, and a label
    remembered = [line["client_state_bytes"] for line in finished.kind("round") if line["phase_name"] == "remember"]
    assert len(remembered) == TASKS
    assert all(0 < size <= MEMBERS * 4 * image for size in remembered)
    by_round = [line["client_state_bytes"] for line in finished.kind("round") if line["task"] == 1]
    assert all(after < before for before, after in pairwise(by_round[: ROUNDS - 1]))


@pytest.mark.parametrize("method", METHODS)
def test_nothing_fails_and_nothing_is_left(method: str, tmp_path: Path, kept_alive: list[weakref.ref[Tensor]]) -> None:
    finished = fedcil.run(scenario(method), output=tmp_path, figures=False)
    assert list(churn.problems(finished)) == []
    gc.collect()
    assert bool(kept_alive) == (method == "feder")
    assert not any(reference() is not None for reference in kept_alive)
    assert bool(churn.named_states(finished)) == (method == "feder")
    if method == "feder":
        assert_memory_leaves(finished)


@pytest.mark.parametrize("method", METHODS)
def test_growing_groups_run_with_every_method(method: str, tmp_path: Path) -> None:
    """A third stays behind at each boundary; they are asked by methods that can use what they have, and by no other."""
    growing = {
        "population": {"name": "growing", "size": 12, "newcomers": 4, "move_on": 0.67},
        "clients": {"count": 12 + 4 * (TASKS - 1), "per_round": 10},
        "data": DATA | {"samples_per_class": 60},
    }
    finished = fedcil.run(scenario(method) | growing, output=tmp_path, figures=False)
    opened = open_experiment(load_scenario(finished.path / "scenario.toml"))
    stayed = 0
    for line in finished.kind("round"):
        assert line["status"] == "ok"
        assert line["failures"] == []
        assert max(line["cohort"]) < 12 + 4 * line["task"]
        stayed += opened.population.behind[line["task"]][line["cohort"]].sum()
    assert bool(stayed) == (method in ("fedavg", "fedprox", "oracle", "feder"))


def test_full_turnover_makes_oracle_fedavg(tmp_path: Path) -> None:
    """All data "so far" of clients who were never here before are the data of this task."""
    everyone = {"population": {"name": "turnover", "size": 20, "replaced_per_task": 1.0}, "clients": {"count": 100}}
    everyone["data"] = DATA | {"samples_per_class": 100}
    results = []
    for method in ("fedavg", "oracle"):
        results.append(fedcil.run(scenario(method) | everyone, output=tmp_path, figures=False).results)
    assert results[0] == results[1]


def test_an_oracle_loses_the_data_of_those_who_leave(tmp_path: Path) -> None:
    """Half of them are replaced: what the others had so far is still there, what the leavers had is not."""
    half = {"population": {"name": "turnover", "size": 20, "replaced_per_task": 0.5}, "clients": {"count": 60}}
    opened = open_experiment(load_scenario(scenario("oracle") | half))
    task = opened.stream.tasks[1]
    there = opened.population.present(opened.timeline.span(1).start)
    first, second = (opened.partition[t].counts() for t in (0, 1))
    held = opened.counts_at(task, opened.timeline.span(1).start)
    assert np.array_equal(held, np.where(there, first + second, 0))
    assert 0 < first[there].sum() < first.sum()


def test_what_the_trial_of_churn_would_find(tmp_path: Path) -> None:
    """A failure, a client that was no member, an owner who has left, and a file that nobody needs."""
    finished = fedcil.run(scenario("feder"), output=tmp_path, figures=False)
    state = max((finished.path / "checkpoints").glob("state-*.json"))
    checkpoint = json.loads(state.read_text())
    state.write_text(json.dumps(checkpoint | {"holders": [*checkpoint["holders"], 0]}))  # of the first members
    (finished.path / "client_states" / "left.safetensors").write_bytes(b"")
    lines = (finished.path / "metrics.jsonl").read_text().splitlines()
    rounds = [number for number, line in enumerate(lines) if json.loads(line)["kind"] == "round"]
    failed, stranger = (json.loads(lines[number]) for number in rounds[:2])
    lines[rounds[0]] = json.dumps(failed | {"failures": [{"client": failed["cohort"][0], "reason": "tired"}]})
    nobody = [MEMBERS + 60 * (TASKS * ROUNDS - 1) - 1]
    lines[rounds[1]] = json.dumps(stranger | {"cohort": nobody, "answered": nobody})
    (finished.path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    found = list(churn.problems(fedcil.load(finished.path)))
    assert [line.split(":")[0] for line in found] == [
        "task 0, round 0",
        "task 0, round 1",
        "a checkpoint knows clients that have left",
        "client states on the disk are not those that the checkpoints name",
    ]
