"""Who can be reached: everyone, some by chance, or those who answered once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import fedcil
from fedcil.availability import make_availability
from fedcil.cli.run_folders import unfinished
from fedcil.errors import InputError, NotResumable
from fedcil.experiment import open_experiment
from fedcil.keys import Key
from fedcil.record.compare import grouped
from fedcil.record.identity import run_identity, worker_identity
from fedcil.scenario_file import load_scenario
from fedcil.tables import AvailabilitySection
from fedcil.timeline import Timeline
from fedcil.traces import recorded, trace

RUN = Timeline.of([[30, 1]] * 20)  # 20 tasks of 31 rounds
People = Callable[[int, int, int], set[int]]
Record = Callable[[str], People]


def ids(mask: NDArray[np.bool_]) -> set[int]:
    return set(np.flatnonzero(mask).tolist())


def people(section: AvailabilitySection, clients: int, timeline: Timeline = RUN, seed: int = 0) -> People:
    present = make_availability(section, clients, Key(seed), timeline)
    return lambda *place: ids(present(*place))


def bernoulli(probability: float, clients: int = 50, seed: int = 0) -> People:
    return people(AvailabilitySection(name="bernoulli", probability=probability), clients, seed=seed)


def line(task: int, phase: int, round: int, answered: list[int], **more: Any) -> str:
    entry = {"kind": "round", "task": task, "phase": phase, "round": round, "answered": answered}
    return json.dumps(entry | more)


@pytest.fixture
def record(tmp_path: Path) -> Record:
    """Write a metrics.jsonl and replay it for 5 clients."""

    def replay(text: str) -> People:
        """Rounds 0 and 1 of phase 0 in task 0, round 0 of phase 0 in task 1."""
        path = tmp_path / "metrics.jsonl"
        path.write_text(text, encoding="utf-8")
        section = AvailabilitySection(name="recorded", file=str(path))
        return people(section, 5, Timeline.of([[2], [1]]))

    return replay


def test_always_is_everyone() -> None:
    present = people(AvailabilitySection(), 3)
    assert present(0, 0, 0) == present(4, 1, 9) == {0, 1, 2}


def test_certain_and_impossible() -> None:
    assert bernoulli(1.0, clients=4)(0, 0, 0) == frozenset(range(4))
    assert bernoulli(0.0, clients=4)(0, 0, 0) == frozenset()


def test_the_place_decides_not_the_history() -> None:
    first, second = bernoulli(0.5), bernoulli(0.5)
    for round in range(5):
        first(0, 0, round)
    assert first(2, 1, 3) == second(2, 1, 3)
    assert first(2, 1, 3) != bernoulli(0.5, seed=1)(2, 1, 3)


def test_task_phase_and_round_are_independent() -> None:
    """2 * 2 * 2 places with 50 fair coins each: the chance that any two agree is below 28 / 2**50."""
    present = bernoulli(0.5)
    places = [(task, phase, round) for task in (0, 1) for phase in (0, 1) for round in (0, 1)]
    assert len({frozenset(present(*place)) for place in places}) == len(places)


def test_the_rate_is_the_probability() -> None:
    """20,000 coins of 0.3: deviation sqrt(0.3 * 0.7 / 20000) = 0.0032; of one client in 400 rounds 0.023."""
    present = bernoulli(0.3)
    seen = np.array([[client in present(0, 0, round) for client in range(50)] for round in range(400)])
    assert seen.mean() == pytest.approx(0.3, abs=0.013)
    assert np.abs(seen.mean(axis=0) - 0.3).max() < 0.1


def test_a_record_is_replayed(record: Record) -> None:
    lines = [
        line(0, 0, 0, [3, 1], loss=0.5),
        json.dumps({"kind": "task", "task": 0, "accuracy": [0.5]}),
        line(0, 0, 1, []),
        line(1, 0, 0, [4]),
        line(9, 9, 9, [4]),
    ]
    present = record("\n".join(lines) + "\n")
    assert present(0, 0, 0) == frozenset({1, 3})
    assert present(0, 0, 1) == frozenset()
    assert present(1, 0, 0) == frozenset({4})


def test_a_round_that_is_not_recorded_is_said_before_any(record: Record) -> None:
    with pytest.raises(InputError, match="task 0, phase 0, round 1 was not recorded") as caught:
        record("\n".join([line(0, 0, 0, [1]), line(1, 0, 0, [1])]))
    assert caught.value.where.endswith("metrics.jsonl")
    assert "training.rounds" in caught.value.next


BROKEN = {
    '{"kind": "round", "task"': "not JSON",
    "[1, 2]": "not a JSON object",
    '{"kind": "round", "task": 0, "round": 0, "answered": []}': "must be whole numbers",
    '{"kind": "round", "task": 0, "phase": "train", "round": 0, "answered": []}': "must be whole numbers",
    '{"kind": "round", "task": 0, "phase": 0, "round": 0}': "answered a list",
    '{"kind": "round", "task": 0, "phase": 0, "round": 0, "answered": [true]}': "answered a list",
    '{"kind": "round", "task": 0, "phase": 0, "round": 0, "answered": [-1]}': "answered a list",
    line(0, 0, 0, [5]): "client 5 answered, but clients.count = 5",
    line(9, 0, 0, [0]): "for the second time",
}


@pytest.mark.parametrize("text", BROKEN)
def test_a_broken_line_is_named(record: Record, text: str) -> None:
    with pytest.raises(InputError, match=BROKEN[text]) as caught:
        record(line(9, 0, 0, [0]) + "\n" + text + "\n")
    assert caught.value.where.endswith("metrics.jsonl:2")
    assert "finished run" in caught.value.next


def test_a_file_without_rounds(record: Record) -> None:
    with pytest.raises(InputError, match="has no rounds"):
        record("")


def test_a_file_that_is_not_there_or_not_text(tmp_path: Path) -> None:
    for content, name in ((None, "nothing.jsonl"), (b"\xff\xfe\x00", "binary.jsonl")):
        path = tmp_path / name
        if content:
            path.write_bytes(content)
        with pytest.raises(InputError, match="cannot be read") as caught:
            make_availability(AvailabilitySection(name="recorded", file=str(path)), 5, Key(0), RUN)
        assert caught.value.where == str(path)


# Models that count rounds through the whole run

MODELS = {
    "markov": AvailabilitySection(name="markov", rounds_on=6.0, rounds_off=2.0),
    "diurnal": AvailabilitySection(name="diurnal", share=0.5, amplitude=0.4, period=24.0),
    "bernoulli": AvailabilitySection(name="bernoulli", probability=0.4),
}
PLACES = st.tuples(st.integers(0, 19), st.integers(0, 1), st.integers(0, 29)).filter(lambda p: not (p[1] and p[2]))


@settings(max_examples=50, deadline=None)
@given(name=st.sampled_from(sorted(MODELS)), places=st.lists(PLACES, min_size=1, max_size=6), seed=st.integers(0, 3))
def test_no_model_remembers_what_it_was_asked(name: str, places: list[tuple[int, int, int]], seed: int) -> None:
    """In any order, again and again, and in a fresh process: the place decides."""
    asked = people(MODELS[name], 20, seed=seed)
    answers = [asked(*place) for place in places]
    for place, answer in zip(places, answers, strict=True):
        assert asked(*place) == answer == people(MODELS[name], 20, seed=seed)(*place)
    assert all(type(client) is int and 0 <= client < 20 for answer in answers for client in answer)


def seen(section: AvailabilitySection, clients: int, rounds: int) -> Any:
    """(rounds, clients) of the first task of a long run."""
    present = make_availability(section, clients, Key(0), Timeline.of([[rounds]]))
    return np.array([present(0, 0, r) for r in range(rounds)])


def test_markov_has_the_spells_it_was_told() -> None:
    """200 clients, 500 rounds, 6 on and 2 off: about 12,500 spells of each kind, deviations sqrt(30) and sqrt(2)."""
    table = seen(MODELS["markov"], 200, 500)
    assert table.mean() == pytest.approx(0.75, abs=0.01)
    assert table[0].mean() == pytest.approx(0.75, abs=0.12)  # stationary from the first round: deviation 0.031
    starts_on = (~table[:-1] & table[1:]).sum()
    starts_off = (table[:-1] & ~table[1:]).sum()
    assert table[:-1].sum() / starts_off == pytest.approx(6.0, abs=0.3)
    assert (~table[:-1]).sum() / starts_on == pytest.approx(2.0, abs=0.1)


def test_a_markov_client_is_no_coin() -> None:
    """With long spells, who was there in one round is there in the next."""
    table = seen(AvailabilitySection(name="markov", rounds_on=50.0, rounds_off=50.0), 100, 200)
    assert (table[1:] == table[:-1]).mean() == pytest.approx(0.98, abs=0.005)


def test_markov_counts_through_phases_and_tasks() -> None:
    """The chain does not begin anew with a task: the same rows, however they are cut into tasks."""
    section = MODELS["markov"]
    whole = people(section, 30, Timeline.of([[12]]))
    cut = people(section, 30, Timeline.of([[3, 1], [3, 1], [3, 1]]))
    places = [(task, *rest) for task in range(3) for rest in ((0, 0), (0, 1), (0, 2), (1, 0))]
    assert [cut(*place) for place in places] == [whole(0, 0, number) for number in range(12)]


def test_diurnal_in_one_time_zone_is_a_sine() -> None:
    """2000 clients: deviation of a share at most sqrt(0.25 / 2000) = 0.011."""
    section = AvailabilitySection(name="diurnal", share=0.5, amplitude=0.4, period=24.0, spread=0.0)
    table = seen(section, 2000, 48)
    expected = 0.5 + 0.4 * np.sin(2 * np.pi * np.arange(48) / 24)
    assert np.abs(table.mean(axis=1) - expected).max() < 0.05


def test_diurnal_clients_have_phases_of_their_own() -> None:
    """Over the whole earth the share is flat, while each client still has its day: 20 periods of 24 rounds."""
    table = seen(MODELS["diurnal"], 300, 480)
    assert np.abs(table.mean(axis=1) - 0.5).max() < 0.15  # deviation 0.026
    waves = np.exp(2j * np.pi * np.arange(480) / 24) @ table / 240  # amplitude and phase of each client
    assert np.abs(waves).mean() == pytest.approx(0.4, abs=0.02)
    assert np.abs((waves / np.abs(waves)).mean()) < 0.2  # all over the circle


def test_a_sine_that_leaves_0_to_1_is_refused() -> None:
    with pytest.raises(ValueError, match="must lie in 0 to 1"):
        AvailabilitySection(name="diurnal", share=0.2, amplitude=0.3)


def replay_trace(path: Path, text: str) -> People:
    path.write_text(text, encoding="utf-8")
    return people(AvailabilitySection(name="trace", file=str(path)), 5, Timeline.of([[2, 1], [2]]))


def test_a_trace_says_who_is_there_with_both_ends(tmp_path: Path) -> None:
    present = replay_trace(tmp_path / "t.csv", "client,from,to\n0,0,1\n1,1,3\n\n0,4,99\n2,2,2\n")
    by_round = [present(0, 0, 0), present(0, 0, 1), present(0, 1, 0), present(1, 0, 0), present(1, 0, 1)]
    assert by_round == [{0}, {0, 1}, {1, 2}, {1}, {0}]


NO_TRACE = {
    "": ("t.csv:1", "first line is not client,from,to"),
    "client;from;to\n1;2;3\n": ("t.csv:1", "first line is not client,from,to"),
    "client,from,to\n": ("t.csv", "has no clients"),
    "client,from,to\n0,0,1\n0,1\n": ("t.csv:3", "'0,1' is not three whole numbers"),
    "client,from,to\n0,0,1.5\n": ("t.csv:2", "is not three whole numbers"),
    "client,from,to\n0,0,1\n\n5,0,1\n": ("t.csv:4", "client 5 is none of the clients.count = 5"),
    "client,from,to\n-1,0,1\n": ("t.csv:2", "client -1 is none"),
    "client,from,to\n1,3,2\n": ("t.csv:2", "from 3 to 2 is no span"),
    "client,from,to\n1,-3,2\n": ("t.csv:2", "from -3 to 2 is no span"),
    f"client,from,to\n1,0,{10**30}\n": ("t.csv:2", "is no span"),
}
TINY = str(Path(__file__).with_name("tiny.toml"))


@pytest.mark.parametrize("text", NO_TRACE)
def test_a_broken_trace_names_its_line(tmp_path: Path, text: str) -> None:
    where, message = NO_TRACE[text]
    with pytest.raises(InputError, match=message) as caught:
        replay_trace(tmp_path / "t.csv", text)
    assert caught.value.where.endswith(where)
    assert "rounds count from 0" in caught.value.allowed


def test_a_trace_that_is_not_there(tmp_path: Path) -> None:
    section = AvailabilitySection(name="trace", file=str(tmp_path / "none.csv"))
    with pytest.raises(InputError, match="cannot be read"):
        make_availability(section, 5, Key(0), RUN)


@pytest.mark.parametrize("name", ["trace", "recorded"])
def test_a_name_that_no_file_can_have(name: str) -> None:
    section = AvailabilitySection.model_validate({"name": name, "file": "a\0b"})
    with pytest.raises(InputError, match="cannot be read"):
        make_availability(section, 5, Key(0), RUN)


@pytest.mark.parametrize("line", ["1" * 5000, "[" * 100_000])
def test_a_record_that_is_hard_to_read(record: Record, line: str) -> None:
    with pytest.raises(InputError, match="not JSON"):
        record(line)


def test_a_trace_from_a_spreadsheet(tmp_path: Path) -> None:
    assert replay_trace(tmp_path / "t.csv", "\ufeffclient,from,to\n0,0,1\n")(0, 0, 0) == {0}


def follow(file: Path) -> list[str]:
    return [f"availability={{name='trace', file='{file}'}}"]


def test_what_is_in_a_trace_is_part_of_the_run_and_where_it_lies_is_not(
    tmp_path: Path, stopped_run: Callable[..., Path]
) -> None:
    trace, moved = tmp_path / "t.csv", tmp_path / "moved.csv"
    trace.write_text("client,from,to\n0,0,9\n1,0,9\n")
    whole = fedcil.run(TINY, overrides=follow(trace), output=tmp_path / "whole", figures=False)
    folder = stopped_run(TINY, 2, tmp_path / "stopped", follow(trace))
    trace.rename(moved)
    trace.write_text("client,from,to\n2,0,9\n3,0,9\n")
    with pytest.raises(NotResumable, match=r"made differently: availability was \w+, now"):
        fedcil.resume(folder, figures=False)
    assert fedcil.resume(folder, overrides=follow(moved), figures=False).results == whole.results
    with pytest.raises(NotResumable, match=r"availability\.file was"):
        fedcil.resume(whole.path, overrides=follow(moved), figures=False)
    other = fedcil.run(TINY, overrides=follow(trace), output=tmp_path / "other", figures=False)
    assert len(grouped([whole, other])) == 2


def test_workers_need_no_trace(tmp_path: Path) -> None:
    """Who is there is the server's to know: the file may be gone when one starts, and be on no other node."""
    experiment = open_experiment(load_scenario(TINY, follow(tmp_path / "none.csv")))
    assert "availability" not in worker_identity(experiment)


