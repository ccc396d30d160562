"""Who belongs to the federation: newcomers are new, leavers do not come back, and samples go to members only."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcil.errors import ScenarioError
from fedcil.experiment import open_experiment
from fedcil.keys import Key
from fedcil.partition import digest_of_partition, make_partition
from fedcil.partitioners import PARTITIONERS
from fedcil.population import Population, make_population, steps_inside
from fedcil.scenario_file import load_scenario
from fedcil.stream import Stream, Task
from fedcil.tables import PartitionSection, PopulationSection
from fedcil.timeline import Timeline

SHARES = st.sampled_from([0.0, 0.1, 0.25, 0.3, 0.5, 1.0])
TURNOVER = st.builds(
    PopulationSection,
    name=st.just("turnover"),
    size=st.integers(1, 12),
    replaced_per_task=SHARES,
    replaced_per_round=SHARES,
)
GROWING = st.builds(
    PopulationSection,
    name=st.just("growing"),
    size=st.integers(1, 12),
    newcomers=st.integers(0, 5),
    move_on=SHARES,
)
TIMELINES = st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=2), min_size=1, max_size=4).map(Timeline.of)


def made(section: PopulationSection, timeline: Timeline, seed: int = 0, spare: int = 0) -> Population:
    needed = section.needed(len(timeline.starts) - 1, steps_inside(timeline))
    return make_population(section, needed + spare, timeline, Key(seed))


def ids(mask: Any) -> set[int]:
    return set(np.flatnonzero(mask).tolist())


@settings(deadline=None)
@given(section=TURNOVER, timeline=TIMELINES, seed=st.integers(0, 9), spare=st.integers(0, 3))
def test_turnover_keeps_the_size_and_replaces_whom_it_says(
    section: PopulationSection, timeline: Timeline, seed: int, spare: int
) -> None:
    population = made(section, timeline, seed, spare)
    here, known = ids(population.present(0)), section.size or 0
    assert here == set(range(known))
    for task in range(len(timeline.starts)):
        for phase, rounds in enumerate(timeline.lengths(task)):
            for round_ in range(rounds):
                before, here = here, ids(population.present(timeline.round_number(task, phase, round_)))
                assert len(here) == section.size
                share = section.replaced_per_round if round_ else section.replaced_per_task * (not phase and task > 0)
                count = section.replaced(share)
                assert len(before - here) == count
                assert here - before == set(range(known, known + count))  # never seen before
                known += count
    assert known == len(population.arrives) - spare


@settings(deadline=None)
@given(section=GROWING, timeline=TIMELINES, seed=st.integers(0, 9))
def test_growing_groups_are_new_between_and_old(section: PopulationSection, timeline: Timeline, seed: int) -> None:
    """GLFC's three groups: U_n shares the new task, so does U_b, and U_o stays with what it has."""
    population, known = made(section, timeline, seed), section.size or 0
    assert not population.behind[0].any()
    for task in range(1, len(timeline.starts)):
        behind, sharing = ids(population.behind[task]), set(population.sharing(task).tolist())
        assert behind <= set(range(known))
        assert len(behind) == known - int(known * section.move_on + 1e-9)
        known += section.newcomers
        assert behind | sharing == set(range(known))
        assert not behind & sharing
        assert ids(population.present(timeline.span(task).start)) == set(range(known))


def test_glfc_s_own_numbers() -> None:
    """30 clients, 10 more at each of 9 boundaries: 120; 27 of the first 30 move on (fl_main.py)."""
    section = PopulationSection(name="growing", size=30, newcomers=10)
    population = made(section, Timeline.of([[10]] * 10))
    assert len(population.arrives) == 120
    assert population.behind[1].sum() == 3
    assert population.behind[9].sum() == 11  # of 110


def test_who_stays_behind_keeps_the_samples_of_the_last_task_it_took_part_in() -> None:
    population = made(PopulationSection(name="growing", size=10, newcomers=0, move_on=0.5), Timeline.of([[1]] * 6))
    for client in range(10):
        source = 0
        for task in range(6):
            source = source if population.behind[task][client] else task
            assert population.source(client, task) == source
    assert len({population.source(client, 5) for client in range(10)}) > 2


