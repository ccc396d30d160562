"""Which nodes are met, what they are offered, and when they are asked again."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message, RecordDict
from played_nodes import SETTINGS, Node, Nodes, events, late_in_round_2, rounds, three, train

from client import app as client_app
from fedcil.errors import InputError, TooFewClients
from server import grid as grid_module
from server import nodes as nodes_module

pytestmark = pytest.mark.usefixtures("inside_a_flower_run")


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


def test_who_has_room_left_is_offered_what_others_did_not_take(tmp_path: Path) -> None:
    """Both come at once and get an even offer; the one with room for more is asked again, and then no more."""
    plain = {7: Node({"clients": 1}), 8: Node({"clients": 5})}
    nodes = Nodes(plain, tmp_path / "home")
    lines, state = train(nodes, tmp_path / "runs")
    assert state.nodes == {"7": (0,), "8": (1, 2, 3, 4, 5)}
    assert [event for event in events(lines) if event[1] == "8"] == [
        ("joined", "8", (1, 3, 5)),
        ("joined", "8", (1, 2, 3, 4, 5)),
    ]
    assert [node.hellos for node in plain.values()] == [1, 2]


def test_who_comes_back_with_more_room_gets_more(tmp_path: Path) -> None:
    nodes = Nodes({7: Node({"clients": 6})}, tmp_path / "home")
    _, state = train(nodes, tmp_path / "runs", known={"7": (0, 3)})
    assert state.nodes == {"7": (0, 1, 2, 3, 4, 5)}


def test_what_a_node_with_clients_of_its_own_took_meanwhile_is_not_held_against_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are asked at once; the offer of the one is what the other says to be its own."""
    monkeypatch.setattr(grid_module, "MEET_S", 2.0)
    both = {7: Node({"clients": 4}, thinks=1), 8: Node({"client-ids": "0-1"})}
    lines, state = train(Nodes(both, tmp_path / "home"), tmp_path / "runs")
    assert state.nodes == {"7": (2, 3, 4, 5), "8": (0, 1)}
    assert "refused" not in {event for event, *_ in events(lines)}


def test_an_answer_that_waits_since_long_ago_is_heard_before_its_time_is_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two looks a round may take longer than a node has to answer."""
    monkeypatch.setattr(nodes_module, "SILENT_S", 0.0)
    slow = Node({"partition-id": 1, "num-partitions": 3}, thinks=1)
    train(Nodes(three(n102=slow), tmp_path / "home"), tmp_path / "runs", min_clients=4)
    assert slow.hellos == 1


def test_a_run_that_goes_on_needs_a_quorum_and_not_all_that_it_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grid_module, "MEET_S", 0.3)
    known = {"101": (0, 3), "102": (1, 4), "103": (2, 5)}
    two = {number: node for number, node in three().items() if number != 102}
    lines, _ = train(Nodes(two, tmp_path / "home"), tmp_path / "runs", known=known)
    assert all(line["answered"] == [0, 2, 3, 5] for line in rounds(lines))


def test_no_round_waits_for_more_clients_than_a_run_was_told_to_begin_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grid_module, "MEET_S", 0.0)
    monkeypatch.setitem(SETTINGS["server"], "quorum", 0.9)
    monkeypatch.setitem(SETTINGS["server"], "deadline_s", 60.0)
    began = time.monotonic()
    nodes = Nodes({101: three()[101]}, tmp_path / "home")
    lines, _ = train(nodes, tmp_path / "runs", min_clients=2)
    assert time.monotonic() - began < 30.0
    assert {len(line["answered"]) for line in rounds(lines)} == {2}


# What only a long run would show


def test_a_node_whose_answer_never_came_is_asked_again_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes_module, "OWED_S", 0.0)
    late = Node({"partition-id": 1, "num-partitions": 3}, late_in_round_2)
    lines, _ = train(Nodes(three(n102=late), tmp_path / "home"), tmp_path / "runs")
    assert [line["cohort"] for line in rounds(lines)] == [[0, 1, 2, 3, 4, 5]] * 6
    assert len([line for line in rounds(lines) if line["failures"]]) == 1


def test_a_hello_that_was_lost_is_sent_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes_module, "SILENT_S", 0.0)
    monkeypatch.setattr(grid_module, "MEET_S", 2.0)
    silent = Node({"partition-id": 1, "num-partitions": 3}, thinks=10**9)

    def here(call: int) -> Sequence[int]:
        if call == 3:
            silent.thinks = 0
        return (101, 102, 103)

    lines, _ = train(Nodes(three(n102=silent), tmp_path / "home", here), tmp_path / "runs")
    assert silent.hellos == 3
    assert rounds(lines)[0]["cohort"] == [0, 1, 2, 3, 4, 5]


def test_a_node_that_thinks_is_not_asked_a_second_time(tmp_path: Path) -> None:
    """It is known, so there is an offer for it in every look."""
    nodes = Nodes(three(n102=Node({"partition-id": 1, "num-partitions": 3}, thinks=3)), tmp_path / "home")
    train(nodes, tmp_path / "runs", known={"102": (1, 4)})
    assert nodes.nodes[102].hellos == 1


def test_a_node_that_could_not_say_hello_is_left_alone_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nodes_module, "AGAIN_S", 1e6)
    nodes = Nodes(three(n102=Node({"partition-id": 1, "num-partitions": 3}, breaks=1)), tmp_path / "home")
    lines, _ = train(nodes, tmp_path / "runs", min_clients=4)
    assert nodes.nodes[102].hellos == 1
    assert [event for event, node, _ in events(lines) if node == "102"] == ["silent"]


def test_who_was_refused_is_left_alone_while_nobody_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes_module, "AGAIN_S", 0.0)
    nodes = Nodes(three(n102=Node({"client-ids": "1,4,99"})), tmp_path / "home")
    train(nodes, tmp_path / "runs", min_clients=4)
    assert nodes.nodes[102].hellos == 1


def test_what_was_offered_to_a_node_that_left_is_free_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid_module, "MEET_S", 2.0)
    plain = {7: Node({"clients": 6}, thinks=10**9), 8: Node({"clients": 6})}
    nodes = Nodes(plain, tmp_path / "home", lambda call: (7,) if call == 1 else (8,))
    _, state = train(nodes, tmp_path / "runs")
    assert state.nodes == {"8": (0, 1, 2, 3, 4, 5)}


def test_who_left_and_returned_owes_nothing(tmp_path: Path) -> None:
    """One look in each round: late in the second, away in the third, back in the fourth."""
    late = Node({"partition-id": 1, "num-partitions": 3}, late_in_round_2)
    nodes = Nodes(three(n102=late), tmp_path / "home", lambda call: (101, 103) if call == 3 else (101, 102, 103))
    lines, _ = train(nodes, tmp_path / "runs")
    assert rounds(lines)[2]["cohort"] == [0, 2, 3, 5]
    assert rounds(lines)[3]["cohort"] == [0, 1, 2, 3, 4, 5]


def test_a_spare_node_that_left_is_met_again(tmp_path: Path) -> None:
    plain = {7: Node({"clients": 6}), 8: Node({"clients": 1})}
    nodes = Nodes(plain, tmp_path / "home", lambda call: (7,) if call in (1, 3) else (7, 8))
    lines, _ = train(nodes, tmp_path / "runs")
    assert [event for event, node, _ in events(lines) if node == "8"] == ["spare", "left", "spare"]


def test_a_spare_node_gets_what_a_refused_one_was_offered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven nodes for six clients: the sixth is refused, and the seventh takes its place."""
    monkeypatch.setattr(nodes_module, "AGAIN_S", 0.0)
    monkeypatch.setattr(grid_module, "MEET_S", 2.0)
    honest, lies = client_app.pack_hello, [True]

    def lying(hello: Any) -> bytes:
        lie = 5 in hello.samples and bool(lies) and lies.pop()
        return honest(replace(hello, data="other") if lie else hello)

    monkeypatch.setattr(client_app, "pack_hello", lying)
    plain = {number: Node({"clients": 1}) for number in range(7, 14)}
    lines, state = train(Nodes(plain, tmp_path / "home"), tmp_path / "runs")
    assert state.nodes["13"] == (5,)
    assert [event for event, node, _ in events(lines) if node == "13"] == ["spare", "joined"]


