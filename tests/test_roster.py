"""Which node serves which clients, whoever comes, leaves, returns or lies."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcil.errors import MessageRefused
from fedcil.hello import Hello, pack_hello, unpack_hello
from fedcil.wire import pack
from server.roster import Roster

SAMPLES = [(10, 20), (11, 21), (12, 22), (13, 23), (14, 24), (15, 25)]


def roster(**shares: tuple[int, ...]) -> Roster:
    return Roster(SAMPLES, "digest", "fp32", {int(node[1:]): share for node, share in shares.items()})


def hello(*clients: int, fixed: bool = False, data: str = "digest") -> Hello:
    return Hello({client: SAMPLES[client] for client in clients}, data, "fp32", fixed)


def test_newcomers_share_out_what_is_free() -> None:
    assert roster(n9=(0, 1)).offers([7, 8]) == {7: (2, 4), 8: (3, 5)}


def test_who_returns_is_offered_what_it_had() -> None:
    assert roster(n9=(0, 1), n8=(2, 3, 4, 5)).offers([9]) == {9: (0, 1)}


def test_when_all_are_served_a_newcomer_is_spare() -> None:
    full = roster(n9=(0, 1, 2, 3, 4, 5))
    assert full.offers([7]) == {7: ()}
    assert full.welcome(7, hello(), (), {9}) == ()


def test_clients_of_a_node_that_is_away_stay_its_own() -> None:
    assert roster(n9=(0, 1)).offers([7])[7] == (2, 3, 4, 5)


def test_a_node_with_its_own_clients_takes_them_from_one_that_is_away_only() -> None:
    both = roster(n9=(0, 1))
    with pytest.raises(MessageRefused, match="node 9 serves client 1 already"):
        both.welcome(7, hello(1, 2, fixed=True), (), {9})
    assert both.welcome(7, hello(1, 2, fixed=True), (), set()) == (1, 2)
    assert both.shares == {9: (0,), 7: (1, 2)}


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (hello(0, data="other"), "other data"),
        (Hello({0: SAMPLES[0]}, "digest", "bf16", True), "computes in 'bf16', the server in fp32"),
        (Hello({0: (1, 1)}, "digest", "fp32", True), r"client 0 has \[1, 1\] samples"),
        (Hello({99: (1, 1)}, "digest", "fp32", True), "client 99"),
        (hello(5), "not offered"),
    ],
)
def test_a_node_that_does_not_fit_is_refused(said: Hello, reason: str) -> None:
    new = roster()
    with pytest.raises(MessageRefused, match=reason):
        new.welcome(7, said, (0, 1), set())
    assert new.shares == {}


@given(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 3), st.booleans()), max_size=30))
def test_no_client_ever_has_two_nodes_and_nobody_forgets_its_own(visits: list[tuple[int, int, bool]]) -> None:
    """Nodes come, take up to ``room`` clients, and go; the share of one that has room for it only grows."""
    book, present = roster(), set[int]()
    for node, room, leaves in visits:
        offer = book.offers([node])[node]
        before = dict(book.shares)
        taken = offer[: max(room, len(before.get(node, ()))) or None]
        share = book.welcome(node, hello(*taken), offer, present)
        present = present - {node} if leaves else present | {node}
        assert set(before.get(node, ())) <= set(share)
        served = [client for each in book.shares.values() for client in each]
        assert len(served) == len(set(served))


@given(st.dictionaries(st.integers(0, 10**6), st.tuples(st.integers(0, 10**9), st.integers(0, 10**9))), st.booleans())
def test_a_hello_survives_the_wire(samples: dict[int, tuple[int, int]], fixed: bool) -> None:
    said = Hello(samples, "digest", "fp32", fixed)
    assert unpack_hello(pack_hello(said), tasks=2, limit=1 << 24) == said


@given(st.binary(max_size=200))
def test_anything_else_is_no_hello(content: bytes) -> None:
    with pytest.raises(MessageRefused):
        unpack_hello(content, tasks=2, limit=1 << 24)


@pytest.mark.parametrize("client", ["1" * 5000, "-1", "²", "", "1.0"])
def test_a_client_that_is_no_number_is_refused(client: str) -> None:
    said = {"samples": {client: [1, 2]}, "data": "digest", "precision": "fp32", "fixed": True}
    with pytest.raises(MessageRefused, match="clients that are none"):
        unpack_hello(pack(said, {}), tasks=2, limit=1 << 24)


def test_a_node_has_no_room_for_a_story_in_the_record() -> None:
    long = Hello({0: (10**4000, 10**4000)}, "digest", "fp32", True)
    for said in (hello(0, data="d" * 10**6), Hello({0: SAMPLES[0]}, "digest", "p" * 10**6, True), long):
        with pytest.raises(MessageRefused) as caught:
            roster().welcome(7, said, (0, 1), set())
        assert len(caught.value.what) < 200


def test_counts_of_another_number_of_tasks_are_refused() -> None:
    with pytest.raises(MessageRefused, match="3 counts"):
        unpack_hello(pack_hello(hello(0)), tasks=3, limit=1 << 24)


def test_who_returns_with_less_room_leaves_the_rest_to_others() -> None:
    book = roster(n9=(0, 1, 2))
    assert book.welcome(9, hello(0, 1), (0, 1, 2), set()) == (0, 1)
    assert book.shares == {9: (0, 1)}
    assert book.free() == [2, 3, 4, 5]


def test_of_many_clients_that_are_taken_five_are_named() -> None:
    with pytest.raises(MessageRefused, match=r"node 9 serves client 0, 1, 2, 3, 4 and more already"):
        roster(n9=(0, 1, 2, 3, 4, 5)).welcome(7, hello(0, 1, 2, 3, 4, 5, fixed=True), (), {9})


def test_of_what_it_was_offered_a_node_gets_what_nobody_took_meanwhile() -> None:
    book = roster(n9=(0, 1))
    assert book.welcome(7, hello(0, 2), (0, 2, 4), {9}) == (2,)
    assert book.welcome(8, hello(1), (1,), {9}) == ()
    assert book.shares == {9: (0, 1), 7: (2,), 8: ()}


def test_who_has_clients_is_offered_more_when_nobody_has_none() -> None:
    book = roster(n9=(0, 3), n8=(1,))
    assert book.offers([8, 9]) == {8: (1, 2, 5), 9: (0, 3, 4)}
    assert book.offers([7, 8, 9]) == {7: (2, 4, 5), 8: (1,), 9: (0, 3)}
