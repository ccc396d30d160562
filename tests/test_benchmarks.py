"""The benchmarks measure what they say: both sides do the same work, and the arithmetic of ratios is right."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from scenarios.benchmarks import __main__ as benchmarks
from scenarios.benchmarks import boundary, floor, memory, overhead, report, rounds, step, timing, whole, workers
from scenarios.benchmarks.__main__ import Bench, main
from scenarios.benchmarks.bars import FULL
from scenarios.benchmarks.nets import NETS, build
from scenarios.benchmarks.peers.session import Session, sessions
from scenarios.benchmarks.rounds import AGREE, measure, weights_differ, write_data
from scenarios.benchmarks.step import compute_in
from scenarios.benchmarks.timing import NOT_MEASURED, Case, Cost, Figure, against, for_a_while, in_turn

ROOT = Path(__file__).parent.parent


def test_a_round_of_ours_is_a_round_of_the_plain_loop(tmp_path: Path) -> None:
    """LeNet in float64, the same orders of the same images: weights agree to rounding."""
    assert weights_differ(write_data(tmp_path / "data.npz")) <= AGREE


def test_a_peer_is_driven_line_by_line_and_ends_with_its_session(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data.npz")
    with sessions(tmp_path / "log", {"plain": (sys.executable, "plain", data)}) as sides:
        for _ in range(2):  # what was begun before leaves nothing behind
            assert weights_differ(data, sides["plain"]) <= AGREE
            cpu, wall = sides["plain"].round()
            assert cpu > 0
            assert wall > 0
    with pytest.raises(ValueError, match="closed"):
        sides["plain"].round()


@pytest.mark.parametrize(
    ("words", "cases"),
    [
        (("step", "2", "2", "1", "fp32"), ("fp32_fresh", "fp32_pooled", "fp32_pool")),
        (("floor", "2", "2", "1", "fp32"), ("fp32_step", "fp32_floor")),
        (("boundary", "2", "fp32"), ("fp32",)),
        (("round", "lenet", "1", "fp32"), ("fp32_pictures", "fp32_tensors")),
    ],
    ids=lambda words: words[0],
)
def test_our_side_does_each_of_its_cases(words: tuple[str, ...], cases: tuple[str, ...], tmp_path: Path) -> None:
    with sessions(tmp_path / "log", {"ours": (sys.executable, "ours")}) as sides:
        sides["ours"].begin(*words)
        for case in cases:
            assert sides["ours"].case(1, case)().cpu > 0
        with pytest.raises(RuntimeError, match="ended without an answer"):
            sides["ours"].round("another")


def test_the_floor_is_the_convolutions_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many forward and backward passes as a step of a narrow ResNet-18 has: 20 of the student and as many of the
    teacher, one of them over images, and the generator's three.
    """
    monkeypatch.setattr(floor, "compute_in", lambda precision: compute_in(precision, width=8))
    ahead, back = [], []
    passes = floor.passes

    def counted(layer: floor.Layer, precision: Any) -> tuple[floor.Work, floor.Work]:
        assert all(callable(work) for work in passes(layer, precision))
        return lambda: ahead.append(layer), lambda: back.append(layer)

    monkeypatch.setattr(floor, "passes", counted)
    floor.step_floor(step.Sizes(2, 3, 1), "fp32")()
    assert len(ahead) == 2 * 20 + 3
    assert len(back) == 20
    assert [layer.first for layer in back].count(True) == 1
    assert {layer.inputs[0] for layer in back} == {5}


def test_every_side_starts_from_the_same_weights() -> None:
    for net in NETS:
        one, other = build(net), build(net)
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert sum(parameter.numel() for parameter in build("lenet").parameters()) == 62_006


def test_cases_take_turns_and_each_is_first_once() -> None:
    order: list[str] = []

    def case(name: str) -> Cost:
        order.append(name)
        return Cost(1.0, 1.0)

    costs = in_turn({name: lambda name=name: case(name) for name in "abc"}, repeats=3)  # type: ignore[misc]
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"
    assert {name: len(each) for name, each in costs.items()} == {"a": 3, "b": 3, "c": 3}


def test_a_limit_ends_the_repeats_but_not_within_one() -> None:
    order: list[str] = []

    def case(name: str) -> Cost:
        order.append(name)
        time.sleep(0.02)
        return Cost(1.0, 1.0)

    costs = in_turn({name: lambda name=name: case(name) for name in "ab"}, repeats=50, limit_s=0.03)  # type: ignore[misc]
    assert len(costs["a"]) == len(costs["b"]) in (1, 2)
    assert len(in_turn({"a": lambda: case("a")}, repeats=9, limit_s=0.0)["a"]) == 1