@settings(deadline=None)
@given(section=TURNOVER | GROWING, timeline=TIMELINES, seed=st.integers(0, 3))
def test_a_population_is_a_function_of_its_arguments(section: PopulationSection, timeline: Timeline, seed: int) -> None:
    one, two = made(section, timeline, seed), made(section, timeline, seed)
    assert np.array_equal(one.arrives, two.arrives)
    assert np.array_equal(one.leaves, two.leaves)
    assert np.array_equal(one.behind, two.behind)


def test_another_seed_is_another_population() -> None:
    section = PopulationSection(name="turnover", size=50, replaced_per_task=0.5)
    leaves = [made(section, Timeline.of([[2], [2]]), seed).leaves.tolist() for seed in (0, 1)]
    assert leaves[0] != leaves[1]


def test_methods_with_the_same_rounds_of_training_have_the_same_people() -> None:
    """FedER's `remember` is a phase of one round: nobody comes or goes before it, and later draws do not shift."""
    section = PopulationSection(name="turnover", size=8, replaced_per_task=0.5, replaced_per_round=0.25)
    plain, two = Timeline.of([[4]] * 3), Timeline.of([[4, 1]] * 3)
    one, other = made(section, plain), made(section, two)
    for task in range(3):
        for round_ in range(4):
            there = [p.present(t.round_number(task, 0, round_)) for p, t in ((one, plain), (other, two))]
            assert np.array_equal(*there)
        assert np.array_equal(other.present(two.round_number(task, 0, 3)), other.present(two.round_number(task, 1, 0)))


def test_everyone_is_as_likely_to_leave() -> None:
    """400 populations, 6 of 20 leave at the boundary: 120 expected each, deviation sqrt(400 * 0.3 * 0.7) = 9.2."""
    section = PopulationSection(name="turnover", size=20, replaced_per_task=0.3)
    left = np.zeros(26)
    for seed in range(400):
        population = made(section, Timeline.of([[1], [1]]), seed)
        left += population.leaves == 1
    assert np.abs(left[:20] - 120).max() < 45
    assert not left[20:].any()


def test_a_fixed_population_is_everyone_and_costs_no_memory() -> None:
    population = make_population(PopulationSection(), 10**7, Timeline.of([[3], [3]]), Key(0))
    assert population.present(5).all()
    assert population.arrives.strides == population.leaves.strides == (0,)
    assert np.array_equal(population.sharing(1)[-2:], [10**7 - 2, 10**7 - 1])


# The partition among members


@settings(max_examples=60, deadline=None)
@given(
    section=TURNOVER | GROWING,
    timeline=TIMELINES,
    seed=st.integers(0, 3),
    partitioner=st.sampled_from(sorted(PARTITIONERS)),
)
def test_samples_go_to_members_only_and_each_to_one(
    section: PopulationSection, timeline: Timeline, seed: int, partitioner: str
) -> None:
    tasks = len(timeline.starts)
    stream = Stream(tuple(range(2 * tasks)), tuple(Task(t, 2 * t, 2 * t + 2) for t in range(tasks)))
    labels = np.repeat(np.arange(2 * tasks), 40)
    population = made(section, timeline, seed, spare=1)
    if not all(len(population.sharing(task)) for task in range(tasks)):
        return
    options = PartitionSection(name=partitioner, allow_empty=True, remainder="spread", classes_per_client=2)
    parts = make_partition(options, len(population.arrives), stream, labels, Key(seed), population.sharing)
    for task, part in enumerate(parts):
        wanted = np.flatnonzero((labels >= 2 * task) & (labels < 2 * task + 2))
        assert np.array_equal(np.sort(part.indices), wanted)
        owners = set(np.flatnonzero(part.counts()).tolist())
        assert owners <= set(population.sharing(task).tolist())


