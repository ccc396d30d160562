"""Rounds by the simulated clock, in whole runs: drop-outs, deadlines, over-sampling and late updates."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fedcil
from fedcil.clock import asked_clients
from fedcil.engines.inline import InlinePort
from fedcil.errors import ScenarioError
from fedcil.messages import Attendance, Failure, Outcome, Request
from fedcil.port import ClientDone
from fedcil.record.run import Run
from fedcil.scenario_file import load_scenario
from fedcil.state import Pending
from fedcil.tensors import Total
from server.late import latest, stale_weight, with_late

Lines = list[dict[str, Any]]
CLOCK = {"name": "lognormal", "samples_per_s": 10.0, "down_bytes_per_s": 1e4, "up_bytes_per_s": 1e4}
FOLD = CLOCK | {"late": "fold"}
OVER = {"count": 12, "per_round": 3, "over_sample": 1.6}
CHURN: dict[str, Any] = {  # everything at once
    "population": {"name": "turnover", "size": 12, "replaced_per_task": 0.5, "replaced_per_round": 0.25},
    "availability": {"name": "markov", "rounds_on": 4.0, "rounds_off": 1.0},
    "clients": {"count": 60, "per_round": 3, "over_sample": 1.6, "dropout": 0.15},
    "clock": FOLD | {"deadline_s": 20.0},
    "server": {"patience": 99},
}


def scenario(method: str = "fedavg", **tables: Any) -> dict[str, Any]:
    """Two tasks of two classes over twelve clients, five rounds each."""
    base = {
        "name": method,
        "data": {"name": "synthetic", "classes": 4, "samples_per_class": 60, "image_size": 4, "test_per_class": 8},
        "stream": {"tasks": 2},
        "partition": {"name": "quantity", "sigma": 1.0, "min_size": 2},
        "clients": {"count": 12, "per_round": 5},
        "model": {"width": 2},
        "method": {"name": method},
        "training": {"rounds": 5, "epochs": 2, "batch_size": 8},
        "engine": {"workers": 1},
    }
    return base | tables


def run(output: Path, method: str = "fedavg", *overrides: str, **tables: Any) -> Run:
    return fedcil.run(scenario(method, **tables), overrides=overrides, output=output, figures=False)


def lines(finished: Run, *without: str) -> Lines:
    hidden = {"cost", *without}
    return [{key: value for key, value in line.items() if key not in hidden} for line in finished.lines]


def accuracies(finished: Run) -> list[Any]:
    return [line["accuracy"] for line in finished.lines if "accuracy" in line]


def replayed(finished: Run, output: Path, **tables: Any) -> Run:
    """A run without clock or drop-outs in which exactly those are asked who answered in ``finished``."""
    record = {"name": "recorded", "file": str(finished.path / "metrics.jsonl")}
    clients = {"count": finished.scenario.clients.count, "per_round": 12}
    return run(output, finished.scenario.name, **{"availability": record, "clients": clients, **tables})


def stages(finished: Run) -> set[str]:
    return {failure["stage"] for line in finished.kind("round") for failure in line["failures"]}


# Drop-outs, deadlines, over-sampling


def test_who_drops_out_gives_nothing_and_changes_nothing_else(tmp_path: Path) -> None:
    dropped = run(tmp_path, clients={"count": 12, "per_round": 5, "dropout": 0.4})
    for line in dropped.kind("round"):
        failed = [failure["client"] for failure in line["failures"]]
        assert sorted(line["answered"] + failed) == line["cohort"]
        assert "simulated_seconds" not in line  # there is no clock
    assert stages(dropped) == {"dropout"}
    assert 5 < dropped.summary["client_failures"] < 35  # 50 coins of 0.4: 20, deviation 3.5
    assert accuracies(replayed(dropped, tmp_path)) == accuracies(dropped)


def test_who_is_late_is_not_trained(tmp_path: Path) -> None:
    late = run(tmp_path, clock=CLOCK | {"deadline_s": 3.0})
    assert stages(late) == {"late"}
    assert any(failure["reason"].endswith("closed at 3") for line in late.kind("round") for failure in line["failures"])
    assert accuracies(replayed(late, tmp_path)) == accuracies(late)
    assert {line["status"] for line in late.kind("round")} <= {"ok", "no_quorum"}


def test_a_clock_that_nobody_misses_changes_nothing_but_the_seconds(tmp_path: Path) -> None:
    plain, timed = run(tmp_path), run(tmp_path, clock=CLOCK)
    assert lines(timed, "simulated_seconds") == lines(plain)
    seconds = [line["simulated_seconds"] for line in timed.kind("round")]
    assert min(seconds) > 0
    assert timed.summary["simulated_seconds"] == pytest.approx(sum(seconds))
    assert plain.summary["simulated_seconds"] is None


def test_seconds_follow_samples_epochs_and_bytes(tmp_path: Path) -> None:
    """Without spread: the largest client's samples times 2 epochs at 10 a second, and the model both ways."""
    timed = run(tmp_path, clock=CLOCK | {"speed_sigma": 0.0, "network_sigma": 0.0})
    for line in timed.kind("round"):
        counts = timed.partition[line["task"]].counts()
        model = line["bytes"]["down"]["model"] / len(line["cohort"])
        expected = max(counts[line["cohort"]]) * 2 / 10.0 + 2 * model / 1e4
        assert line["simulated_seconds"] == pytest.approx(expected)