@pytest.mark.parametrize(("wall", "times"), [(0.05, 10), (0.2, 2), (3.0, 1)])
def test_what_is_short_is_done_for_a_while(wall: float, times: int) -> None:
    costs = iter([Cost(9.0, wall), Cost(9.0, wall)] + [Cost(float(place), wall) for place in range(times)])
    cost = for_a_while(lambda: next(costs))()
    assert (cost.cpu, cost.wall) == (pytest.approx((times - 1) / 2), pytest.approx(wall))
    assert next(costs, None) is None


@pytest.mark.parametrize(("round_s", "turns"), [(0.2, 5), (2.0, 1), (0.0, 200)])
def test_what_is_short_is_done_as_often_as_takes_a_second(round_s: float, turns: int, monkeypatch: Any) -> None:
    """On a clock that only the work moves."""
    now, done = [0.0], 0

    def work() -> None:
        nonlocal done
        done += 1
        now[0] += round_s or 1e-9

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    assert timing.times_in_a_second(work) == turns
    assert done == 2


def test_a_session_says_what_one_of_the_rounds_of_a_second_cost() -> None:
    """Two of 0.2 s each before, to know how many a second has, then at most five."""
    program = """if True:
        import time, types
        from scenarios.benchmarks.peers.session import answer

        def one():
            print("a round")
            time.sleep(0.2)

        answer(lambda word: types.SimpleNamespace(round=one), for_a_second=True)
    """
    command, told = [sys.executable, "-c", program], '["begin", "it"]\n["round"]\n'
    done = subprocess.run(command, cwd=ROOT, input=told, capture_output=True, text=True, check=True, timeout=60)
    assert 3 <= done.stderr.count("a round") <= 7
    begun, cost = map(json.loads, done.stdout.splitlines())
    assert begun == {"begun": ["it"]}
    assert 0.2 <= cost["wall"] < 1.0


def test_an_engine_costs_what_its_own_processes_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overhead, "FLOWER_HOLDS", 1e9)  # no machine has so much memory
    figures = overhead.measure((10, 20), 1, 2, tmp_path / "log", engines=("inline",))
    assert figures.keys() == {"engine_inline_1mb_10_vs_flower", "engine_inline_1mb_20_vs_flower"}
    for figure in figures.values():
        assert figure.median_s is not None
        assert 0 < figure.median_s < 0.1
        assert figure.ratio is None


def test_a_ratio_is_the_median_of_pairs() -> None:
    """1/2, 3/3, 8/4: the median is 1, whatever the medians of the sides are; the range is 1.5."""
    ours = [Cost(1.0, 2.0), Cost(3.0, 2.0), Cost(8.0, 2.0)]
    theirs = [Cost(2.0, 1.0), Cost(3.0, 1.0), Cost(4.0, 1.0)]
    figure = against(ours, theirs)
    assert figure == Figure(1.0, 2.0, 3.0, 1.5, 3)
    assert against(ours, None) == Figure(None, None, 3.0, None, 3)
    assert figure.plus(0.5, 2.0) == Figure(1.25, 2.25, 3.5, 1.5, 3)
    assert against(ours[:1], theirs[:1]) == Figure(0.5, 2.0, 1.0, None, 1)  # and not a spread of 0


@pytest.mark.parametrize(
    ("name", "ratio", "seconds", "said"),
    [
        ("round_lenet_fp32_vs_plain", FULL.most["round_lenet_fp32_vs_plain"], 9.0, "reached"),
        ("round_lenet_fp32_vs_plain", 0.9, 0.0, "not reached"),
        ("floor_fraction_fp32", FULL.least["floor_fraction_fp32"] - 0.1, 0.0, "not reached"),
        ("engine_ray_1mb_100_vs_flower", 0.001, FULL.seconds["engine_ray_1mb_100_vs_flower"] * 2, "not reached"),
        ("round_lenet_bf16_vs_plain", 0.1, 0.0, ""),
        ("round_lenet_fp32_vs_pfl", None, 0.0, ""),  # a peer that could not be had
    ],
)
def test_a_bar_is_reached_or_not(name: str, ratio: float | None, seconds: float, said: str) -> None:
    row = {"ratio": ratio, "wall_ratio": ratio, "median_s": seconds, "spread": 0.0}
    assert report.verdict(name, row, FULL).split(" <")[0].split(" >")[0] == said


