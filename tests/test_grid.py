"""The port over a Grid: what nodes answer, too late, wrongly or not at all."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, Error, Message, RecordDict
from played_nodes import SETTINGS, Node, Nodes, Reply, answer_to, events, late_in_round_2, rounds, three, train

from client import app as client_app
from fedcil.errors import TooFewClients
from server import grid as grid_module
from server.verdict import needed_answers, round_status

pytestmark = pytest.mark.usefixtures("inside_a_flower_run")


def test_who_misses_a_deadline_is_asked_again_when_it_answered(tmp_path: Path) -> None:
    nodes = Nodes(three(n102=Node({"partition-id": 1, "num-partitions": 3}, late_in_round_2)), tmp_path / "home")
    lines, _ = train(nodes, tmp_path / "runs")
    second, third = rounds(lines)[1:3]
    assert [failure["stage"] for failure in second["failures"]] == ["deadline", "deadline"]
    assert ("late", "102", (1, 4)) in events(lines)
    assert third["cohort"] == [0, 2, 3, 5]  # it still owes an answer
    assert second["status"] == third["status"] == "ok"


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


def test_an_answer_that_came_in_the_last_pause_is_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last look is after the deadline, not before it."""
    nodes, kept = Nodes(three(), tmp_path / "home"), dict[str, Message]()
    monkeypatch.setitem(SETTINGS["server"], "deadline_s", 0.001)

    def keeps(reply: Message, _: int) -> Reply:
        kept[reply.metadata.reply_to_message_id] = reply
        return None

    def later(started: float) -> None:
        assert time.monotonic() - started < 0.2
        time.sleep(0.01)
        nodes.replies.update(kept)

    nodes.nodes[102].change = keeps
    monkeypatch.setattr(grid_module, "pause", later)
    lines, _ = train(nodes, tmp_path / "runs")
    assert not any(line["failures"] for line in rounds(lines))


def test_a_reply_that_flower_cannot_read_costs_a_round_and_not_the_run(tmp_path: Path) -> None:
    """Flower unpacks what a node sent while it hands replies over; a broken one takes the others along, and who asks
    again for what has been handed over gets an error.
    """
    nodes = Nodes(three(), tmp_path / "home")
    honest, broken = nodes.pull_messages, [json.JSONDecodeError("Expecting value", "", 0)]

    def pull(ids: list[str]) -> list[Message]:
        replies = honest(ids)
        if nodes.nodes[102].works == 2 and broken:
            for reply in replies:
                lost = answer_to(reply, Message(Error(code=6, reason="unavailable"), reply_to=reply))
                nodes.replies[reply.metadata.reply_to_message_id] = lost
            raise broken.pop()
        return replies

    nodes.pull_messages = pull
    lines, _ = train(nodes, tmp_path / "runs")
    assert [len(line["failures"]) for line in rounds(lines)] == [0, 6, 0, 0, 0, 0]


def test_a_hello_that_answers_something_else_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it answers is said by the node."""
    nodes = Nodes(three(), tmp_path / "home")
    honest = nodes.pull_messages

    def pull(ids: list[str]) -> list[Message]:
        replies = honest(ids)
        for reply in replies:
            if reply.metadata.src_node_id == 102 and "hello" in reply.content:
                reply.metadata._reply_to_message_id = "something else"
        return replies

    nodes.pull_messages = pull
    lines, _ = train(nodes, tmp_path / "runs", min_clients=4)
    assert rounds(lines)[0]["cohort"] == [0, 2, 3, 5]
