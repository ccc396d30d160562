"""Flower's Grid in this process, with bad weather in between: the real port and the real ClientApp, no network.

Messages to nodes and their answers can be lost, doubled, delayed and reordered, and answers can be tampered with.
Everything that went through is kept in a ledger, which ``violations`` holds against the run's record.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from torch import Tensor

import fedcil
from client.app import app
from fedcil.experiment import Experiment
from fedcil.fold import Fold
from fedcil.packets import packet_of, packet_record
from fedcil.port import StopSignal
from fedcil.record.folder import RunFolder
from fedcil.record.summary import finish
from fedcil.tensors import Contribution, content_hash
from fedcil.wire import unpack, unpack_broadcast
from server.grid import GridPort
from server.rounds import run_tasks
from server.session import open_session

LIMIT = 1 << 30
Place = tuple[int, int, int]
Tamper = Callable[[int, Place, bytes], bytes]
"""(client, place, its packet) -> the packet that the server gets."""


@dataclass(frozen=True, slots=True)
class Weather:
    """Shares of messages that something happens to."""

    lost_requests: float = 0.0
    lost_replies: float = 0.0
    doubled: float = 0.0  # a request reaches its node twice, and both answers come
    delayed: float = 0.0  # an answer that comes some pulls later, often after its round
    reordered: bool = False


@dataclass(slots=True)
class Ledger:
    """What went through: models by place, and each client's delivered packets by place."""

    broadcasts: dict[Place, dict[str, Tensor]] = field(default_factory=dict)
    delivered: dict[tuple[Place, int], list[bytes]] = field(default_factory=dict)
    count: dict[str, int] = field(default_factory=dict)

    def saw(self, what: str) -> None:
        self.count[what] = self.count.get(what, 0) + 1


class LoopbackGrid:
    """The three functions of Flower's Grid that the port uses."""

    def __init__(
        self,
        nodes: int,
        home: Path,
        weather: Weather | None = None,
        seed: int = 0,
        tamper: Tamper = lambda _client, _place, packet: packet,
    ) -> None:
        TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
        self.ledger = Ledger()
        self._contexts = [
            Context(
                run_id=1,
                node_id=node,
                node_config={"partition-id": node, "num-partitions": nodes, "home": str(home / str(node))},
                state=RecordDict(),
                run_config={},
            )
            for node in range(nodes)
        ]
        self._weather, self._random, self._tamper = weather or Weather(), random.Random(seed), tamper
        self._pulls = 0
        self._waiting: list[tuple[int, Message]] = []  # (pull from which on it is there, answer)
        self._sent = 0

    def get_node_ids(self) -> list[int]:
        return [context.node_id for context in self._contexts]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        return [self._push(message) for message in messages]

    def pull_messages(self, ids: Iterable[str]) -> list[Message]:
        """Answers to these messages that have arrived."""
        self._pulls += 1
        wanted = set(ids)
        here = [
            (pull, answer)
            for pull, answer in self._waiting
            if pull <= self._pulls and answer.metadata.reply_to_message_id in wanted
        ]
        self._waiting = [pair for pair in self._waiting if not any(pair[1] is answer for _, answer in here)]
        answers = [answer for _, answer in here]
        if self._weather.reordered:
            self._random.shuffle(answers)
        return answers

    def _push(self, message: Message) -> str:
        self._sent += 1
        name = f"message-{self._sent}"
        message.metadata.__dict__["_message_id"] = name
        fair = "broadcast" not in message.content  # the first hello
        if not fair and self._happens("lost request", self._weather.lost_requests):
            return name
        times = 2 if not fair and self._happens("doubled", self._weather.doubled) else 1
        for _ in range(times):
            self._answer(message, fair)
        return name

    def _answer(self, message: Message, fair: bool) -> None:
        """Let the node work, and put its answer on the way."""
        answer = app(message, self._contexts[message.metadata.dst_node_id])
        if not fair and "missing" not in answer.content:
            answer = self._through(message, answer)
            if self._happens("lost reply", self._weather.lost_replies):
                return
        delay = self._random.randint(1, 40) if not fair and self._happens("delayed", self._weather.delayed) else 0
        self._waiting.append((self._pulls + 1 + delay, answer))

    def _through(self, message: Message, answer: Message) -> Message:
        header, tensors = unpack_broadcast(packet_of(message.content["broadcast"]), limit=LIMIT)
        task, phase, round_ = header["place"]
        place = (task, phase, round_)
        self.ledger.broadcasts[place] = dict(tensors)
        for name, record in list(answer.content.array_records.items()):
            client = int(name.removeprefix("client-"))
            packet = self._tamper(client, place, packet_of(record))
            self.ledger.delivered.setdefault((place, client), []).append(packet)
            answer.content[name] = packet_record(packet)
        return answer

    def _happens(self, what: str, share: float) -> bool:
        if self._random.random() >= share:
            return False
        self.ledger.saw(what)
        return True


def run_over(grid: LoopbackGrid, experiment: Experiment, output: Path) -> fedcil.Run:
    """A whole run over this grid."""
    folder = RunFolder.create(output, experiment)
    try:
        port = GridPort(grid, experiment, folder.path.name, StopSignal())  # type: ignore[arg-type]
        run_tasks(open_session(experiment, folder, port), experiment.first_state())
        return finish(folder)
    finally:
        folder.close()


def violations(run: fedcil.Run, ledger: Ledger) -> list[str]:
    """What a run's record says against what went through: [] if each update counted once, in its own round.

    The strongest check is arithmetic: the next model that nodes were sent has the bits of the mean over exactly
    the clients that are in the record, each once.
    """
    found = []
    rounds = run.kind("round")
    for line, after in zip(rounds, [*rounds[1:], None], strict=True):
        place = (line["task"], line["phase"], line["round"])
        answered, failed = line["answered"], [failure["client"] for failure in line["failures"]]
        if sorted(answered + failed) != line["cohort"]:
            found.append(f"{place}: {line['cohort']} were asked, {answered} answered and {failed} failed")
        found += [f"{place}: nothing came from {c}" for c in answered if (place, c) not in ledger.delivered]
        same_task = after is not None and after["task"] == line["task"]
        if same_task and not _next_model_fits(line, place, after, ledger):
            found.append(f"{place}: the next model is not the mean of {answered}")
    return found


def _next_model_fits(line: dict[str, Any], place: Place, after: dict[str, Any], ledger: Ledger) -> bool:
    following = ledger.broadcasts.get((after["task"], after["phase"], after["round"]))
    before = ledger.broadcasts.get(place)
    if following is None or before is None:  # all requests of a round were lost
        return True
    fold = Fold.empty(len(line["cohort"]))
    for position, client in enumerate(line["cohort"]):
        if client in line["answered"]:
            header, tensors = unpack(ledger.delivered[place, client][0], limit=LIMIT)
            fold.add(position, Contribution(tensors, header["weight"]))
    total = fold.total()
    return content_hash(total.mean() if total else before) == content_hash(following)
