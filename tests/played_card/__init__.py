"""A GPU played on the CPU, for what only a run on one would show: where tensors lie, what waits for the device, what a
captured graph does when it is replayed, whether streams wait for one another, and how much memory is held.

Its tensors are ``OnCard``: to a program they lie on ``cuda``, their numbers are a CPU's. Work is done at once in the
order of its launch, so its results are those of a card that is used rightly; where a real one might do it in another
order, or reads memory that is another's by then, is kept in ``Card.races``. Not played: times, several cards, the
memory that libraries take for themselves, and torch's own kernels for CUDA.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch

from played_card.card import Card
from played_card.graphs import Graph, Pool
from played_card.tensors import Generator, Placed

__all__ = ["Card", "played_card"]


@contextmanager
def played_card(monkeypatch: pytest.MonkeyPatch, memory: int = 1 << 40) -> Iterator[Card]:
    """In here torch has one GPU with so many bytes."""
    card = Card(memory)
    for name, part in _torch_cuda(card).items():
        monkeypatch.setattr(torch.cuda, name, part)
    monkeypatch.setattr(torch, "Generator", Generator)
    monkeypatch.setattr(torch.backends.cudnn, "enabled", False)  # torch's own batch norm, which a CPU has, too
    plain = threading.Thread.run

    def run(thread: threading.Thread) -> None:
        with Placed(card):
            plain(thread)

    monkeypatch.setattr(threading.Thread, "run", run)
    torch._C._ensureCUDADeviceGuardSet()
    overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with Placed(card):
            yield card
    finally:
        card.given_back = True
        torch.__future__.set_overwrite_module_params_on_conversion(overwrite)


def _torch_cuda(card: Card) -> dict[str, Any]:
    """What fedcil uses of ``torch.cuda``."""
    return {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "is_bf16_supported": lambda **_: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda *_: "a card that is played",
        "device": lambda *_: nullcontext(),
        "mem_get_info": lambda *_: (card.memory - card.used, card.memory),
        "memory_allocated": lambda *_: card.used,
        "max_memory_allocated": lambda *_: card.peak,
        "reset_peak_memory_stats": lambda *_: setattr(card, "peak", card.used),
        "empty_cache": lambda: None,
        "synchronize": lambda *_: card.wait("synchronize"),
        "Stream": card.new_stream,
        "stream": card.on,
        "current_stream": lambda *_: card.current,
        "default_stream": lambda *_: card.default,
        "CUDAGraph": lambda: Graph(card),
        "graph": card.capture,
        "graph_pool_handle": lambda: Pool(card),
        "manual_seed": card.draws.manual_seed,
        "get_rng_state": lambda *_: card.draws.get_state(),
        "set_rng_state": lambda state, *_: card.draws.set_state(state),
    }
