"""What a node says of itself when the server meets it, as a packet: which clients are its own, and what they have."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from reprlib import repr as short
from typing import Any

from fedcil.errors import MessageRefused
from fedcil.wire import pack, unpack

CLIENT = re.compile("[0-9]{1,9}")
Share = tuple[int, ...]
"""The clients that a node serves, sorted."""


@dataclass(frozen=True, slots=True)
class Hello:
    """``samples``: by client, the training samples of each task. ``data``: digest of the data set it has.
    ``precision``: what it computes in, which ``training.precision = "auto"`` leaves to each machine.
    """

    samples: Mapping[int, tuple[int, ...]]
    data: str
    precision: str
    fixed: bool  # the clients are the node's own, not some of those that it was offered

    @property
    def clients(self) -> Share:
        return tuple(sorted(self.samples))


def pack_hello(hello: Hello) -> bytes:
    """A packet for ``unpack_hello``."""
    samples = {str(client): list(counts) for client, counts in hello.samples.items()}
    about = {"data": hello.data, "precision": hello.precision, "fixed": hello.fixed}
    return pack({"samples": samples, **about}, {})


def unpack_hello(packet: bytes, *, tasks: int, limit: int) -> Hello:
    """MessageRefused for anything that is not the hello of a node in a run of so many tasks."""
    header, _ = unpack(packet, limit=limit)
    samples, data, precision, fixed = map(header.get, ("samples", "data", "precision", "fixed"))
    if not (isinstance(data, str) and isinstance(precision, str) and type(fixed) is bool and isinstance(samples, dict)):
        raise MessageRefused("a hello without samples, data, precision and fixed")
    if strangers := [client for client in samples if not CLIENT.fullmatch(client)]:
        raise MessageRefused(f"a hello of clients that are none: {short(strangers)}")
    if not all(_are_counts(counts, tasks) for counts in samples.values()):
        raise MessageRefused(f"a hello whose samples are not {tasks} counts of each client")
    return Hello({int(client): tuple(counts) for client, counts in samples.items()}, data, precision, fixed)


def _are_counts(value: Any, tasks: int) -> bool:
    return isinstance(value, list) and len(value) == tasks and all(type(n) is int and n >= 0 for n in value)
