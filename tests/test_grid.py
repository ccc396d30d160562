"""The port over a Grid whose nodes are the real client app in this process, and do what a test wants of them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, Context, Error, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from client import app as client_app
from fedcil.errors import TooFewClients
from fedcil.experiment import open_experiment
from fedcil.port import StopSignal
from fedcil.record.folder import RunFolder
from fedcil.scenario_file import load_scenario
from fedcil.state import RunState
from server import grid as grid_module
from server import nodes as nodes_module
from server.grid import GridPort
from server.rounds import run_tasks
from server.session import open_session
from server.verdict import needed_answers, round_status

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


@pytest.fixture(autouse=True)
def _inside_a_flower_run() -> Iterator[None]:
    """Messages can be made only inside a run: Flower's own identity of this process."""
    TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1
    yield
    TaskIdentity._run_id = TaskIdentity._task_id = TaskIdentity._node_id = None


def train(nodes: Nodes, folder: Path, **more: Any) -> tuple[list[dict[str, Any]], RunState]:
    """A whole run over these nodes: (lines of the record, last state)."""
    experiment = open_experiment(load_scenario(SETTINGS))
    record = RunFolder.create(folder, experiment)
    try:
        port = GridPort(nodes, experiment, record.path.name, StopSignal(), **more)  # type: ignore[arg-type]
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


def test_each_node_is_asked_once_and_serves_its_own(tmp_path: Path) -> None:
    nodes = Nodes(three(), tmp_path / "home")
    lines, state = train(nodes, tmp_path / "runs")
    assert [node.hellos for node in nodes.nodes.values()] == [1, 1, 1]
    assert all(line["answered"] == [0, 1, 2, 3, 4, 5] for line in rounds(lines))
    assert state.nodes == {"101": (0, 3), "102": (1, 4), "103": (2, 5)}


def test_nodes_without_clients_of_their_own_get_the_next_free_ones_and_keep_them(tmp_path: Path) -> None:
    def any_two(*numbers: int) -> dict[int, Node]:
        return {number: Node({"clients": 2}) for number in numbers}

    def here(call: int) -> Sequence[int]:
        return (7, 8, 9) if call < 3 else (7, 8, 9, 10)

    lines, state = train(Nodes(any_two(7, 8, 9, 10), tmp_path / "home", here), tmp_path / "a")
    assert sorted(client for share in state.nodes.values() for client in share) == [0, 1, 2, 3, 4, 5]
    assert state.nodes["10"] == ()
    assert ("spare", "10", ()) in events(lines)
    known = {"9": (0, 1), "8": (2, 3)}  # as a checkpoint has them: 7 is new
    _, resumed = train(Nodes(any_two(7, 8, 9), tmp_path / "home"), tmp_path / "b", known=known)
    assert resumed.nodes == {**known, "7": (4, 5)}


def test_what_a_node_thinks_about_is_offered_to_nobody_else(tmp_path: Path) -> None:
    """The second comes while the first has not answered: it waits for what is left."""
    plain = {7: Node({"clients": 3}, thinks=3), 8: Node({"clients": 3})}
    nodes = Nodes(plain, tmp_path / "home", lambda call: (7,) if call == 1 else (7, 8))
    lines, state = train(nodes, tmp_path / "runs")
    assert state.nodes == {"7": (0, 1, 2), "8": (3, 4, 5)}
    assert {event for event, *_ in events(lines)} == {"joined"}


def test_a_node_that_could_not_say_hello_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes_module, "AGAIN_S", 0.1)
    nodes = Nodes(three(n102=Node({"partition-id": 1, "num-partitions": 3}, breaks=2)), tmp_path / "home")
    lines, _ = train(nodes, tmp_path / "runs")
    assert nodes.nodes[102].hellos == 3
    assert [event for event, node, _ in events(lines) if node == "102"] == ["silent", "silent", "joined"]


def test_a_spare_node_is_left_alone_while_every_client_is_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nodes_module, "AGAIN_S", 0.0)
    plain = {7: Node({"clients": 6}), 8: Node({"clients": 1})}
    nodes = Nodes(plain, tmp_path / "home", lambda call: (7,) if call < 3 else (7, 8))
    lines, _ = train(nodes, tmp_path / "runs")
    assert nodes.nodes[8].hellos == 1
    assert ("spare", "8", ()) in events(lines)


def test_a_node_takes_up_to_its_room_and_the_next_one_the_rest(tmp_path: Path) -> None:
    """A node that was spare, since others thought about all that is free, is asked again when they took less."""
    plain = {7: Node({"clients": 1}, thinks=2), 8: Node({"clients": 5})}
    _, state = train(Nodes(plain, tmp_path / "home", lambda call: (7,) if call == 1 else (7, 8)), tmp_path / "runs")
    assert state.nodes == {"7": (0,), "8": (1, 2, 3, 4, 5)}