def test_the_payload_takes_time_for_those_who_lack_it(tmp_path: Path) -> None:
    """FedLwF's teacher comes with a client's first round of the second task."""
    even = {"partition": {"name": "iid"}, "clients": {"count": 6, "per_round": 5}}
    timed = run(tmp_path, "fedlwf", clock=CLOCK | {"speed_sigma": 0.0, "network_sigma": 0.0}, **even)
    first, *later = [line for line in timed.kind("round") if line["task"] == 1]

    def payload(line: dict[str, Any]) -> int:
        return sum(size for part, size in line["bytes"]["down"].items() if part != "model")

    each = payload(first) / len(first["cohort"])
    assert each > 0
    assert any(payload(line) == 0 for line in later)
    held = min(line["simulated_seconds"] for line in later)
    for line in (first, *later):
        assert line["simulated_seconds"] == pytest.approx(held + (each / 1e4 if payload(line) else 0.0))


def test_over_sampling_asks_more_and_closes_with_the_fastest(tmp_path: Path) -> None:
    more = run(tmp_path, clients=OVER, clock=CLOCK)
    for line in more.kind("round"):
        assert len(line["cohort"]) == 5  # 3 * 1.6 = 4.8
        assert len(line["answered"]) == 3
    assert stages(more) == {"late"}
    assert accuracies(replayed(more, tmp_path)) == accuracies(more)


def test_a_quorum_is_of_those_who_are_wanted(tmp_path: Path) -> None:
    """3 of 5 answer, by intention: that is all, not 60 %."""
    more = run(tmp_path, clients=OVER, clock=CLOCK, server={"quorum": 1.0})
    assert {line["status"] for line in more.kind("round")} == {"ok"}


@pytest.mark.parametrize(
    ("per_round", "factor", "asked"), [(5, 1.0, 5), (10, 1.3, 13), (10, 1.1, 11), (3, 1.01, 4), (7, 2.0, 14)]
)
def test_how_many_are_asked(per_round: int, factor: float, asked: int) -> None:
    assert asked_clients(per_round, factor) == asked


def test_over_sampling_needs_a_clock() -> None:
    with pytest.raises(ScenarioError, match="over_sample needs a clock"):
        load_scenario(scenario(clients=OVER))
    plain, more = (load_scenario(scenario(clients=c, clock=CLOCK)) for c in (OVER | {"over_sample": 1.0}, OVER))
    assert plain.deciding() != more.deciding()


def test_over_sampling_has_a_bound() -> None:
    with pytest.raises(ScenarioError, match="over_sample"):
        load_scenario(scenario(clients=OVER | {"over_sample": 1e308}, clock=CLOCK))
    assert asked_clients(
        5, load_scenario(scenario(clients=OVER | {"over_sample": 100}, clock=CLOCK)).clients.over_sample
    )


def test_phases_for_all_wait_for_all(tmp_path: Path) -> None:
    """FedER's clients remember at the end of a task, however many were wanted in training."""
    feder = run(tmp_path, "feder", clients=OVER, clock=CLOCK)
    remember = [line for line in feder.kind("round") if line["phase_name"] == "remember"]
    assert [len(line["answered"]) for line in remember] == [12, 12]
    assert all(line["simulated_seconds"] > 0 for line in remember)


# Late updates


def pending(client: int, number: int, value: float, weight: float) -> Pending:
    total = Total({"w": torch.full((2,), value * weight)}, weight)
    return Pending(client=client, number=number, left_s=0.0, samples=3, total=total)


