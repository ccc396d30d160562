"""Nodes that a test plays: the real client app in this process, over a Grid that does what a test wants."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flwr.app import Context, Error, Message, RecordDict

from client import app as client_app
from fedcil.experiment import open_experiment
from fedcil.port import StopSignal
from fedcil.record.folder import RunFolder
from fedcil.scenario_file import load_scenario
from fedcil.state import RunState
from server.grid import GridPort
from server.rounds import run_tasks
from server.session import open_session

Reply = Message | None
SETTINGS: dict[str, Any] = {
    "method": {"name": "fedlwf"},
    "data": {"name": "synthetic", "classes": 4, "samples_per_class": 24, "image_size": 4, "test_per_class": 2},
    "stream": {"tasks": 2},
    "partition": {"name": "iid"},
    "clients": {"count": 6, "per_round": 6},
    "model": {"width": 2},
    "training": {"rounds": 3, "epochs": 1, "batch_size": 4},
    "server": {"deadline_s": 0.4, "quorum": 0.3, "patience": 3},
}


@dataclass
class Node:
    """``change`` turns its honest answer to a piece of work into what is sent; None: nothing, ever."""

    config: dict[str, Any]
    change: Callable[[Message, int], Reply] = lambda reply, _: reply
    thinks: int = 0  # looks at the grid until its hello is there
    breaks: int = 0  # hellos that end in an error of Flower
    hellos: int = 0
    works: int = 0


@dataclass
class Nodes:
    """A Grid. ``here`` says, by the number of the call, which nodes are online."""

    nodes: dict[int, Node]
    home: Path
    here: Callable[[int], Sequence[int]] | None = None
    calls: int = 0
    sent: int = 0
    replies: dict[str, Message] = field(default_factory=dict)
    thought: dict[str, tuple[int, Message]] = field(default_factory=dict)  # message -> (by which call, reply)

    def get_node_ids(self) -> list[int]:
        self.calls += 1
        for name in [name for name, (call, _) in self.thought.items() if call <= self.calls]:
            self.replies[name] = self.thought.pop(name)[1]
        return list(self.here(self.calls) if self.here else self.nodes)

    def push_messages(self, messages: list[Message]) -> list[str]:
        return [self._deliver(message) for message in messages]

    def pull_messages(self, ids: list[str]) -> list[Message]:
        return [self.replies.pop(name) for name in reversed(ids) if name in self.replies]

    def _deliver(self, message: Message) -> str:
        self.sent += 1
        message.metadata._message_id = name = str(self.sent)  # as the SuperLink would
        number = message.metadata.dst_node_id
        node = self.nodes[number]
        config = {"home": str(self.home / str(number)), **node.config}
        context = Context(run_id=1, node_id=number, node_config=config, state=RecordDict(), run_config={})
        if message.metadata.message_type == "query.hello":
            node.hellos += 1
            said = client_app.hello(message, context)
            if node.hellos <= node.breaks:
                said = answer_to(said, Message(Error(code=8, reason="gone"), reply_to=said))
            self.thought[name] = (self.calls + node.thinks, said)
            reply: Reply = None if node.thinks else self.thought.pop(name)[1]
        else:
            node.works += 1
            reply = node.change(client_app.work(message, context), node.works)
        if reply is not None:
            self.replies[name] = reply
        return name


def train(nodes: Nodes, folder: Path, **more: Any) -> tuple[list[dict[str, Any]], RunState]:
    """A whole run over these nodes: (lines of the record, last state)."""
    experiment = open_experiment(load_scenario(SETTINGS))
    record = RunFolder.create(folder, experiment)
    try:
        port = GridPort(nodes, experiment, record.path.name, StopSignal(), **more)
        state = run_tasks(open_session(experiment, record, port), experiment.first_state())
    finally:
        record.close()
    return [json.loads(line) for line in (record.path / "metrics.jsonl").read_text().splitlines()], state


def three(**changes: Node) -> dict[int, Node]:
    """Nodes 101 to 103, with two clients each."""
    plain = {f"n{100 + i}": Node({"partition-id": i - 1, "num-partitions": 3}) for i in (1, 2, 3)}
    return {int(name[1:]): node for name, node in {**plain, **changes}.items()}


def rounds(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line for line in lines if line["kind"] == "round"]


def events(lines: list[dict[str, Any]]) -> list[tuple[str, str, tuple[int, ...]]]:
    return [
        (event["event"], event["node"], tuple(event["clients"]))
        for line in rounds(lines)
        for event in line["cost"].get("nodes", ())
    ]


def answer_to(honest: Message, other: Message) -> Message:
    other.metadata._reply_to_message_id = honest.metadata.reply_to_message_id
    return other


def late_in_round_2(reply: Message, works: int) -> Reply:
    return None if works == 2 else reply
