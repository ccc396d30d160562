"""The values that travel between server and clients. Flower, Ray and the file system never appear here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fedcil.fold import Fold
from fedcil.rule import PLAIN, Rule
from fedcil.tensors import Contribution, Tensors, Total, content_hash, moved


@dataclass(frozen=True, slots=True)
class Payload:
    """What a boundary makes for later clients; known by its content hash and sent once per client and task."""

    tensors: Tensors
    hash: str

    @classmethod
    def of(cls, tensors: Tensors) -> Payload:
        return cls(tensors, content_hash(tensors))


@dataclass(frozen=True, slots=True, kw_only=True)
class Broadcast:
    """What all clients of a round get. ``phase`` is the phase's place in the method's list for this task."""

    task: int
    phase: int
    round: int
    tensors: Tensors
    payload: Payload | None = None

    def to(self, device: torch.device) -> Broadcast:
        """With its model there. The payload stays: a method prepares it once a task."""
        return replace(self, tensors=moved(self.tensors, device))


@dataclass(frozen=True, slots=True)
class Job:
    """One client's part of a request. ``position`` is its leaf in the summation tree of the cohort."""

    client: int
    position: int
    state: str | None = None  # hash of the client state to start from; None: no state yet


@dataclass(frozen=True, slots=True)
class Request:
    """``cohort`` is the number of leaves of the round's tree; an engine may split the jobs, never the tree.

    ``rule``: what the answers must be like, and how they are put together.
    """

    broadcast: Broadcast
    jobs: tuple[Job, ...]
    cohort: int
    rule: Rule = PLAIN


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What one client says about its work."""

    client: int
    samples: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    state: str | None = None  # hash of the client state after the work
    state_bytes: int = 0
    bytes_up: int = 0
    seconds: float = 0.0


UNEXPECTED = "client"
"""Stage of a failure that nobody foresaw: an exception out of the method, the model or the data."""
BORDER = "border"
"""Stage of a failure whose answer came, and was refused."""
MOST_CHARACTERS = 500
"""Characters of a failure's reason, in a message as in the record."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A client that gave nothing, at which stage, and why."""

    client: int
    stage: str
    reason: str


@dataclass(frozen=True, slots=True)
class Answer:
    """One client's: a report, with or without a contribution, or a failure."""

    result: Report | Failure
    contribution: Contribution | None = None


@dataclass(frozen=True, slots=True)
class Reply:
    """The answers to one request: a partial sum, and a report or a failure for each job.

    ``cpu_elsewhere``: CPU seconds that they took, where the worker is a process of its own.
    """

    fold: Fold
    reports: tuple[Report, ...] = ()
    failures: tuple[Failure, ...] = ()
    cpu_elsewhere: float = 0.0


@dataclass(frozen=True, slots=True)
class Attendance:
    """Of real nodes: which clients each serves (by node id), and who joined, left or was late since the last round."""

    shares: Mapping[str, tuple[int, ...]]
    events: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a round: None where nobody contributed; reports and failures sorted by client. ``cpu_elsewhere``:
    CPU seconds of workers that are processes of their own.
    """

    total: Total | None
    reports: tuple[Report, ...]
    failures: tuple[Failure, ...]
    wire_bytes: int = 0
    cpu_elsewhere: float = 0.0
    attendance: Attendance | None = None
