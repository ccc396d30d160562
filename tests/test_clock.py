"""The simulated clock: devices by client, and who is in when a round closes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcil.clock import Devices, close_round, make_devices
from fedcil.errors import ScenarioError
from fedcil.keys import Key
from fedcil.tables import ClockSection

LOGNORMAL = {"name": "lognormal", "samples_per_s": 50.0, "down_bytes_per_s": 2e6, "up_bytes_per_s": 5e5}


def devices(clients: int = 10, seed: int = 0, **options: Any) -> Devices:
    made = make_devices(ClockSection(**options), clients, Key(seed))
    assert made is not None
    return made


def test_off_is_no_clock() -> None:
    assert make_devices(ClockSection(), 5, Key(0)) is None


def test_seconds_are_receiving_training_and_sending() -> None:
    """1000 bytes at 100 a second, 30 samples at 3 a second, 40 bytes at 8 a second."""
    made = Devices(np.array([1.0, 3.0]), np.array([1.0, 100.0]), np.array([1.0, 8.0]))
    assert made.seconds(1, samples=30, down=1000, up=40) == 10.0 + 10.0 + 5.0


def test_lognormal_has_the_median_and_the_spread_it_was_told() -> None:
    """20,000 clients: the median's logarithm deviates by 1.25 * sigma / sqrt(20000) = 0.009 sigma."""
    made = devices(20_000, speed_sigma=1.0, network_sigma=0.5, **LOGNORMAL)
    for values, median, sigma in ((made.speed, 50.0, 1.0), (made.down, 2e6, 0.5), (made.up, 5e5, 0.5)):
        assert np.median(values) == pytest.approx(median, rel=0.05)
        assert np.log(values).std() == pytest.approx(sigma, rel=0.03)
    assert np.allclose(made.down / made.up, 4.0)
    assert abs(np.corrcoef(np.log(made.speed), np.log(made.down))[0, 1]) < 0.04


def test_shares_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(ScenarioError, match="the clock gives clients"):
        devices(name="tiers", tiers=[[1e308, 1.0, 1.0, 1.0], [1e308, 2.0, 2.0, 2.0]])


@pytest.mark.parametrize(
    "odd",
    [{"speed_sigma": 1000.0}, {"network_sigma": 1e12}, {"samples_per_s": 1e-307}, {"down_bytes_per_s": 1e-320}],
)
def test_times_that_are_no_numbers_are_refused(odd: dict[str, float]) -> None:
    with pytest.raises(ScenarioError, match="the clock gives clients") as caught:
        devices(**LOGNORMAL | odd)
    assert caught.value.where == "clock"


def test_without_spread_all_are_the_median() -> None:
    made = devices(speed_sigma=0.0, network_sigma=0.0, **LOGNORMAL)
    assert set(made.speed) == {50.0}
    assert set(made.down) == {2e6}


@pytest.mark.parametrize("options", [LOGNORMAL, {"name": "tiers", "tiers": [[1, 1.0, 2, 3], [2, 4, 5, 6]]}])
def test_a_device_is_a_matter_of_key_and_client(options: dict[str, Any]) -> None:
    """More clients leave the first ones as they are; another seed does not."""
    few, many, other = devices(5, **options), devices(50, **options), devices(50, seed=1, **options)
    for name in ("speed", "down", "up"):
        assert np.array_equal(getattr(few, name), getattr(many, name)[:5])
        assert not np.array_equal(getattr(many, name), getattr(other, name))


def test_tiers_come_in_their_shares() -> None:
    """10,000 clients, shares 1 : 3 (they need not sum to 1): deviation sqrt(0.25 * 0.75 / 10000) = 0.0043."""
    made = devices(10_000, name="tiers", tiers=[[1.0, 10.0, 20.0, 30.0], [3.0, 1.0, 2.0, 3.0]])
    assert (made.speed == 10.0).mean() == pytest.approx(0.25, abs=0.02)
    assert {tuple(row) for row in zip(made.speed, made.down, made.up, strict=True)} == {(10, 20, 30), (1, 2, 3)}


BAD = [
    {"name": "lognormal", "samples_per_s": 1.0},
    {"name": "tiers"},
    {"tiers": [[1.0, 1.0, 1.0, 1.0]]},
    {"name": "tiers", "tiers": []},
    {"name": "tiers", "tiers": [[1.0, 1.0, 1.0]]},
    {"name": "tiers", "tiers": [[1.0, 0.0, 1.0, 1.0]]},
    {"deadline_s": 3.0},
    {"late": "fold"},
]


@pytest.mark.parametrize("options", BAD)
def test_half_a_clock_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"clock|lognormal|tiers"):
        ClockSection(**options)


# Closing a round

DURATIONS = {3: 5.0, 4: 1.0, 7: 2.0, 9: 8.0}


def test_all_are_waited_for_if_all_are_wanted() -> None:
    closed = close_round(DURATIONS, {}, 4, None)
    assert (closed.on_time, closed.late, closed.dropped, closed.seconds) == ((3, 4, 7, 9), {}, (), 8.0)


def test_the_round_closes_with_the_last_one_wanted() -> None:
    closed = close_round(DURATIONS, {}, 2, None)
    assert (closed.on_time, closed.late, closed.seconds) == ((4, 7), {3: 5.0, 9: 8.0}, 2.0)


def test_the_deadline_comes_first_if_it_is_sooner() -> None:
    closed = close_round(DURATIONS, {}, 4, 5.0)
    assert (closed.on_time, closed.late, closed.seconds) == ((3, 4, 7), {9: 8.0}, 5.0)
    assert close_round(DURATIONS, {}, 2, 5.0).seconds == 2.0


def test_who_vanishes_is_not_waited_for() -> None:
    closed = close_round(DURATIONS, {9: 0.5, 4: 0.9}, 4, None)
    assert (closed.on_time, closed.late, closed.dropped, closed.seconds) == ((3, 7), {}, (4, 9), 5.0)
    assert close_round(DURATIONS, {9: 0.75, 4: 0.9}, 4, None).seconds == 6.0  # it was waited for until then
    assert close_round({1: 4.0}, {1: 0.25}, 1, None).seconds == 1.0


def test_ties_are_taken_by_id() -> None:
    closed = close_round({5: 1.0, 2: 1.0, 8: 1.0}, {}, 2, None)
    assert (closed.on_time, closed.late) == ((2, 5), {8: 1.0})


@settings(deadline=None)
@given(
    seconds=st.lists(st.sampled_from([0.5, 1.0, 2.0, 3.5, 9.0]), min_size=1, max_size=12),
    broken=st.sets(st.integers(0, 11)),
    wanted=st.integers(1, 12),
    deadline=st.none() | st.sampled_from([0.25, 1.0, 4.0]),
)
def test_everyone_is_in_late_or_gone(
    seconds: list[float], broken: set[int], wanted: int, deadline: float | None
) -> None:
    durations = dict(enumerate(seconds))
    gone = {client: 0.5 for client in broken if client in durations}
    closed = close_round(durations, gone, wanted, deadline)
    assert closed.seconds is not None
    groups = [set(closed.on_time), set(closed.late), set(closed.dropped)]
    assert sorted(client for group in groups for client in group) == sorted(durations)
    assert groups[2] == set(gone)
    assert len(closed.on_time) <= wanted
    assert all(durations[client] <= closed.seconds for client in closed.on_time)
    assert all(closed.late[client] == durations[client] >= closed.seconds for client in closed.late)
    assert deadline is None or closed.seconds <= deadline
    if deadline is None:
        assert len(closed.on_time) == min(wanted, len(durations) - len(gone))