MODEL = {"w": torch.full((2,), 7.0)}


def test_a_late_update_counts_less_the_older_it_is() -> None:
    """Two rounds late with a = 0.5: f = 1 / sqrt(3) of its weight, the rest is that of the present model, 7. By hand:
    (2 * 5 + 6 * (4 f + 7 (1 - f))) / (2 + 6).
    """
    fresh = Total({"w": torch.full((2,), 10.0)}, 2.0)
    late = pending(1, 7, 4.0, 6.0)
    assert stale_weight(late, 9, 0.5) == pytest.approx(3**-0.5)
    assert stale_weight(late, 9, 0.0) == 1.0
    total = with_late(fresh, [late], 9, 0.5, MODEL)
    assert total is not None
    expected = (10.0 + 24.0 / 3**0.5 + 42.0 * (1 - 3**-0.5)) / 8.0
    torch.testing.assert_close(total.mean()["w"], torch.full((2,), expected))
    assert torch.equal(fresh.tensors["w"], torch.full((2,), 10.0))  # nobody's memory is written to


@pytest.mark.parametrize("deadline_s", [600.0, 0.2])
def test_a_rounds_real_deadline_is_one_for_all_that_it_asks(
    deadline_s: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each answer takes a fifth of a second: late clients are asked in what is left, or not at all."""
    left: dict[tuple[int, int], list[float]] = {}

    def slowly(port: InlinePort, request: Request, deadline: float, done: ClientDone) -> Outcome:
        left.setdefault((request.broadcast.task, request.broadcast.round), []).append(deadline)
        outcome = answer(port, request, None, done)
        time.sleep(0.2)
        return outcome

    answer = InlinePort.run
    monkeypatch.setattr(InlinePort, "run", slowly)
    tables = {"clock": FOLD | {"deadline_s": 3.0}, "server": {"deadline_s": deadline_s, "patience": 99}}
    late = run(tmp_path, training={"rounds": 3, "epochs": 1, "batch_size": 8}, **tables)
    if deadline_s == 600.0:
        assert any(len(each) > 1 for each in left.values())
        for each in left.values():
            assert all(after < before - 0.2 for before, after in zip([600.3, *each], each, strict=False))
        assert stages(late) == set()
    else:
        assert {len(each) for each in left.values()} == {1}
        assert stages(late) == {"deadline"}
        reasons = {failure["reason"] for line in late.kind("round") for failure in line["failures"]}
        assert reasons == {"not asked: the round's time was up"}


def test_what_nodes_did_during_late_requests_is_kept_too() -> None:
    seen = [Attendance({"1": (0,)}, ({"event": "joined"},)), None, Attendance({"1": (0, 1)}, ({"event": "late"},))]
    assert latest(seen) == Attendance({"1": (0, 1)}, ({"event": "joined"}, {"event": "late"}))
    assert latest([None]) is None


def test_late_updates_alone_are_a_round_too() -> None:
    total = with_late(None, [pending(1, 3, 4.0, 6.0), pending(2, 4, 8.0, 6.0)], 4, 1.0, MODEL)
    assert total is not None
    torch.testing.assert_close(total.mean()["w"], torch.full((2,), ((4.0 + 7.0) / 2 + 8.0) / 2))
    assert with_late(None, [], 4, 1.0, MODEL) is None


@pytest.mark.parametrize("staleness", [0.5, 50.0, 5000.0])
def test_an_old_update_that_arrives_alone_does_not_replace_the_model(staleness: float) -> None:
    """Ten rounds late: the model moves by 11 ** -a of the way, or stays, and is never 0 / 0."""
    total = with_late(None, [pending(1, 0, 4.0, 6.0)], 10, staleness, MODEL)
    assert total is not None
    torch.testing.assert_close(total.mean()["w"], torch.full((2,), 7.0 + (4.0 - 7.0) * 11.0**-staleness))


def test_a_round_without_quorum_leaves_what_came_late_for_the_next(tmp_path: Path) -> None:
    tables = {"clock": FOLD | {"deadline_s": 3.0}, "server": {"quorum": 0.9, "patience": 99}}
    few = {"count": 9, "per_round": 3, "dropout": 0.3}
    finished = run(tmp_path, "fedavg", "training.rounds=12", clients=few, **tables)
    idle = [line for line in finished.kind("round") if line["status"] == "no_quorum"]
    assert idle
    assert all(not line["arrived"] for line in idle)
    arrived, _ = account(finished)
    assert arrived


def account(finished: Run) -> tuple[int, int]:
    """Follow every late update; returns how many arrived and how many were lost."""
    on_the_way: dict[int, int] = {}
    arrived = lost = 0
    for number, line in enumerate(finished.kind("round")):
        assert not on_the_way.keys() & set(line["cohort"]), "a client that is still busy was asked"
        for late in line["arrived"]:
            assert late["rounds_late"] == number - on_the_way.pop(late["client"]) >= 1
            assert late["weight"] == (1 + late["rounds_late"]) ** -0.5
            arrived += 1
        failed = {failure["client"] for failure in line["failures"]}
        assert not failed & set(line["answered"])
        on_the_way |= dict.fromkeys(set(line["cohort"]) - set(line["answered"]) - failed, number)
        assert sorted(on_the_way) == sorted(line["pending"] + line["lost"])
        on_the_way = {client: on_the_way[client] for client in line["pending"]}
        lost += len(line["lost"])
    assert not on_the_way
    return arrived, lost


def test_each_late_update_arrives_once_by_the_clock_or_is_lost_with_its_phase(tmp_path: Path) -> None:
    finished = run(tmp_path, "fedavg", "training.rounds=12", clients=OVER, clock=FOLD)
    assert not stages(finished)
    arrived, lost = account(finished)
    assert arrived > 5
    assert lost > 0


def test_late_updates_change_the_model_and_count_as_sent(tmp_path: Path) -> None:
    folded, dropped = (run(tmp_path, clients=OVER, clock=clock) for clock in (FOLD, CLOCK))
    assert accuracies(folded) != accuracies(dropped)
    for line in folded.kind("round"):
        counts = folded.partition[line["task"]].counts()
        given = line["answered"] + [late["client"] for late in line["arrived"]]
        assert line["samples"] == sum(counts[given])
        model = line["bytes"]["down"]["model"] // len(line["cohort"])
        assert line["bytes"]["up"]["model"] == len(given) * model


@pytest.mark.parametrize("seed", range(4))
def test_when_all_are_busy_each_round_waits_for_the_next_update(seed: int, tmp_path: Path) -> None:
    """Nobody makes the deadline of the first round, so the second one has nobody to ask, and no round is in vain."""
    all_of_them = {"count": 3, "per_round": 3}
    clock = FOLD | {"deadline_s": 0.001}
    finished = run(tmp_path, "fedavg", f"seed={seed}", clients=all_of_them, clock=clock, server={"patience": 99})
    first, second, *_ = rounds = finished.kind("round")
    assert (first["status"], first["simulated_seconds"], first["pending"]) == ("no_quorum", 0.001, [0, 1, 2])
    assert (second["status"], second["cohort"], second["answered"]) == ("ok", [], [])
    assert len(second["arrived"]) == 1
    assert second["simulated_seconds"] > 0.1
    assert all(line["arrived"] or line["cohort"] for line in rounds)


# Everything at once


@pytest.fixture(scope="module", params=["fedavg", "feder", "afcl"])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run(tmp_path_factory.mktemp(request.param), request.param, **CHURN)


def test_everything_at_once_happens(whole: Run) -> None:
    assert whole.finished
    assert stages(whole) <= {"dropout", "late", "samples"}
    assert "dropout" in stages(whole)
    if whole.scenario.name != "afcl":  # its one round a task asks all
        arrived, lost = account(whole)
        assert arrived
        assert lost


@pytest.mark.parametrize("count", [2, 4, 9])
def test_a_stopped_run_goes_on_with_its_late_updates(whole: Run, count: int, stopped_run: Any, tmp_path: Path) -> None:
    plain = scenario(whole.scenario.name, **CHURN)
    folder = stopped_run(plain, min(count, len(whole.lines) - 1), tmp_path)
    assert lines(fedcil.resume(folder, figures=False)) == lines(whole)


def test_what_the_checkpoint_before_the_last_needs_is_still_there(whole: Run, stopped_run: Any, tmp_path: Path) -> None:
    """Leavers' states and late updates are removed only when neither of two checkpoints names them."""
    plain = scenario(whole.scenario.name, **CHURN)
    folder = stopped_run(plain, min(9, len(whole.lines) - 1), tmp_path)
    newest = max((folder / "checkpoints").glob("state-*.json"), key=lambda path: int(path.stem[6:]))
    newest.write_text("{")
    assert lines(fedcil.resume(folder, figures=False)) == lines(whole)


def test_the_number_of_workers_changes_nothing(whole: Run, tmp_path: Path) -> None:
    assert lines(run(tmp_path, whole.scenario.name, "engine.workers=3", **CHURN)) == lines(whole)


def test_nothing_of_late_updates_is_left_when_the_run_is_over(whole: Run) -> None:
    checkpoints = whole.path / "checkpoints"
    states = sorted(checkpoints.glob("state-*.json"), key=lambda path: int(path.stem[6:]))
    assert '"pending": []' in states[-1].read_text()


def test_the_timeline_in_the_docs_is_what_happens(stopped_run: Any, tmp_path: Path) -> None:
    """docs/availability.md, "Late updates"."""
    text = (Path(__file__).parent.parent / "docs" / "availability.md").read_text()
    example = text.partition("The first two rounds of `digits_fedavg` with ")[2]
    sets = example.partition(":\n\n```")[0].replace("\n", " ").split("`")[1::2]
    folder = stopped_run("digits_fedavg", 3, tmp_path, sets)
    first, second, third = Run(folder).kind("round")
    assert [round(line["simulated_seconds"], 1) for line in (first, second)] == [17.6, 10.3]  # 27.9 together
    assert (first["answered"], first["pending"]) == ([0, 5, 9, 10, 19], [1, 17])
    assert [failure["client"] for failure in first["failures"]] == [14]
    assert [late["client"] for late in second["arrived"]] == [17]
    weights = {late["client"]: round(late["weight"], 2) for late in third["arrived"]}
    assert weights == {1: 0.58, 5: 0.71, 12: 0.71, 14: 0.71}
    for client in (0, 1, 5, 9, 10, 14, 17, 19):
        assert f"client {client:2d} " in example


def test_a_late_client_that_fails_is_a_failure_of_its_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A late one is asked alone, so nothing at all comes of its request."""
    alone: list[int] = []

    def failing(port: InlinePort, request: Request, deadline: float, done: ClientDone) -> Outcome:
        if len(request.jobs) > 1:
            return answer(port, request, deadline, done)
        alone.append(request.jobs[0].client)
        return Outcome(None, (), (Failure(request.jobs[0].client, "training", "broke"),))

    answer = InlinePort.run
    monkeypatch.setattr(InlinePort, "run", failing)
    finished = run(tmp_path, clients=OVER, clock=FOLD)
    assert stages(finished) == {"training"}
    assert [each["client"] for line in finished.kind("round") for each in line["failures"]]
    assert len(alone) == finished.summary["client_failures"] > 0
    assert all(not line["arrived"] and not line["pending"] for line in finished.kind("round"))


def test_what_late_requests_cost_is_the_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[tuple[int, int], int] = {}

    def costly(port: InlinePort, request: Request, deadline: float, done: ClientDone) -> Outcome:
        place = (request.broadcast.task, request.broadcast.round)
        asked[place] = asked.get(place, 0) + 1
        return replace(answer(port, request, deadline, done), wire_bytes=10, cpu_elsewhere=1000.0)

    answer = InlinePort.run
    monkeypatch.setattr(InlinePort, "run", costly)
    finished = run(tmp_path, clients=OVER, clock=FOLD)
    assert max(asked.values()) > 1
    for line in finished.kind("round"):
        requests = asked[line["task"], line["round"]]
        assert line["cost"]["wire_bytes"] == 10 * requests
        assert 1000.0 * requests <= line["cost"]["cpu_seconds"] < 1000.0 * requests + 500.0


def test_an_update_that_takes_three_rounds_arrives_in_the_third(tmp_path: Path) -> None:
    """10 samples, twice, at 10 a second: 2 seconds, where a round has 0.8."""
    clock = {"name": "tiers", "tiers": [[1, 10.0, 1e9, 1e9]], "deadline_s": 0.8, "late": "fold"}
    tables = {"partition": {"name": "iid"}, "clients": {"count": 12, "per_round": 3}, "server": {"patience": 9}}
    first, second, third, *_ = run(tmp_path, clock=clock, **tables).kind("round")
    assert first["arrived"] == second["arrived"] == []
    assert [late["client"] for late in third["arrived"]] == first["cohort"]
    assert {late["rounds_late"] for late in third["arrived"]} == {2}