def test_who_leaves_is_not_asked_and_who_returns_has_its_clients(tmp_path: Path) -> None:
    def here(call: int) -> Sequence[int]:
        return (101, 103) if 3 <= call <= 4 else (101, 102, 103)

    lines, _ = train(Nodes(three(), tmp_path / "home", here), tmp_path / "runs")
    answered = [line["answered"] for line in rounds(lines)]
    assert [0, 2, 3, 5] in answered
    assert answered[-1] == [0, 1, 2, 3, 4, 5]
    assert [event for event in events(lines) if event[1] == "102"] == [
        ("joined", "102", (1, 4)),
        ("left", "102", (1, 4)),
        ("joined", "102", (1, 4)),
    ]


def test_who_misses_a_deadline_is_asked_again_when_it_answered(tmp_path: Path) -> None:
    nodes = Nodes(three(n102=Node({"partition-id": 1, "num-partitions": 3}, late_in_round_2)), tmp_path / "home")
    lines, _ = train(nodes, tmp_path / "runs")
    second, third = rounds(lines)[1:3]
    assert [failure["stage"] for failure in second["failures"]] == ["deadline", "deadline"]
    assert ("late", "102", (1, 4)) in events(lines)
    assert third["cohort"] == [0, 2, 3, 5]  # it still owes an answer
    assert second["status"] == third["status"] == "ok"


def late_in_round_2(reply: Message, works: int) -> Reply:
    return None if works == 2 else reply


def test_a_late_answer_sets_its_node_free(tmp_path: Path) -> None:
    kept: list[Message] = []

    def keeps(reply: Message, works: int) -> Reply:
        return kept.append(reply) if works == 2 else reply

    nodes = Nodes(three(n102=Node({"partition-id": 1, "num-partitions": 3}, keeps)), tmp_path / "home")

    def here(call: int) -> Sequence[int]:
        if kept and call % 2:  # some time later
            late = kept.pop()
            nodes.replies[late.metadata.reply_to_message_id] = late
        return list(nodes.nodes)

    nodes.here = here
    lines, _ = train(nodes, tmp_path / "runs")
    assert rounds(lines)[-1]["answered"] == [0, 1, 2, 3, 4, 5]
    assert len([line for line in rounds(lines) if line["failures"]]) == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda reply: Message(RecordDict({}), reply_to=reply), "no answer for this client"),
        (lambda reply: with_content(reply, ArrayRecord([np.zeros(9)])), "not a fedcil packet"),
        (lambda reply: with_content(reply, ArrayRecord([np.zeros(2), np.zeros(2)])), "not a packet"),
    ],
    ids=["empty", "garbage", "two arrays"],
)
def test_what_is_no_answer_is_refused_and_the_round_goes_on(tmp_path: Path, change: Any, reason: str) -> None:
    bad = Node(
        {"partition-id": 1, "num-partitions": 3},
        lambda reply, works: answer_to(reply, change(reply)) if works == 1 else reply,
    )
    lines, _ = train(Nodes(three(n102=bad), tmp_path / "home"), tmp_path / "runs")
    first = rounds(lines)[0]
    assert first["status"] == "ok"
    assert first["answered"] == [0, 2, 3, 5]
    assert [failure["client"] for failure in first["failures"]] == [1, 4]
    assert all(reason in failure["reason"] for failure in first["failures"])


def with_content(reply: Message, record: ArrayRecord) -> Message:
    content = RecordDict({f"client-{client}": record for client in (1, 4)})
    return Message(content, reply_to=reply)


def answer_to(honest: Message, other: Message) -> Message:
    other.metadata._reply_to_message_id = honest.metadata.reply_to_message_id
    return other


def test_an_error_of_flower_counts_for_each_client_of_the_node(tmp_path: Path) -> None:
    def failing(reply: Message, works: int) -> Reply:
        return answer_to(reply, Message(Error(code=8, reason="gone"), reply_to=reply)) if works == 1 else reply

    nodes = Nodes(three(n103=Node({"partition-id": 2, "num-partitions": 3}, failing)), tmp_path / "home")
    lines, _ = train(nodes, tmp_path / "runs")
    assert [failure["reason"] for failure in rounds(lines)[0]["failures"]] == ["Flower error 8: gone"] * 2


@pytest.mark.parametrize("harm", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-9])])
def test_a_payload_that_a_node_lost_or_damaged_is_sent_again(tmp_path: Path, harm: Callable[[Path], object]) -> None:
    def loses(reply: Message, works: int) -> Reply:
        if works == 4:  # after the first round of the second task, which brought the payload
            for path in (tmp_path / "home" / "101" / "payloads").iterdir():
                harm(path)
        return reply

    nodes = Nodes(three(n101=Node({"partition-id": 0, "num-partitions": 3}, loses)), tmp_path / "home")
    lines, _ = train(nodes, tmp_path / "runs")
    assert not any(line["failures"] for line in rounds(lines))
    assert nodes.nodes[101].works == nodes.nodes[102].works + 1