@pytest.mark.parametrize(
    ("name", "row", "said"),
    [
        ("two_workers_cnn4", {"ratio": 1.0, "wall_ratio": 0.8, "median_s": 1.0}, "not reached <= 1.1, <= 0.588 wall"),
        ("two_workers_cnn4", {"ratio": 1.0, "wall_ratio": None, "median_s": 1.0}, "reached <= 1.1"),
        ("memory_10000", {"peak_mb": 600.0, "more_than_100_mb": 0.5}, "reached <= 4 more_than_100_mb"),
        ("whole_digits_mfcl", {"wall_s": 9.0, "first_round_s": 7.0}, "not reached <= 6 first_round_s"),
        ("whole_digits_other", {"wall_s": 9.0, "first_round_s": 7.0}, ""),
    ],
)
def test_wall_seconds_and_facts_have_bars_too(name: str, row: dict[str, Any], said: str) -> None:
    assert report.verdict(name, row, FULL) == said


@pytest.mark.slow
def test_a_peer_that_could_not_be_had_is_a_row_all_the_same(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data.npz", clients=1)
    programs = {"ours": (sys.executable, "ours"), "plain": (sys.executable, "plain", data)}
    with sessions(tmp_path / "log", programs) as sides:
        figures = measure("lenet", sides.pop("ours"), {**sides, "pfl": None}, 1, precisions=("fp32",), clients=1)
    assert figures["round_lenet_fp32_vs_pfl"].ratio is None
    ratio = figures["round_lenet_fp32_vs_plain"].ratio
    assert ratio is not None
    assert ratio > 0


def test_a_scenario_without_its_data_is_not_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FEDCIL_DATA_ROOT", str(tmp_path))
    assert whole.measure({"fashion_mfcl": 1}) == {"whole_fashion_mfcl": NOT_MEASURED}
    assert "fashion_mfcl is not measured: the data set 'fashion_mnist' is not there" in capsys.readouterr().err


@pytest.mark.slow
def test_a_whole_scenario_is_timed_from_its_command_on() -> None:
    (row,) = whole.measure({"digits_fedavg": 1}).values()
    assert isinstance(row, dict)
    assert 0 < row["first_round_s"] < row["wall_s"]
    assert row["cpu_s"] > 0


def test_what_a_cpu_has_no_instructions_for_is_not_measured(tmp_path: Path) -> None:
    bench = Bench(True, 1, tmp_path)
    bench.precisions = ("fp32",)
    bench.parts = {"step": lambda: {"step_8_32_fp32_fresh": Figure(0.5, 0.6, 1.0, 0.1, 5), "memory": {"mb": 3.0}}}
    rows = bench.rows("step")
    assert rows.keys() == {"step_8_32_fp32_fresh", "step_8_32_bf16_fresh", "memory"}
    assert rows["step_8_32_bf16_fresh"] == dict.fromkeys(("ratio", "wall_ratio", "median_s", "spread", "repeats"))
    assert report.verdict("step_8_32_bf16_fresh", rows["step_8_32_bf16_fresh"], FULL) == ""


def test_a_peer_that_cannot_start_or_does_other_work_is_not_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And takes no other part along."""
    measured: list[dict[str, Session | None]] = []

    def note(net: str, ours: Session, sides: dict[str, Session | None], *_: object) -> dict[str, Figure]:
        measured.append(dict(sides))
        return {}

    bench = Bench(True, 1, tmp_path)
    monkeypatch.setattr(bench, "peers", lambda: {"blazefl": Path(sys.executable)})
    monkeypatch.setattr(rounds, "measure", note)
    rows = bench.rows("rounds")
    assert [sides["blazefl"] for sides in measured] == [None, None]
    assert all(sides["plain"] for sides in measured)
    assert rows.keys() == {"weights_fedcil"}
    assert rows["weights_fedcil"]["differ_by"] <= AGREE
    assert "blazefl is not measured: the peer ended without an answer" in capsys.readouterr().out


def test_a_boundary_of_ours_is_the_authors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses of the first three steps of a narrow ResNet-18 in float64, on the same latents."""
    monkeypatch.setattr(boundary, "compute_in", lambda precision: compute_in(precision, width=8))
    torch.set_default_dtype(torch.float64)
    try:
        losses = []
        for side in (boundary.our_boundary("fp32", 6), boundary.authors_boundary(6)):
            torch.manual_seed(0)
            losses.append([side().item() for _ in range(3)])
    finally:
        torch.set_default_dtype(torch.float32)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-12)
    assert len(set(losses[0])) == 3


class Idle:
    """A session with nobody behind it."""

    def begin(self, *_: object) -> None:
        pass

    def case(self, units: int = 1, *_: str) -> Case:
        return lambda: Cost(1.0, 1.0)


@contextmanager
def idle(_: Path, programs: Mapping[str, object]) -> Iterator[dict[str, Idle]]:
    """In place of ``sessions``."""
    yield {name: Idle() for name in programs}


def each_once(cases: Mapping[str, Case], *_: object, **__: object) -> dict[str, list[Cost]]:
    """In place of timing."""
    return {name: [Cost(1.0, 1.0)] for name in cases}


