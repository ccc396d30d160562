"""What a server is between two rounds: everything that a resumed run needs, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from fedcil.messages import Payload, Tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerState:
    """The global model, what a method remembers on the server, and what its clients are given."""

    model: Tensors
    memory: Tensors = field(default_factory=dict)
    payload: Payload | None = None

    def to(self, device: torch.device) -> ServerState:
        """The same state on another device."""
        payload = self.payload and Payload(_moved(self.payload.tensors, device), self.payload.hash)
        return ServerState(model=_moved(self.model, device), memory=_moved(self.memory, device), payload=payload)


def _moved(tensors: Tensors, device: torch.device) -> Tensors:
    return {name: tensor.to(device) for name, tensor in tensors.items()}


@dataclass(frozen=True, slots=True, order=True)
class Cursor:
    """Where the loop stands: ``phase`` equal to the number of phases means that the boundary comes next."""

    task: int = 0
    phase: int = 0
    round: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """One checkpoint's worth. Randomness is positional, so a cursor is all that a resume needs to know."""

    server: ServerState
    cursor: Cursor = Cursor()
    client_states: Mapping[int, str] = field(default_factory=dict)  # client -> hash of what it keeps
    client_state_bytes: Mapping[int, int] = field(default_factory=dict)
    holders: frozenset[int] = frozenset()  # clients that were sent this task's payload
    short_rounds: int = 0  # rounds without quorum in a row
    nodes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # of real nodes: id -> the clients it serves
