"""Threads that can be left behind, and a turn that is not waited for then."""

from __future__ import annotations

import threading
import time
from functools import partial

import pytest

from fedcil.threads import Threads, Turn, left_behind

SOON_S = 5.0


def wait_for_nobody() -> None:
    end = time.monotonic() + SOON_S
    while left_behind():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("count", [1, 3])
def test_every_call_is_done_and_the_threads_end(count: int) -> None:
    before, done = set(threading.enumerate()), list[int]()
    threads = Threads(count)
    for number in range(20):
        threads.do(partial(done.append, number))
    assert threads.wait(SOON_S)
    assert sorted(done) == list(range(20))
    threads.end(SOON_S)
    assert set(threading.enumerate()) == before


def test_one_that_hangs_is_left_behind_and_ends_when_it_comes_back() -> None:
    threads, hold = Threads(2), threading.Event()
    threads.do(partial(hold.wait, SOON_S))
    assert not threads.wait(0.05)
    assert not left_behind()
    threads.end(0.0)
    assert left_behind()
    hold.set()
    wait_for_nobody()


def test_a_turn_is_one_at_a_time() -> None:
    turn, inside, most = Turn(), list[int](), list[int]()
    threads = Threads(4)

    def call() -> None:
        with turn.taken() as still_mine:
            inside.append(1)
            time.sleep(0.002)
            most.append(len(inside) if still_mine() else 0)
            inside.pop()

    for _ in range(20):
        threads.do(call)
    threads.end(SOON_S)
    assert most == [1] * 20


def test_nobody_waits_for_the_turn_of_one_that_was_left_behind() -> None:
    turn, hold, began, said = Turn(), threading.Event(), threading.Event(), list[bool]()

    def hang() -> None:
        with turn.taken() as still_mine:
            began.set()
            hold.wait(SOON_S)
            said.append(still_mine())

    threads = Threads(1)
    threads.do(hang)
    assert began.wait(SOON_S)
    threads.end(0.0)
    with turn.taken() as still_mine:
        hold.set()
        wait_for_nobody()
        assert said == [False]
        assert still_mine()  # who came back has not ended it