def test_every_row_that_the_json_is_read_for_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names are read by programs: the parts run as they are, only nothing is timed."""
    for module in (step, floor, boundary, overhead, benchmarks):
        monkeypatch.setattr(module, "sessions", idle)
    for module in (step, floor, boundary, overhead, rounds):
        monkeypatch.setattr(module, "in_turn", each_once)
    monkeypatch.setattr(rounds, "for_a_while", lambda case: case)
    monkeypatch.setattr(rounds, "weights_differ", lambda *_: 0.0)
    bench = Bench(False, 1, tmp_path)
    bench.precisions = ("fp32", "bf16")
    monkeypatch.setattr(bench, "peers", lambda: dict.fromkeys(("flower", "pfl", "fedlab", "blazefl"), tmp_path))
    parts = ("step", "floor", "boundary", "rounds", "overhead")
    rows = {name for part in parts for name in bench.rows(part)}
    both = ("fp32", "bf16")
    sides = ("plain", "flower", "pfl", "fedlab", "blazefl")
    kept = {
        f"step_{size}_{p}_{kind}_vs_kept" for size in ("8_32", "32_128") for p in both for kind in ("fresh", "pooled")
    }
    kept |= {f"round_{net}_{p}_vs_plain_kept" for net in ("lenet", "cnn4", "resnet18") for p in both}
    kept |= {f"boundary_{p}_vs_kept" for p in both}
    wanted = {f"step_{size}_{p}_{kind}" for size in ("8_32", "32_128") for p in both for kind in ("fresh", "pooled")}
    wanted |= {f"round_{net}_{p}_vs_{side}" for net in ("lenet", "cnn4", "resnet18") for p in both for side in sides}
    wanted |= {f"engine_{e}_{mb}mb_{n}_vs_flower" for e in ("inline", "ray") for mb in (1, 45) for n in (10, 100, 1000)}
    wanted |= {f"{what}_{p}" for what in ("boundary", "floor_fraction") for p in both}
    assert rows - wanted == kept | {f"weights_{side}" for side in ("fedcil", *sides[1:])}
    assert wanted <= rows


def test_a_first_run_that_finds_nothing_in_the_page_cache_is_no_growth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Less of the libraries is mapped then: 650 MB for 690."""
    ran: list[int] = []

    def peak_mb(clients: int) -> memory.Peak:
        ran.append(clients)
        return memory.Peak(570.0, 690.0 if len(ran) > 1 else 650.0)

    monkeypatch.setattr(memory, "peak_mb", peak_mb)
    assert [row["more_than_100_mb"] for row in memory.measure().values()] == [0.0, 0.0, 0.0]


@pytest.mark.slow
def test_the_command_prints_a_table_and_the_path_of_its_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Bench, "workers", lambda _: workers.measure("lenet", 1))
    arguments = ["benchmarks", "--only", "workers,memory", "--repeats", "1", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    held = b"1" * (1_200 << 20)  # by the benchmark itself: no run's peak
    assert main() == 0
    *table, path = capsys.readouterr().out.splitlines()
    rows = json.loads(Path(path).read_text())
    assert {"ratio", "wall_ratio", "median_s", "spread", "repeats"} == rows["two_workers_lenet"].keys()
    assert rows["memory_10000"]["more_than_100_mb"] < rows["memory_10000"]["index_mb"] + 30
    assert rows["memory_100"]["peak_mb"] < rows["memory_100"]["process_peak_mb"] < len(held) / 2**20
    assert any("two_workers_lenet" in line for line in table)
    assert (tmp_path / "benchmark.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--only", "step,bogus"], "no part bogus here; allowed: step, "),
        (["--quick", "--only", "floor"], "no part floor here; allowed: step, rounds, overhead"),
        (["--repeats", "0"], "--repeats: at least 1"),
    ],
)
def test_what_cannot_be_measured_is_said_before_anything_is(
    words: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks", *words, "--output", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        main()
    assert says in f"{end.value}{capsys.readouterr().err}"
    assert not list(tmp_path.iterdir())


def test_a_key_press_ends_it_with_where_the_rows_so_far_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def rows(_: Bench, name: str) -> dict[str, Any]:
        if name == "memory":
            raise KeyboardInterrupt
        return {"floor_fraction_fp32": {"ratio": 0.9}}

    monkeypatch.setattr(Bench, "rows", rows)
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--only", "floor,memory", "--output", str(tmp_path)])
    assert main() == 130
    assert json.loads((tmp_path / "bench.json").read_text())["floor_fraction_fp32"] == {"ratio": 0.9}
    assert f"stopped: what was measured so far is in {tmp_path}" in capsys.readouterr().err