def test_newcomers_hold_as_many_classes_as_others() -> None:
    """dirichlet_equal serves clients in turn: who comes late takes what is left, often one class only."""
    section = PopulationSection(name="turnover", size=20, replaced_per_task=0.25)
    timeline, stream = (
        Timeline.of([[1]] * 5),
        Stream(tuple(range(10)), tuple(Task(t, 2 * t, 2 * t + 2) for t in range(5))),
    )
    labels = np.repeat(np.arange(10), 100)
    single: dict[bool, list[bool]] = {True: [], False: []}  # of newcomers, of others: whether one class is all
    for seed in range(12):
        population = made(section, timeline, seed)
        parts = make_partition(PartitionSection(), 40, stream, labels, Key(seed), population.sharing)
        for task in range(1, 5):
            for client in population.sharing(task).tolist():
                new = population.arrives[client] == timeline.span(task).start
                single[bool(new)].append(len(set(labels[parts[task].of(client)])) == 1)
    assert len(single[True]) == 12 * 4 * 5
    assert abs(np.mean(single[True]) - np.mean(single[False])) < 0.1


def test_without_a_change_of_members_shares_are_those_of_a_fixed_population() -> None:
    section = PopulationSection(name="turnover", size=6, replaced_per_task=0.0)
    stream, labels = Stream(tuple(range(4)), (Task(0, 0, 2), Task(1, 2, 4))), np.repeat(np.arange(4), 30)
    population = made(section, Timeline.of([[2], [2]]))
    drawn = make_partition(PartitionSection(), 6, stream, labels, Key(3), population.sharing)
    assert digest_of_partition(drawn) == digest_of_partition(
        make_partition(PartitionSection(), 6, stream, labels, Key(3))
    )


# In a scenario


def tables(**population: Any) -> dict[str, Any]:
    return {
        "method": {"name": "fedavg"},
        "data": {"name": "synthetic", "classes": 6, "samples_per_class": 30, "image_size": 4, "test_per_class": 2},
        "stream": {"tasks": 3},
        "partition": {"name": "iid"},
        "population": population,
        "clients": {"count": 40, "per_round": 3},
        "model": {"width": 2},
        "training": {"rounds": 3},
    }


TOO_FEW = [
    ({"name": "turnover", "size": 20, "replaced_per_task": 1.0}, "needs 60"),
    ({"name": "turnover", "size": 30, "replaced_per_task": 0.5, "replaced_per_round": 0.1}, "needs at least 60"),
    ({"name": "growing", "size": 30, "newcomers": 10}, "needs 50"),
    ({"name": "turnover"}, "needs size"),
    ({"size": 3}, "size is for"),
    ({"name": "turnover", "size": 2}, "clients.per_round = 3 is more than population.size = 2"),
]


@pytest.mark.parametrize(("population", "message"), TOO_FEW)
def test_what_cannot_be_is_refused_when_the_scenario_is_read(population: dict[str, Any], message: str) -> None:
    with pytest.raises(ScenarioError, match=message):
        load_scenario(tables(**population))


def test_turnover_inside_tasks_is_counted_as_soon_as_the_phases_are_known() -> None:
    """10 members, 3 replaced before rounds 2 and 3 of 3 tasks: 10 + 3 * 2 * 3 = 28; FedER's second phase adds none."""
    given_ = tables(name="turnover", size=10, replaced_per_round=0.3) | {"clients": {"count": 27, "per_round": 3}}
    for method in ("fedavg", "feder"):
        with pytest.raises(ScenarioError, match="needs 28 over the run") as caught:
            open_experiment(load_scenario(given_ | {"method": {"name": method}}))
        assert caught.value.next == "set clients.count = 28"
    open_experiment(load_scenario(given_, ["clients.count=28"]))


def test_who_is_no_member_has_no_samples_to_train_on() -> None:
    opened = open_experiment(load_scenario(tables(name="turnover", size=10, replaced_per_round=0.3)))
    task = opened.stream.tasks[0]
    everyone, now = opened.counts(task), opened.counts_at(task, 1)
    present = opened.population.present(1)
    assert everyone.sum() == 60  # two classes of 30
    assert now[~present].sum() == 0
    assert np.array_equal(now[present], everyone[present])
    assert 0 < now.sum() < 60


