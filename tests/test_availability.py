"""Who can be reached: everyone, some by chance, or those who answered once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedcil.availability import Availability, make_availability
from fedcil.errors import InputError
from fedcil.keys import Key
from fedcil.scenario import AvailabilitySection

Record = Callable[[str], Availability]


def bernoulli(probability: float, clients: int = 50, seed: int = 0) -> Availability:
    section = AvailabilitySection(name="bernoulli", probability=probability)
    return make_availability(section, clients, Key(seed))


def line(task: int, phase: int, round: int, answered: list[int], **more: Any) -> str:
    entry = {"kind": "round", "task": task, "phase": phase, "round": round, "answered": answered}
    return json.dumps(entry | more)


@pytest.fixture
def record(tmp_path: Path) -> Record:
    """Write a metrics.jsonl and replay it for 5 clients."""

    def replay(text: str) -> Availability:
        path = tmp_path / "metrics.jsonl"
        path.write_text(text, encoding="utf-8")
        return make_availability(AvailabilitySection(name="recorded", file=str(path)), 5, Key(0))

    return replay


def test_always_is_everyone() -> None:
    present = make_availability(AvailabilitySection(), 3, Key(0))
    assert present(0, 0, 0) == present(4, 1, 9) == frozenset({0, 1, 2})


def test_certain_and_impossible() -> None:
    assert bernoulli(1.0, clients=4)(0, 0, 0) == frozenset(range(4))
    assert bernoulli(0.0, clients=4)(0, 0, 0) == frozenset()


def test_the_place_decides_not_the_history() -> None:
    first, second = bernoulli(0.5), bernoulli(0.5)
    for round in range(5):
        first(0, 0, round)
    assert first(2, 1, 3) == second(2, 1, 3)
    assert first(2, 1, 3) != bernoulli(0.5, seed=1)(2, 1, 3)


def test_task_phase_and_round_are_independent() -> None:
    """2 * 2 * 2 places with 50 fair coins each: the chance that any two agree is below 28 / 2**50."""
    present = bernoulli(0.5)
    places = [(task, phase, round) for task in (0, 1) for phase in (0, 1) for round in (0, 1)]
    assert len({present(*place) for place in places}) == len(places)


def test_the_rate_is_the_probability() -> None:
    """20,000 coins of 0.3: deviation sqrt(0.3 * 0.7 / 20000) = 0.0032; of one client in 400 rounds 0.023."""
    present = bernoulli(0.3)
    seen = np.array([[client in present(0, 0, round) for client in range(50)] for round in range(400)])
    assert seen.mean() == pytest.approx(0.3, abs=0.013)
    assert np.abs(seen.mean(axis=0) - 0.3).max() < 0.1


def test_clients_are_plain_numbers() -> None:
    """They become keys and JSON, where a NumPy number is something else."""
    assert {type(client) for client in bernoulli(0.5)(0, 0, 0)} == {int}


def test_a_record_is_replayed(record: Record) -> None:
    lines = [
        line(0, 0, 0, [3, 1], loss=0.5),
        json.dumps({"kind": "task", "task": 0, "accuracy": [0.5]}),
        line(0, 0, 1, []),
        line(1, 1, 0, [4]),
    ]
    present = record("\n".join(lines) + "\n")
    assert present(0, 0, 0) == frozenset({1, 3})
    assert present(0, 0, 1) == frozenset()
    assert present(1, 1, 0) == frozenset({4})


def test_a_round_that_is_not_recorded(record: Record) -> None:
    present = record(line(0, 0, 0, [1]))
    with pytest.raises(InputError, match="task 0, phase 0, round 7 was not recorded") as caught:
        present(0, 0, 7)
    assert caught.value.where.endswith("metrics.jsonl")
    assert "training.rounds" in caught.value.next


BROKEN = {
    '{"kind": "round", "task"': "not JSON",
    "[1, 2]": "not a JSON object",
    '{"kind": "round", "task": 0, "round": 0, "answered": []}': "must be whole numbers",
    '{"kind": "round", "task": 0, "phase": "train", "round": 0, "answered": []}': "must be whole numbers",
    '{"kind": "round", "task": 0, "phase": 0, "round": 0}': "answered a list",
    '{"kind": "round", "task": 0, "phase": 0, "round": 0, "answered": [true]}': "answered a list",
    '{"kind": "round", "task": 0, "phase": 0, "round": 0, "answered": [-1]}': "answered a list",
    line(0, 0, 0, [5]): "client 5 answered, but clients.count = 5",
    line(9, 0, 0, [0]): "for the second time",
}


@pytest.mark.parametrize("text", BROKEN)
def test_a_broken_line_is_named(record: Record, text: str) -> None:
    with pytest.raises(InputError, match=BROKEN[text]) as caught:
        record(line(9, 0, 0, [0]) + "\n" + text + "\n")
    assert caught.value.where.endswith("metrics.jsonl:2")
    assert "finished run" in caught.value.next


def test_a_file_without_rounds(record: Record) -> None:
    with pytest.raises(InputError, match="has no rounds"):
        record("")


def test_a_file_that_is_not_there_or_not_text(tmp_path: Path) -> None:
    for content, name in ((None, "nothing.jsonl"), (b"\xff\xfe\x00", "binary.jsonl")):
        path = tmp_path / name
        if content:
            path.write_bytes(content)
        with pytest.raises(InputError, match="cannot be read") as caught:
            make_availability(AvailabilitySection(name="recorded", file=str(path)), 5, Key(0))
        assert caught.value.where == str(path)
