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
    assert set(threading.enumerate()) <= before


def test_one_that_hangs_is_left_behind_and_ends_when_it_comes_back() -> None:
    wait_for_nobody()  # of an earlier test
    threads, hold = Threads(2), threading.Event()
    threads.do(partial(hold.wait, SOON_S))
    assert not threads.wait(0.05)
    assert not left_behind()
    threads.end(0.0)
    assert left_behind()
    hold.set()
    wait_for_nobody()


class Light:
    """Red before anybody's turn."""

    def __init__(self) -> None:
        self.colour = "red"

    def show(self) -> str:
        return self.colour

    def set(self, colour: str) -> None:
        self.colour = colour


def test_a_turn_is_one_at_a_time_and_leaves_things_as_they_were() -> None:
    turn, light, inside, most = Turn(), Light(), list[int](), list[int]()
    threads = Threads(4)

    def call() -> None:
        with turn.taken(light.show, light.set) as alone:
            light.set("green")
            inside.append(1)
            time.sleep(0.002)
            most.append(len(inside) if alone else 0)
            inside.pop()

    for _ in range(20):
        threads.do(call)
    threads.end(SOON_S)
    assert most == [1] * 20
    assert light.colour == "red"


def test_nobody_waits_for_the_turn_of_one_that_was_left_behind() -> None:
    turn, light, hold, began, said = Turn(), Light(), threading.Event(), threading.Event(), list[str]()

    def hang() -> None:
        with turn.taken(light.show, light.set):
            light.set("green")
            began.set()
            hold.wait(SOON_S)

    def wait() -> None:
        try:
            with turn.taken(light.show, light.set):
                said.append("had a turn")
        except RuntimeError as error:
            said.append(str(error))

    threads = Threads(2)
    threads.do(hang)
    assert began.wait(SOON_S)
    threads.do(wait)
    threads.end(0.0)
    with turn.taken(light.show, light.set) as alone:
        assert not alone
        light.set("blue")
    assert light.colour == "red"  # not what the one that hangs had made of it
    with turn.taken(light.show, light.set):
        hold.set()
        wait_for_nobody()
        light.set("blue")
    assert light.colour == "red"
    assert said == ["this thread was left behind"]
    with turn.taken(light.show, light.set) as alone:
        assert alone
