"""What a server is between two rounds: everything that a resumed run needs, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch

from fedcil.messages import Payload
from fedcil.tensors import Tensors, Total, moved


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerState:
    """The global model, what a method remembers on the server, and what its clients are given."""

    model: Tensors
    memory: Tensors = field(default_factory=dict)
    payload: Payload | None = None

    def to(self, device: torch.device) -> ServerState:
        """The same state on another device."""
        payload = self.payload and Payload(moved(self.payload.tensors, device), self.payload.hash)
        return ServerState(model=moved(self.model, device), memory=moved(self.memory, device), payload=payload)


@dataclass(frozen=True, slots=True)
class Cursor:
    """Where the loop stands: ``phase`` equal to the number of phases means that the boundary comes next."""

    task: int = 0
    phase: int = 0
    round: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Pending:
    """An update that was made in round ``number`` of the run and needs ``left_s`` simulated seconds of later rounds."""

    client: int
    number: int
    left_s: float
    samples: int
    total: Total

    def to(self, device: torch.device) -> Pending:
        return replace(self, total=self.total.to(device))


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """One checkpoint's worth. Randomness is positional, so a cursor is all that a resume needs to know."""

    server: ServerState
    cursor: Cursor = Cursor()
    client_states: Mapping[int, str] = field(default_factory=dict)  # client -> hash of what it keeps
    client_state_bytes: Mapping[int, int] = field(default_factory=dict)
    holders: frozenset[int] = frozenset()  # clients that were sent the payload
    short_rounds: int = 0  # rounds without quorum in a row
    nodes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # of real nodes: id -> the clients it serves
    pending: tuple[Pending, ...] = ()  # late updates, in the order in which they were asked for

    def to(self, device: torch.device) -> RunState:
        """The same state on another device."""
        return replace(self, server=self.server.to(device), pending=tuple(late.to(device) for late in self.pending))

    def without(self, gone: Callable[[int], bool]) -> RunState:
        """The same, with nothing left that is about clients who are gone for good."""
        busy = {late.client for late in self.pending}
        if not any(gone(client) for client in self.client_states.keys() | self.holders | busy):
            return self
        return replace(
            self,
            client_states={client: name for client, name in self.client_states.items() if not gone(client)},
            client_state_bytes={client: size for client, size in self.client_state_bytes.items() if not gone(client)},
            holders=frozenset(client for client in self.holders if not gone(client)),
            pending=tuple(late for late in self.pending if not gone(late.client)),
        )