def test_who_stays_behind_trains_on_old_samples_if_the_method_can() -> None:
    population = {"name": "growing", "size": 6, "newcomers": 2, "move_on": 0.5}
    for method, asked in (("fedavg", True), ("fedprox", True), ("fedlwf", False), ("mfcl", False), ("afcl", False)):
        preset = {"preset": "small"} if method == "mfcl" else {}
        opened = open_experiment(load_scenario(tables(**population) | {"method": {"name": method, **preset}}))
        behind, task = np.flatnonzero(opened.population.behind[1]), opened.stream.tasks[1]
        counts = opened.counts(task)
        assert len(behind) == 3
        assert counts.sum() == 60 + (opened.partition[0].counts()[behind].sum() if asked else 0)
        for client in behind if asked else ():
            assert opened.indices(client, task).tolist() == opened.partition[0].of(client).tolist()
            assert counts[client] == len(opened.partition[0].of(client))


def test_turnover_at_boundaries_and_inside_tasks_is_counted_together() -> None:
    """10 members, 5 replaced at 2 boundaries, 3 before rounds 2 and 3 of 3 tasks: 10 + 2 * 5 + 6 * 3 = 38."""
    population = tables(name="turnover", size=10, replaced_per_task=0.5, replaced_per_round=0.3)
    with pytest.raises(ScenarioError, match="needs 38 over the run"):
        open_experiment(load_scenario(population | {"clients": {"count": 37, "per_round": 3}}))
    opened = open_experiment(load_scenario(population | {"clients": {"count": 38, "per_round": 3}}))
    assert [int(opened.population.present(number).sum()) for number in range(9)] == [10] * 9


# By hand


def one_of_each() -> Population:
    """Two tasks of four rounds: one who is there always, one who comes inside the first task, two who leave in it."""
    timeline = Timeline.of([[4], [4]])
    stays = (np.zeros(4, dtype=np.bool_),) * 2
    return Population(timeline, np.array([0, 2, 0, 0]), np.array([99, 99, 3, 4]), stays)


def test_a_share_that_is_not_exact_in_binary_is_of_whole_people() -> None:
    population = made(PopulationSection(name="growing", size=100, newcomers=0, move_on=0.29), Timeline.of([[1]] * 2))
    assert population.behind[1].sum() == 71


def test_who_comes_or_leaves_inside_a_task_is_a_member_of_it() -> None:
    assert one_of_each().members(0).tolist() == [True] * 4
    assert one_of_each().members(1).tolist() == [True, True, False, False]


def test_who_leaves_before_a_round_is_gone_in_it() -> None:
    assert one_of_each().gone(3).tolist() == [False, False, True, False]


def test_who_stays_behind_twice_has_the_samples_of_the_task_before_both() -> None:
    timeline, behind = Timeline.of([[1]] * 3), np.ones(1, dtype=np.bool_)
    population = Population(timeline, np.zeros(1, int), np.full(1, 99), (~behind, behind, behind))
    assert population.sources(2).tolist() == [population.source(0, 2)] == [0]


def test_each_turnover_has_a_draw_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    used, real = [], Key.numpy

    def noted(key: Key) -> np.random.Generator:
        used.append(key.path)
        return real(key)

    monkeypatch.setattr(Key, "numpy", noted)
    section = PopulationSection(name="turnover", size=10, replaced_per_task=0.1, replaced_per_round=0.1)
    made(section, Timeline.of([[3, 3]] * 3))
    assert len(set(used)) == len(used) > 10


def test_who_takes_which_share_is_another_in_each_task() -> None:
    stream, labels = Stream((0, 1), (Task(0, 0, 1), Task(1, 1, 2))), np.repeat([0, 1], 15)
    parts = make_partition(PartitionSection(name="iid"), 12, stream, labels, Key(0), lambda _: np.arange(10))
    assert parts[0].counts().tolist() != parts[1].counts().tolist()
