"""Randomness by place: what a draw is for decides it, and nothing else."""

from __future__ import annotations

import random
import threading
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch

from fedcil.keys import Key, global_draws
from fedcil.threads import Threads

GOLDEN_PATH = (3505024383920981240, 12182186227813193364)
GOLDEN_NUMPY = [1609903176, 2069831710, 2130460843, 757859199]
GOLDEN_TORCH = [1368755419, 572381342, 1554299015, 392841802]


def numbers(key: Key) -> list[int]:
    return key.numpy().integers(0, 2**31, size=4).tolist()


def torch_numbers(key: Key) -> list[int]:
    return torch.randint(0, 2**31, (4,), generator=key.torch()).tolist()


def test_a_draw_does_not_depend_on_earlier_draws() -> None:
    key = Key(7)
    alone = numbers(key.at("round", 2)), torch_numbers(key.at("round", 2))
    for round in range(5):
        numbers(key.at("round", round))
        torch_numbers(key.at("round", round))
    assert (numbers(key.at("round", 2)), torch_numbers(key.at("round", 2))) == alone


def test_each_call_gives_a_fresh_generator() -> None:
    key = Key(7).at("x")
    assert numbers(key) == numbers(key)
    assert torch_numbers(key) == torch_numbers(key)


def test_a_path_may_be_spelled_in_pieces() -> None:
    assert Key(1).at("task", 3, "round", 7) == Key(1).at("task", 3).at("round", 7)


def test_places_differ() -> None:
    """Seed, type, value, order and depth of a path all make another place."""
    places = [
        Key(0),
        Key(1),
        Key(0).at(1),
        Key(0).at("1"),
        Key(0).at(1, 2),
        Key(0).at(2, 1),
        Key(0).at(12),
        Key(0).at("a", "b"),
        Key(0).at("ab"),
        Key(0).at("a", "b", ""),
        Key(0).at("a", "b", 0),
        Key(0).at(-1),
    ]
    assert len({tuple(numbers(place)) for place in places}) == len(places)
    assert len({tuple(torch_numbers(place)) for place in places}) == len(places)


@pytest.mark.parametrize("element", [np.int64(3), True, 3.0, None, ("a",)])
def test_other_types_are_refused(element: object) -> None:
    """A NumPy 3 that is a place of its own would give engines different draws without a word."""
    with pytest.raises(TypeError, match="made of str and int"):
        Key(0).at("client", element)  # type: ignore[arg-type]


def test_no_global_generator_is_touched() -> None:
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    numbers(Key(3).at("x"))
    torch_numbers(Key(3).at("x"))
    after = random.getstate(), np.random.get_state(), torch.get_rng_state()
    assert before[0] == after[0]
    assert before[1][1].tolist() == after[1][1].tolist()  # type: ignore[index]
    assert torch.equal(before[2], after[2])


def test_global_seeds_change_nothing() -> None:
    key = Key(3).at("x")
    first = numbers(key), torch_numbers(key)
    random.seed(1)
    np.random.seed(1)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        assert (numbers(key), torch_numbers(key)) == first


def test_the_numbers_are_these_for_ever() -> None:
    """Recorded values: a change means that no earlier run can be repeated or resumed."""
    key = Key(42).at("task", 3, "round", 7, "client", 12)
    assert key.path[:2] == GOLDEN_PATH
    assert numbers(key) == GOLDEN_NUMPY
    assert torch_numbers(key) == GOLDEN_TORCH


def test_keys_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        Key(0).seed = 1  # type: ignore[misc]


def test_draws_beside_a_thread_that_was_left_behind_are_refused() -> None:
    """Where nothing is drawn nothing can be wrong; afterwards the generator is as it was before the one that hangs."""
    hold, began = threading.Event(), threading.Event()

    def hang() -> None:
        with global_draws(Key(1)):
            began.set()
            hold.wait(5.0)

    threads = Threads(1)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        before = torch.get_rng_state()
        threads.do(hang)
        assert began.wait(5.0)
        threads.end(0.0)
        try:
            with global_draws(Key(2)):
                pass
            with pytest.raises(RuntimeError, match="a client that hangs has torch's generator"), global_draws(Key(2)):
                torch.rand(1)
        finally:
            hold.set()
        assert torch.equal(torch.get_rng_state(), before)
