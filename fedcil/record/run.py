"""A finished or unfinished run, as it can be read from its folder."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedcil.errors import FedcilError, InputError, reading
from fedcil.metrics import Matrix
from fedcil.partition import TaskPartition, load_partition
from fedcil.record.folder import METRICS
from fedcil.scenario import Scenario
from fedcil.scenario_file import read_scenario
from fedcil.sources import program

DAMAGED = "this file is damaged; use another run"


@dataclass(frozen=True)
class Run:
    """A run folder, read only.

    ``summary`` holds the field's metrics (empty until the run is finished); ``lines`` everything that was
    recorded, in order: kinds ``round``, ``task`` and ``boundary``.
    """

    path: Path

    @cached_property
    def scenario(self) -> Scenario:
        return read_scenario(self.path / "scenario.toml")

    @cached_property
    def lines(self) -> tuple[dict[str, Any], ...]:
        """Whole lines only: a run that is being written to, or was killed, may end in half a line."""
        path = self.path / METRICS
        with _reading(path):
            *whole, _ = path.read_bytes().split(b"\n")
        lines = tuple(_read_table(line, f"{path}:{number}") for number, line in enumerate(whole, start=1))
        if odd := [number for number, line in enumerate(lines, start=1) if not isinstance(line.get("kind"), str)]:
            raise InputError("a line that does not say of what it is", where=f"{path}:{odd[0]}", next=DAMAGED)
        rounds = self.summary.get("rounds")
        for kind, all_ in (("round", rounds), ("task", self.scenario.stream.tasks)) if rounds else ():
            there = sum(line["kind"] == kind for line in lines)
            if there < all_:
                raise InputError(f"{there} of {all_} {kind}s are in it", where=str(path), next=DAMAGED)
        return lines

    @property
    def results(self) -> list[dict[str, Any]]:
        """``lines`` without their costs: one scenario on the same data gives the same, bit for bit, on every engine."""
        return [{key: value for key, value in line.items() if key != "cost"} for line in self.lines]

    @cached_property
    def summary(self) -> dict[str, Any]:
        """The field's metrics and what the run cost; empty until it is finished. InputError if it is damaged."""
        path = self.path / "summary.json"
        anew = f"delete it; `fedcil resume {self.path}` writes it anew"
        return _read_table_if_there(path, anew, {"rounds": int})

    @property
    def finished(self) -> bool:
        return bool(self.summary)

    @cached_property
    def versions(self) -> dict[str, str | None]:
        """Versions of the packages that the run was begun with."""
        return dict(self.environment.get("versions", {}))

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What decided the run's result: scenario by key, data digest, numeric configuration; nothing if the folder
        does not say.
        """
        return dict(self.environment.get("identity", {}))

    @property
    def program(self) -> str | None:
        """Digest of the files of the fedcil that it was begun with; where others went on, theirs too: ``a1+b2``."""
        found: str | None = self.environment.get("program")
        return found

    @property
    def by_other_code(self) -> bool:
        """Whether it is by other files of fedcil than those that ask, even in part, as far as that was recorded."""
        return self.program not in (None, program())

    @property
    def own_code(self) -> dict[str, str]:
        """Digests of a person's own modules as they were when it was begun (``Scenario.own_code``); where it went on
        with others, those too: ``a1+b2``.
        """
        return dict(self.environment.get("own_code", {}))

    def changed_code(self, scenario: Scenario) -> list[str]:
        """Own modules of a scenario that were others while this was made, as far as that was recorded."""
        return [name for name, digest in scenario.own_code().items() if self.own_code.get(name, digest) != digest]

    @cached_property
    def environment(self) -> dict[str, Any]:
        """With what and on what machine it was begun."""
        path = self.path / "environment.json"
        without = "delete it; a run goes on, and is compared, without what it says"
        forms = {"versions": dict, "identity": dict, "own_code": dict, "class_order": list}
        return _read_table_if_there(path, without, forms)

    @cached_property
    def partition(self) -> tuple[TaskPartition, ...]:
        return load_partition(self.path / "partition.npz")

    def kind(self, kind: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["kind"] == kind]

    @cached_property
    def label_counts(self) -> NDArray[np.int32] | None:
        """Training samples by task, client and label, where the run recorded them."""
        path = self.path / "label_counts.npy"
        try:
            with _reading(path):
                counts = np.load(path, allow_pickle=False) if path.is_file() else None
            if counts is not None and counts.ndim != 3:
                raise ValueError(f"of shape {counts.shape}")
            return counts
        except (EOFError, ValueError) as error:
            without = "delete it; the run is then shown without the samples of each class"
            raise InputError(f"not an array of counts: {error}", where=str(path), next=without) from None

    @cached_property
    def accuracy_matrix(self) -> Matrix:
        """a[t][j], NaN for tasks that had not come yet."""
        return ragged([line["accuracy"] for line in self.kind("task")])

    @cached_property
    def test_counts(self) -> list[int]:
        """Test images of each task that has ended; none before the first has."""
        return list(self.kind("task")[-1]["test_images"]) if self.kind("task") else []

    @cached_property
    def trace(self) -> tuple[Matrix, list[int]]:
        """(accuracy of each task at each evaluation, index of the last evaluation of each task)."""
        rows, ends = [], []
        for line in self.lines:
            if line["kind"] == "round" and line.get("accuracy"):
                rows.append(line["accuracy"])
            elif line["kind"] == "task":
                rows.append(line["accuracy"])
                ends.append(len(rows) - 1)
        return ragged(rows), ends


def earlier_runs(scenario: Scenario, root: Path, fits: Callable[[Run], bool]) -> list[Run]:
    """Those of this name and seed below ``root`` that fit, the oldest first; what is damaged does not."""
    found = []
    for path in sorted(root.glob(f"{scenario.name}-{scenario.seed}-*")):
        with contextlib.suppress(FedcilError, OSError, LookupError, TypeError, ValueError):
            if fits(run := open_run(path)):
                found.append(run)
    return found


def ragged(rows: list[list[float]]) -> NDArray[np.float64]:
    """Rows of growing length as one matrix, NaN where there is nothing."""
    width = max(map(len, rows), default=0)
    matrix = np.full((len(rows), width), np.nan)
    for place, row in enumerate(rows):
        matrix[place, : len(row)] = row
    return matrix


def costs(lines: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Seconds of all lines together, bytes of the rounds among them."""
    sent = [line["bytes"] for line in lines if line["kind"] == "round"]
    return {
        "seconds": sum(line["cost"]["seconds"] for line in lines),
        "cpu_seconds": sum(line["cost"]["cpu_seconds"] for line in lines),
        "bytes_up": sum(sum(each["up"].values()) for each in sent),
        "bytes_down": sum(sum(each["down"].values()) for each in sent),
    }


