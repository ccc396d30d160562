"""The numbering of rounds: the place of a round's line among the lines of kind ``round``."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from fedcil.timeline import Timeline

LENGTHS = st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=3), min_size=1, max_size=4)


@settings(deadline=None)
@given(lengths=LENGTHS)
def test_rounds_are_numbered_in_the_order_in_which_they_come(lengths: list[list[int]]) -> None:
    timeline = Timeline.of(lengths)
    places = [(t, p, r) for t, phases in enumerate(lengths) for p, rounds in enumerate(phases) for r in range(rounds)]
    assert [timeline.round_number(*place) for place in places] == list(range(timeline.rounds))
    assert [timeline.lengths(task) for task in range(len(lengths))] == lengths


@settings(deadline=None)
@given(lengths=LENGTHS)
def test_behind_a_task_comes_the_next_one_and_behind_the_last_the_end(lengths: list[list[int]]) -> None:
    timeline = Timeline.of(lengths)
    for task, phases in enumerate(lengths):
        assert (
            timeline.round_number(task, len(phases), 0)
            == timeline.round_number(task + 1, 0, 0)
            == timeline.span(task).stop
        )
    assert timeline.round_number(len(lengths), 0, 0) == timeline.rounds
