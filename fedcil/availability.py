"""Who can be reached in a round: a pure function of the place in the run, so a resumed run sees the same.

``recorded`` replays the clients that answered in an earlier run, from its ``metrics.jsonl``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedcil.errors import InputError

if TYPE_CHECKING:
    from fedcil.keys import Key
    from fedcil.scenario import AvailabilitySection

Clients = frozenset[int]
Place = tuple[int, int, int]  # task, phase, round
Availability = Callable[[int, int, int], Clients]


def make_availability(section: AvailabilitySection, clients: int, key: Key) -> Availability:
    """A function (task, phase, round) -> the clients of 0..clients - 1 that can be reached then.

    Raises InputError if a recorded file is missing or broken; the function made from one raises InputError
    for a round that is not in it.
    """
    if section.name == "bernoulli":
        return _bernoulli(section.probability, clients, key)
    if section.file is not None:
        return _recorded(Path(section.file), clients)
    everyone = frozenset(range(clients))
    return lambda *_: everyone


def _bernoulli(probability: float, clients: int, key: Key) -> Availability:
    def present(task: int, phase: int, round: int) -> Clients:
        draws = key.at("availability", task, phase, round).numpy().random(clients)
        return frozenset(np.flatnonzero(draws < probability).tolist())

    return present


def _recorded(path: Path, clients: int) -> Availability:
    answered = _read_rounds(path, clients)

    def present(task: int, phase: int, round: int) -> Clients:
        if (task, phase, round) not in answered:
            raise InputError(
                f"task {task}, phase {phase}, round {round} was not recorded",
                where=str(path),
                allowed="a record with every round of this scenario",
                next="record a run with the same stream, method and training.rounds, run to its end",
            )
        return answered[task, phase, round]

    return present


def _read_rounds(path: Path, clients: int) -> dict[Place, Clients]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise _broken(path, f"cannot be read: {error}") from None
    rounds: dict[Place, Clients] = {}
    for number, line in enumerate(lines, start=1):
        place, answered = _read_line(line, f"{path}:{number}", clients)
        if place in rounds:
            raise _broken(f"{path}:{number}", f"task, phase, round = {place} stands here for the second time")
        if place is not None:
            rounds[place] = answered
    if not rounds:
        raise _broken(path, "has no rounds")
    return rounds


def _read_line(line: str, where: str, clients: int) -> tuple[Place | None, Clients]:
    """Place and clients of a round's line; None for lines of another kind."""
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise _broken(where, f"not JSON: {error}") from None
    if not isinstance(entry, dict):
        raise _broken(where, "not a JSON object")
    if entry.get("kind") != "round":
        return None, frozenset()
    place: Any = (entry.get("task"), entry.get("phase"), entry.get("round"))
    answered = entry.get("answered")
    if not _all_whole(place) or not isinstance(answered, list) or not _all_whole(answered):
        raise _broken(where, "task, phase and round must be whole numbers, and answered a list of them")
    if answered and max(answered) >= clients:
        raise _broken(where, f"client {max(answered)} answered, but clients.count = {clients}")
    return place, frozenset(answered)


def _all_whole(values: Any) -> bool:
    return all(type(value) is int and value >= 0 for value in values)


def _broken(where: str | Path, what: str) -> InputError:
    return InputError(
        what,
        where=str(where),
        allowed='a metrics.jsonl whose lines with "kind": "round" have task, phase, round and answered',
        next="point availability.file at the metrics.jsonl of a finished run with as many clients",
    )