def _reading(path: Path) -> AbstractContextManager[None]:
    return reading("a part of the run", str(path), "let it be read by you, or use another run")


def _read_table_if_there(path: Path, next_: str, forms: Mapping[str, type]) -> dict[str, Any]:
    """``forms``: of its values, as far as they are there."""
    with _reading(path):
        content = path.read_bytes() if path.is_file() else None
    table = {} if content is None else _read_table(content, str(path), next_)
    for name, form in forms.items():
        if name in table and not isinstance(table[name], form):
            raise InputError(f"{name} is {table[name]!r:.50}, no {form.__name__}", where=str(path), next=next_)
    return table


def _read_table(content: bytes, where: str, next_: str = DAMAGED) -> dict[str, Any]:
    try:
        table = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON: {error}", where=where, next=next_) from None
    if not isinstance(table, dict):
        raise InputError("not a JSON object", where=where, next=next_)
    return table


def open_run(path: Path) -> Run:
    """The run in a folder. InputError if the folder is none, or cannot be looked into."""
    with _reading(path):
        there = all((path / name).is_file() for name in ("scenario.toml", METRICS))
    if not there:
        raise InputError(
            "not a run folder",
            where=str(path),
            allowed="a folder with scenario.toml and metrics.jsonl, as `fedcil run` makes it",
            next="`fedcil list runs` shows the runs below ./runs",
        )
    return Run(path)
