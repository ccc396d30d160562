"""The nodes of a run over Flower's Grid: who is there, who is new, who left, who owes an answer."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedcil.errors import MessageRefused
from fedcil.experiment import Experiment
from fedcil.hello import Share, unpack_hello
from fedcil.messages import Attendance
from fedcil.packets import packet_of
from server.mail import pull, push
from server.roster import Roster

log = logging.getLogger("fedcil")
OWED_S = 180.0  # a node that owes an answer for so long is asked again
SILENT_S = 120.0  # so is one that did not answer its hello
AGAIN_S = 20.0  # between two hellos to a node that could not say one, or that got no client
HELLO_BYTES = 1 << 24
NEVER = math.inf


@dataclass(frozen=True, slots=True)
class Asked:
    """A hello under way. What a node was offered is offered to nobody else until it has answered."""

    node: int
    offer: Share
    since: float


class Nodes:
    """Asks each newcomer once what it serves; knows who can be asked for work now."""

    def __init__(self, grid: Grid, experiment: Experiment, scenario: str, known: Mapping[int, Share]) -> None:
        self._grid, self._tasks, self._scenario = grid, len(experiment.stream.tasks), scenario
        samples = [tuple(row) for row in experiment.task_counts().tolist()]
        self._roster = Roster(samples, experiment.data.digest, experiment.compute.precision, known)
        self._here: set[int] = set()
        self._welcome: set[int] = set()  # nodes that said what they serve
        self._full: set[int] = set()  # of these, who took less than all that it was offered, or named its own
        self._spare: set[int] = set()  # nodes that are here for clients that nobody serves yet
        self._asked: dict[str, Asked] = {}  # by message
        self._not_before: dict[int, float] = {}  # when a node may be asked again
        self._owed: dict[str, tuple[int, float]] = {}  # messages whose round is over -> node, since when
        self._events: list[dict[str, Any]] = []

    def look(self) -> None:
        """Greet who came, hear what was said, note who left. Waits for nothing."""
        here = set(self._grid.get_node_ids())
        gone = sorted(self._here - here)
        for node in gone:
            self._leave(node)
        if gone:  # what they served may be what somebody was refused
            self._not_before.clear()
        self._here = here
        self._listen()  # before anybody's time is up: a look may come long after the last
        now = time.monotonic()
        self._asked = {name: asked for name, asked in self._asked.items() if now - asked.since < SILENT_S}
        self._greet(self._to_be_asked(now), now)
        self._listen()

    def _listen(self) -> None:
        for reply in pull(self._grid, list(self._asked)):
            self._hear(reply)

    def _to_be_asked(self, now: float) -> list[int]:
        """Strangers; if there are none, who serves some clients and may have room for those that are left."""
        asked, free = {asked.node for asked in self._asked.values()}, self._roster.free(self._reserved())
        due = sorted(node for node in self._here - asked if now >= self._not_before.get(node, 0.0))
        strangers = [node for node in due if node not in self._welcome and (free or node not in self._spare)]
        roomy = [node for node in due if node in self._welcome - self._full]
        return strangers or ([] if asked else roomy[: len(free)])

    def _reserved(self) -> set[int]:
        return {client for asked in self._asked.values() for client in asked.offer}

    def serving(self) -> dict[int, int]:
        """Client -> node, of the nodes that are here and owe nothing."""
        now = time.monotonic()
        owing = {node for node, since in self._owed.values() if now - since < OWED_S}
        ready = sorted((self._here & self._welcome) - owing)
        return {client: node for node in ready for client in self._roster.shares.get(node, ())}

    def owe(self, message: str, node: int) -> None:
        """The round ended without this node's answer."""
        self._owed[message] = (node, time.monotonic())
        self._note("late", node)

    @property
    def owed(self) -> list[str]:
        """Messages to pull, so that no late answer stays in Flower's state."""
        return list(self._owed)

    def paid(self, message: str) -> None:
        """If this was an answer that came too late, its node may be asked again."""
        self._owed.pop(message, None)

    def attendance(self) -> Attendance:
        """Shares now, and what happened since this was last called."""
        shares = {str(node): share for node, share in sorted(self._roster.shares.items())}
        events, self._events = tuple(self._events), []
        return Attendance(shares, events)

    def counts(self) -> str:
        refused = sum(when == NEVER for node, when in self._not_before.items() if node not in self._spare)
        return f"{len(self._here)} nodes here, {len(self._welcome)} serve, {len(self._spare)} spare, {refused} refused"

    def _leave(self, node: int) -> None:
        for nodes in (self._welcome, self._full, self._spare):
            nodes.discard(node)
        self._asked = {message: asked for message, asked in self._asked.items() if asked.node != node}
        self._owed = {message: owed for message, owed in self._owed.items() if owed[0] != node}
        self._note("left", node)

    def _greet(self, nodes: Sequence[int], now: float) -> None:
        """A node for which nothing is left waits while somebody else thinks about an offer."""
        reserved = self._reserved()
        offers = {node: offer for node, offer in self._roster.offers(nodes, reserved).items() if offer or not reserved}
        messages = [self._hello(node, offer) for node, offer in offers.items()]
        for message, (node, offer) in zip(push(self._grid, messages), offers.items(), strict=True):
            if message:
                self._asked[message] = Asked(node, offer, now)
            else:
                self._not_before[node] = now + AGAIN_S

    def _hello(self, node: int, offer: Share) -> Message:
        content = ConfigRecord({"scenario": self._scenario, "offer": list(offer)})
        return Message(RecordDict({"hello": content}), dst_node_id=node, message_type="query.hello")

    def _hear(self, reply: Message) -> None:
        asked, now = self._asked.pop(reply.metadata.reply_to_message_id, None), time.monotonic()
        if asked is None:  # the node says that it answers something else
            return None
        node = asked.node
        if reply.has_error():  # it may do better next time
            self._not_before[node] = now + AGAIN_S
            return self._note("silent", node, reason=f"Flower error {reply.error.code}: {reply.error.reason}")
        served = self._roster.shares.get(node) if node in self._welcome else None
        try:
            hello = unpack_hello(packet_of(reply.content.get("hello")), tasks=self._tasks, limit=HELLO_BYTES)
            share = self._roster.welcome(node, hello, asked.offer, self._here & self._welcome)
        except MessageRefused as error:
            self._not_before[node] = NEVER
            self._welcome.discard(node)
            return self._note("refused", node, reason=error.what)
        if hello.fixed or set(hello.clients) != set(asked.offer):
            self._full.add(node)
        if share:
            self._welcome.add(node)
            self._spare.discard(node)
            return None if share == served else self._note("joined", node)
        self._not_before[node] = NEVER if hello.fixed else now + AGAIN_S
        if node not in self._spare:
            self._spare.add(node)
            self._note("spare", node)
        return None

    def _note(self, event: str, node: int, **more: str) -> None:
        line = {"event": event, "node": str(node), "clients": list(self._roster.shares.get(node, ())), **more}
        self._events.append(line)
        log.warning("node %s %s: clients %s %s", node, event, line["clients"], more.get("reason", ""))