def test_a_trace_is_read_once(tmp_path: Path) -> None:
    trace = tmp_path / "t.csv"
    trace.write_text("client,from,to\n0,0,9\n")
    experiment = open_experiment(load_scenario(TINY, follow(trace)))
    digest = experiment.conditions.availability.digest
    trace.unlink()
    assert run_identity(experiment)["availability"] == digest
    assert ids(experiment.conditions.availability(0, 0, 0)) == {0}


def test_a_deployment_does_not_go_on_with_a_run_of_another_trace(
    tmp_path: Path, stopped_run: Callable[..., Path]
) -> None:
    traces = [tmp_path / f"{name}.csv" for name in "ab"]
    for file in traces:
        file.write_text("client,from,to\n0,0,9\n1,0,9\n")
    folder = stopped_run(TINY, 2, tmp_path / "runs", follow(traces[0]))
    (folder.parent / (folder.name + "-notes")).mkdir()  # what a person puts beside a run is none
    half = shutil.copytree(folder, folder.parent / (folder.name + "-half"))
    (half / "metrics.jsonl").unlink()  # nor is what lacks its record
    assert unfinished(load_scenario(TINY, follow(traces[0])), tmp_path / "runs") == folder
    assert unfinished(load_scenario(TINY, follow(traces[1])), tmp_path / "runs") is None