def test_a_node_whose_own_share_is_empty_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes_module, "AGAIN_S", 0.0)
    more = three(n104=Node({"partition-id": 6, "num-partitions": 7}))
    nodes = Nodes(more, tmp_path / "home", lambda _: (101, 103, 104))
    train(nodes, tmp_path / "runs", min_clients=4)  # clients 1 and 4 stay free
    assert nodes.nodes[104].hellos == 1


def test_too_few_clients_say_what_became_of_the_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid_module, "MEET_S", 0.3)
    nodes = three(n102=Node({"client-ids": "1,4,99"}), n104=Node({"partition-id": 6, "num-partitions": 7}))
    with pytest.raises(TooFewClients, match=r"\(4 nodes here, 2 serve, 1 spare, 1 refused\)"):
        train(Nodes(nodes, tmp_path / "home"), tmp_path / "runs")


@pytest.mark.usefixtures("no_home")
def test_a_node_without_a_home_says_what_to_set(tmp_path: Path) -> None:
    def context(**config: str) -> Context:
        return Context(run_id=1, node_id=1, node_config=dict(config), state=RecordDict(), run_config={})

    assert client_app.client_home(context(home=str(tmp_path))) == tmp_path
    with pytest.raises(InputError, match="no home folder") as error:
        client_app.client_home(context())
    assert "FEDCIL_CLIENT_HOME" in error.value.next


@pytest.mark.parametrize("dropped", [0, 1])
def test_messages_that_flower_could_not_send_cost_a_round_and_not_the_run(
    dropped: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gives back no id at all where a proxy refuses so many bytes, and fewer where its state takes fewer."""
    monkeypatch.setattr(nodes_module, "AGAIN_S", 0.0)

    class Narrow(Nodes):
        pushes = 0

        def push_messages(self, messages: list[Message]) -> list[str]:
            self.pushes += 1
            if self.pushes in (1, 3):  # the first hellos, and the first round
                return super().push_messages(messages[:dropped])
            return super().push_messages(messages)

    lines, _ = train(Narrow(three(), tmp_path / "home"), tmp_path / "runs")
    first, *others = rounds(lines)
    assert {failure["stage"] for failure in first["failures"]} == {"push"}
    assert first["answered"] == []
    assert [line["answered"] for line in others] == [[0, 1, 2, 3, 4, 5]] * (len(others))