def test_a_node_with_other_data_is_refused_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid_module, "MEET_S", 0.3)
    honest = client_app.pack_hello

    def lying(hello: Any) -> bytes:
        other = {client: (1, *counts[1:]) for client, counts in hello.samples.items()}
        return honest(replace(hello, samples=other if 1 in other else hello.samples))

    monkeypatch.setattr(client_app, "pack_hello", lying)
    lines, _ = train(Nodes(three(), tmp_path / "home"), tmp_path / "runs", min_clients=4)
    refused = [event for event in rounds(lines)[0]["cost"]["nodes"] if event["event"] == "refused"]
    assert [event["node"] for event in refused] == ["102"]
    assert "samples" in refused[0]["reason"]
    assert rounds(lines)[0]["cohort"] == [0, 2, 3, 5]


def test_who_comes_for_the_clients_of_a_node_that_is_dead_gets_them_when_that_is_noticed(tmp_path: Path) -> None:
    """Flower takes most of a minute to notice: until then the newcomer is refused."""
    dead = {7: Node({"client-ids": "0-2"}), 8: Node({"client-ids": "3-5"}), 9: Node({"client-ids": "0-2"})}
    online = {1: (7, 8), 2: (7, 8, 9), 3: (7, 8, 9)}
    lines, state = train(Nodes(dead, tmp_path / "home", lambda call: online.get(call, (8, 9))), tmp_path / "runs")
    assert [event for event, node, _ in events(lines) if node == "9"] == ["refused", "joined"]
    assert state.nodes["9"] == (0, 1, 2)
    assert rounds(lines)[-1]["answered"] == [0, 1, 2, 3, 4, 5]


def test_a_node_of_clients_that_are_not_there_is_refused_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grid_module, "MEET_S", 0.3)
    strange = {"n104": {"client-ids": "4-9"}, "n105": {"partition-id": -1, "num-partitions": 7}}
    nodes = {name: Node(config) for name, config in strange.items()}
    lines, _ = train(Nodes(three(**nodes), tmp_path / "home"), tmp_path / "runs")
    refused = [event for event in rounds(lines)[0]["cost"]["nodes"] if event["event"] == "refused"]
    assert {event["node"]: event["reason"] for event in refused} == {
        "104": "it serves client 6: there are 0 to 5",
        "105": "a hello of clients that are none: ['-1']",
    }


def test_too_few_clients_end_the_run_with_a_reason_and_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grid_module, "MEET_S", 0.3)
    with pytest.raises(TooFewClients, match="2 clients are served, 6 are needed"):
        train(Nodes({101: Node({"partition-id": 0, "num-partitions": 3})}, tmp_path / "home"), tmp_path / "runs")
    assert list((tmp_path / "runs").glob("*/checkpoints/state-*.json"))


def test_when_everybody_left_for_good_the_run_ends(tmp_path: Path) -> None:
    nodes = Nodes(three(), tmp_path / "home", lambda call: (101, 102, 103) if call < 3 else ())
    with pytest.raises(TooFewClients, match="3 rounds in a row"):
        train(nodes, tmp_path / "runs")
    (record,) = (tmp_path / "runs").glob("*/metrics.jsonl")
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    assert [line["status"] for line in rounds(lines)][-3:] == ["empty"] * 3


def test_a_payload_that_another_node_has_just_forgotten_is_no_failure(tmp_path: Path) -> None:
    """Simulated nodes share a folder: what was listed may be gone, as a link that leads nowhere."""
    for number in range(6):
        (tmp_path / f"{number}.packet").touch()
    (tmp_path / "gone.packet").symlink_to(tmp_path / "nowhere")
    client_app.forget_old(tmp_path, but=tmp_path / "5.packet")
    (tmp_path / "gone.packet").unlink()
    client_app.forget_old(tmp_path, but=tmp_path / "5.packet")
    assert len(list(tmp_path.iterdir())) == client_app.KEPT_PAYLOADS


def test_a_payload_that_has_just_come_stays_though_the_clock_was_set_back(tmp_path: Path) -> None:
    for number in range(6):
        (tmp_path / f"{number}.packet").touch()
    os.utime(tmp_path / "5.packet", (0, 0))
    client_app.forget_old(tmp_path, but=tmp_path / "5.packet")
    assert len(list(tmp_path.iterdir())) == client_app.KEPT_PAYLOADS
    assert (tmp_path / "5.packet").exists()


def test_a_round_waits_for_no_more_nodes_than_its_quorum_needs() -> None:
    """0.28 times 25 is more than 7 in binary, and 7 answers are enough."""
    assert [needed_answers(0.28, 25), needed_answers(0.0, 25), needed_answers(0.5, 5)] == [7, 1, 3]
    assert round_status(7, 25, 0.28) == "ok"