def test_a_broken_trace_leaves_no_run_behind(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        fedcil.run(TINY, overrides=follow(tmp_path / "none.csv"), output=tmp_path / "runs", figures=False)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("later", [1, 2, 9])
def test_a_chain_can_be_asked_for_an_earlier_round(later: int) -> None:
    """Chains that the same draws move soon meet, so only many clients show one that goes back to a wrong state."""
    timeline = Timeline.of([[10]])
    forwards = make_availability(MODELS["markov"], 200, Key(0), timeline)
    rows = [forwards(0, 0, number).copy() for number in range(10)]
    for number in range(later):
        asked = make_availability(MODELS["markov"], 200, Key(0), timeline)
        asked(0, 0, later)
        assert np.array_equal(asked(0, 0, number), rows[number])


def test_a_trace_and_a_record_are_known_by_all_that_is_in_them(tmp_path: Path) -> None:
    file, record = tmp_path / "trace.csv", tmp_path / "metrics.jsonl"
    traces, records = set(), set()
    for number in (0, 1):
        file.write_text(f"client,from,to\n0,0,{number + 1}\n")
        traces.add(trace(file, 1)[1])
        line = {"kind": "round", "task": 0, "phase": 0, "round": 0, "answered": [number]}
        record.write_text(json.dumps(line) + "\n")
        records.add(recorded(record, 2, [(0, 0, 0)])[1])
    assert len(traces) == len(records) == 2
