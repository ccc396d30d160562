"""The server's state on another device."""

from __future__ import annotations

import torch

from fedcil.messages import Payload
from fedcil.state import ServerState


def test_all_of_a_state_moves_and_keeps_its_payload_hash() -> None:
    payload = Payload.of({"teacher": torch.ones(2)})
    state = ServerState(model={"w": torch.ones(3)}, memory={"gram": torch.ones(1)}, payload=payload)
    moved = state.to(torch.device("meta"))
    assert moved.payload is not None
    assert moved.payload.hash == payload.hash
    for tensors in (moved.model, moved.memory, moved.payload.tensors):
        assert all(tensor.device.type == "meta" for tensor in tensors.values())
    assert ServerState(model={}).to(torch.device("meta")).payload is None
