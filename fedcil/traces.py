"""Who could be reached, read from a file: the record of an earlier run, or a trace."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedcil.errors import InputError

Clients = frozenset[int]
Place = tuple[int, int, int]  # task, phase, round
HEADER = ["client", "from", "to"]


def recorded(path: Path, clients: int, places: Iterable[Place]) -> tuple[Callable[[int, int, int], Clients], str]:
    """The clients that answered in an earlier run, from its ``metrics.jsonl``, and a digest of that; InputError if it
    has not all places.
    """
    answered = _read_rounds(path, clients)
    missing = next((place for place in places if place not in answered), None)
    if missing:
        raise InputError(
            "task {}, phase {}, round {} was not recorded".format(*missing),
            where=str(path),
            allowed="a record with every round of this scenario",
            next="record a run with the same stream, method and training.rounds, run to its end",
        )
    said = repr(sorted((place, sorted(ids)) for place, ids in answered.items()))
    return lambda *place: answered[place], _digest(said.encode())


def _read_rounds(path: Path, clients: int) -> dict[Place, Clients]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
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
    except (ValueError, RecursionError) as error:  # no JSON, a number of 5000 digits, 100000 brackets
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


def trace(path: Path, clients: int) -> tuple[Callable[[int], Clients], str]:
    """Rounds in which clients are there, from a CSV file with the header ``client,from,to``, and a digest of them.

    Rounds are numbered from 0 through the whole run, all tasks and phases, as their lines stand in metrics.jsonl;
    ``from`` and ``to`` both belong to it. A client may have several lines; one without a line is never there.
    """
    rows = _read_trace(path, clients)

    def present(number: int) -> Clients:
        there = rows[(rows[:, 1] <= number) & (number <= rows[:, 2]), 0]
        return frozenset(there.tolist())

    return present, _digest(rows.tobytes())


def _digest(content: bytes) -> str:
    return blake2b(content, digest_size=16).hexdigest()


def _read_trace(path: Path, clients: int) -> NDArray[np.int64]:
    """Rows (client, from, to), (lines, 3)."""
    try:
        lines = list(csv.reader(path.read_text(encoding="utf-8-sig").splitlines()))
    except (OSError, ValueError, csv.Error) as error:
        raise _no_trace(path, f"cannot be read: {error}") from None
    if not lines or [cell.strip() for cell in lines[0]] != HEADER:
        raise _no_trace(f"{path}:1", f"the first line is not {','.join(HEADER)}")
    rows = [_read_row(cells, f"{path}:{line}", clients) for line, cells in enumerate(lines[1:], start=2) if cells]
    if not rows:
        raise _no_trace(path, "has no clients")
    return np.array(rows, dtype=np.int64)


def _read_row(cells: list[str], where: str, clients: int) -> tuple[int, int, int]:
    try:
        client, first, last = (int(cell) for cell in cells)
    except ValueError:
        raise _no_trace(where, f"{','.join(cells)!r} is not three whole numbers") from None
    if not 0 <= client < clients:
        raise _no_trace(where, f"client {client} is none of the clients.count = {clients}, numbered from 0")
    if not 0 <= first <= last < 2**63:
        raise _no_trace(where, f"from {first} to {last} is no span of rounds: 0 <= from <= to")
    return client, first, last


def _no_trace(where: str | Path, what: str) -> InputError:
    return InputError(
        what,
        where=str(where),
        allowed="a CSV file with the header client,from,to; rounds count from 0 through the whole run, ends included",
        next="mend the line, or point availability.file at another trace (docs/availability.md)",
    )
