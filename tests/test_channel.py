"""What a run and its worker processes send each other: tensors in shared memory, everything else as JSON."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedcil.engines import forks
from fedcil.engines.channel import Channel
from fedcil.engines.fork_messages import Answering, Asking
from fedcil.fold import Fold
from fedcil.messages import Broadcast, Failure, Job, Payload, Reply, Report, Request
from fedcil.rule import Rule
from fedcil.tensors import Contribution

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="worker processes need memfd_create, which is Linux's")

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool)


@contextlib.contextmanager
def both_ends() -> Iterator[tuple[Channel, Channel]]:
    """Each with file descriptors of its own, as in two processes."""
    here, there = socket.socketpair()
    one, two = os.memfd_create("one"), os.memfd_create("two")
    first, second = Channel(here, one, two), Channel(there, os.dup(two), os.dup(one))
    try:
        yield first, second
    finally:
        first.close()
        second.close()


@pytest.fixture
def channel() -> Iterator[tuple[Channel, Channel]]:
    with both_ends() as ends:
        yield ends


@st.composite
def named_tensors(draw: st.DrawFn) -> dict[str, Tensor]:
    """Up to 4 tensors of any type and up to 3 dimensions, some of them empty, some not contiguous."""
    tensors = {}
    for place in range(draw(st.integers(0, 4))):
        shape = draw(st.lists(st.integers(0, 5), max_size=3))
        made = torch.arange(torch.Size(shape).numel() * 2).reshape(*shape, 2) + draw(st.integers(0, 99))
        halved = made[..., draw(st.integers(0, 1))]
        tensors[f"tensor {place}"] = halved.transpose(0, -1) if shape else halved
        tensors[f"tensor {place}"] = tensors[f"tensor {place}"].to(draw(st.sampled_from(DTYPES)))
    return tensors


@given(st.lists(st.lists(named_tensors(), max_size=3), min_size=1, max_size=4), st.booleans())
def test_tensors_arrive_as_they_were_sent(messages: list[list[dict[str, Tensor]]], copied: bool) -> None:
    with both_ends() as (here, there):
        for number, groups in enumerate(messages):
            here.send({"number": number}, *groups)
            header, got = there.receive(copied=copied)
            assert header == {"number": number}
            assert len(got) == len(groups)
            for sent, arrived in zip(groups, got, strict=True):
                assert list(arrived) == list(sent)
                for name, tensor in sent.items():
                    assert (arrived[name].dtype, arrived[name].shape) == (tensor.dtype, tensor.shape)
                    assert torch.equal(arrived[name], tensor)


def test_copies_stay_and_views_are_the_others_memory(channel: tuple[Channel, Channel]) -> None:
    here, there = channel
    here.send(1, {"a": torch.zeros(3)})
    _, (copy,) = there.receive(copied=True)
    here.send(2, {"a": torch.ones(3)})
    _, (view,) = there.receive()
    assert copy["a"].tolist() == [0, 0, 0]
    here.send(3, {"a": torch.full((3,), 2.0)})
    assert view["a"].tolist() == [2, 2, 2]


def test_a_channel_says_that_nothing_came_or_that_nobody_is_there(channel: tuple[Channel, Channel]) -> None:
    here, there = channel
    for wait_s in (0.0, 0.01):
        with pytest.raises(TimeoutError):
            here.receive(wait_s)
    long = "x" * 70_000
    there.send(long)
    assert here.receive(1.0)[0] == long
    there.hang_up()
    with pytest.raises(EOFError):
        here.receive()
    with pytest.raises(EOFError):
        there.receive()


def test_broadcast_and_payload_travel_once(channel: tuple[Channel, Channel]) -> None:
    """Sent again they would be views of other memory than before."""
    asking, answering = Asking(channel[0]), Answering(channel[1])
    payload = Payload.of({"generator": torch.arange(4.0)})
    rule = Rule("krum", 1, 2.0, None)
    seen = []
    for round_ in range(2):
        model = {"weight": torch.full((2, 2), float(round_))}
        broadcast = Broadcast(task=3, phase=1, round=round_, tensors=model, payload=payload)
        for client in range(2):
            asked = Request(broadcast, (Job(client, client, "kept"), Job(5, 2)), 7, rule)
            asking.send(asked)
            got = answering.receive()
            assert (got.jobs, got.cohort, got.rule) == (asked.jobs, 7, rule)
            assert (got.broadcast.task, got.broadcast.phase, got.broadcast.round) == (3, 1, round_)
            assert torch.equal(got.broadcast.tensors["weight"], model["weight"])
            assert got.broadcast.payload is not None
            assert got.broadcast.payload.hash == payload.hash
            assert torch.equal(got.broadcast.payload.tensors["generator"], payload.tensors["generator"])
            seen.append((got.broadcast, got.broadcast.payload))
    assert seen[0][0] is seen[1][0]
    assert seen[1][0] is not seen[2][0]
    assert len({id(each) for _, each in seen}) == 1
    asking.send(Request(Broadcast(task=4, phase=0, round=0, tensors={"weight": torch.zeros(1)}), (Job(1, 0),), 1))
    assert answering.receive().broadcast.payload is None


def test_a_reply_arrives_as_it_was_given(channel: tuple[Channel, Channel]) -> None:
    asking, answering = Asking(channel[0]), Answering(channel[1])
    fold = Fold.empty(5)
    for leaf in (0, 1, 4):
        fold.add(leaf, Contribution({"weight": torch.randn(3, 3), "mean": torch.randn(3)}, 2.0 + leaf))
    fold.absent(3)
    expected = dict(fold.sums)
    report = Report(client=7, samples=3, metrics={"loss": 0.1, "steps": 4}, state="s", state_bytes=1, bytes_up=2)
    end = time.process_time() + 0.05
    while time.process_time() < end:
        pass
    answering.send(Reply(fold, (report,), (Failure(3, "client", "broken"),)))
    got = asking.receive(1.0)
    assert got.cpu_elsewhere >= 0.05
    assert got.reports == (report,)
    assert got.failures == (Failure(3, "client", "broken"),)
    assert got.fold.leaves == 5
    assert got.fold.sums.keys() == expected.keys()
    for node, total in expected.items():
        arrived = got.fold.sums[node]
        if total is None:
            assert arrived is None
        else:
            assert arrived is not None
            assert arrived.weight == total.weight
            assert all(torch.equal(arrived.tensors[name], total.tensors[name]) for name in total.tensors)


def test_a_worker_that_cannot_be_told_is_given_up(
    channel: tuple[Channel, Channel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It lives, and would wait for ever, as the run would for it."""

    def refuse(*_: int) -> None:
        raise OSError(27, "File too large")

    monkeypatch.setattr(os, "ftruncate", refuse)
    fork = forks.Fork(channel[0])
    fork.ask(Request(Broadcast(task=0, phase=0, round=0, tensors={"weight": torch.zeros(4)}), (Job(0, 0),), 1))
    with pytest.raises(EOFError):
        fork.answer(lambda: None)
    with pytest.raises(EOFError):
        channel[1].receive()
