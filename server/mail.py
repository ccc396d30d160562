"""Messages to and from nodes over Flower's Grid, whose own troubles must not end a run."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

from flwr.app import Message
from flwr.serverapp import Grid

log = logging.getLogger("fedcil")
UNREADABLE = (ValueError, KeyError, TypeError, IndexError, AttributeError)  # Flower's ways to say so


def pull(grid: Grid, messages: Sequence[str]) -> Iterable[Message]:
    """Replies to these messages that are there. One that Flower cannot read takes those that came with it along, whose
    nodes are late then: what a node sends must not end the run.
    """
    if not messages:
        return ()
    try:
        found: Iterable[Message] = grid.pull_messages(messages)
        return found
    except UNREADABLE as error:
        log.warning("a reply that cannot be read: %s: %s", type(error).__name__, error)
        return ()


def push(grid: Grid, messages: Sequence[Message]) -> Sequence[str | None]:
    """An id for each message, nothing for one that could not be sent. Flower says too few where a proxy refuses so many
    bytes at once, or its state does not take a message; not for which, so none of them is waited for.
    """
    ids = list(grid.push_messages(messages)) if messages else []
    return ids if len(ids) == len(messages) else [None] * len(messages)
