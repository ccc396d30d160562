"""Comparisons on run folders made of a few lines of JSON."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedcil.cli.runs import print_table
from fedcil.errors import InputError
from fedcil.record.compare import Group, differences, grouped, to_json, to_table
from fedcil.record.run import Run

SUMMARY = {
    "average_incremental_accuracy": 0.5,
    "final_accuracy": 0.4,
    "forgetting": 0.3,
    "seconds": 10.0,
    "bytes_up": 1_000_000,
    "bytes_down": 2_000_000,
    "short_rounds": 0,
    "client_failures": 0,
}


def make_run(folder: Path, scenario: str = "", *, summary: dict[str, Any] | None = None, **top: Any) -> Run:
    """A finished run; ``top`` are keys of the scenario's head, ``scenario`` its tables."""
    head = {"name": "trial", "seed": 0, **top}
    tables = scenario if "[method]" in scenario else f'{scenario}\n[method]\nname = "fedavg"\n'
    folder.mkdir()
    text = "".join(f"{key} = {json.dumps(value)}\n" for key, value in head.items())
    (folder / "scenario.toml").write_text(text + tables)
    (folder / "metrics.jsonl").write_text("")
    (folder / "summary.json").write_text(json.dumps(SUMMARY | (summary or {})))
    return Run(folder)


def scored(folder: Path, seed: int, accuracy: float, scenario: str = "") -> Run:
    return make_run(folder, scenario, seed=seed, summary={"final_accuracy": accuracy})


def printed(groups: list[Group], width: int = 80) -> str:
    out = io.StringIO()
    Console(file=out, width=width).print(to_table(groups))
    return out.getvalue()


def test_seeds_become_mean_and_sample_deviation(tmp_path: Path) -> None:
    """0.4, 0.5, 0.9: mean 0.6; squares 0.04 + 0.01 + 0.09 = 0.14, by n - 1 = 2 it is 0.07."""
    runs = [scored(tmp_path / str(i), i, value) for i, value in enumerate((0.4, 0.5, 0.9))]
    (group,) = grouped(runs)
    assert group.seeds == [0, 1, 2]
    assert group.mean["final_accuracy"] == pytest.approx(0.6)
    assert group.std is not None
    assert group.std["final_accuracy"] == pytest.approx(0.07**0.5)
    assert group.std["seconds"] == 0


def test_one_seed_has_no_deviation(tmp_path: Path) -> None:
    (group,) = grouped([make_run(tmp_path / "a")])
    assert group.std is None
    assert to_json([group])[0]["std"] is None


def test_forgetting_of_one_task_is_null(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / str(seed), seed=seed, summary={"forgetting": None}) for seed in (0, 1)]
    (element,) = to_json(grouped(runs))
    assert element["forgetting"] is None
    assert element["mean"]["forgetting"] is None
    assert element["std"]["forgetting"] is None
    assert element["std"]["final_accuracy"] == 0


def test_engine_and_checkpoints_do_not_make_a_group(tmp_path: Path) -> None:
    one = make_run(tmp_path / "a", '[engine]\nname = "inline"\n')
    two = make_run(tmp_path / "b", '[engine]\nname = "ray"\n[server]\ncheckpoint_every = 5\n', seed=1)
    groups = grouped([one, two])
    assert len(groups) == 1
    assert differences(groups) == ["seconds are from several engines (inline, ray): do not compare them"]


def test_runs_of_one_seed_count_as_one(tmp_path: Path) -> None:
    """Seed 0 twice (0.2, 0.4 -> 0.3) and seed 1 (0.5): mean 0.4, deviation sqrt(0.02)."""
    runs = [scored(tmp_path / f"{i}", seed, value) for i, (seed, value) in enumerate([(0, 0.2), (0, 0.4), (1, 0.5)])]
    (group,) = grouped(runs)
    assert group.seeds == [0, 1]
    assert group.mean["final_accuracy"] == pytest.approx(0.4)
    assert group.std is not None
    assert group.std["final_accuracy"] == pytest.approx(0.02**0.5)
    assert differences([group]) == ["trial: 2 runs with seed 0 count as one"]


def test_a_folder_given_twice_is_one_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    (group,) = grouped([run, Run(tmp_path / "." / "a")])
    assert len(group.runs) == 1


def test_groups_keep_the_order_and_are_told_apart(tmp_path: Path) -> None:
    mfcl = '[method]\nname = "mfcl"\npreset = "small"\nw_ie = {}\n'
    runs = [
        make_run(tmp_path / "a", mfcl.format("5.0")),
        make_run(tmp_path / "b", name="other"),
        make_run(tmp_path / "c", mfcl.format("20.0")),
        make_run(tmp_path / "d", mfcl.format("5.0"), seed=1),
    ]
    groups = grouped(runs)
    assert [group.label for group in groups] == ["trial (method.w_ie=5)", "other", "trial (method.w_ie=20)"]
    assert [group.method for group in groups] == ["mfcl", "fedavg", "mfcl"]
    assert [run.path.name for run in groups[0].runs] == ["a", "d"]


def test_labels_stay_short_and_different(tmp_path: Path) -> None:
    many = "[training]\nrounds = {0}\nepochs = {0}\nlr = {0}.0\nbatch_size = {0}\n"
    groups = grouped([make_run(tmp_path / str(n), many.format(n)) for n in (2, 3)])
    assert [group.label for group in groups] == ["trial (training.rounds=2, ...)", "trial (training.rounds=3, ...)"]


def test_differences_besides_the_method_are_named(tmp_path: Path) -> None:
    one = make_run(tmp_path / "a", "[training]\nrounds = 3\n")
    two = make_run(tmp_path / "b", '[method]\nname = "mfcl"\npreset = "small"\n', name="mine")
    assert differences(grouped([one, two])) == ["training.rounds differs: 3 in trial; 10 in mine"]


def test_an_unfinished_run_is_refused_by_name(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    (tmp_path / "a" / "summary.json").unlink()
    with pytest.raises(InputError) as error:
        grouped([run])
    assert error.value.where == str(run.path)
    assert "fedcil resume" in error.value.next


def test_json_has_the_names_of_a_summary(tmp_path: Path) -> None:
    runs = [scored(tmp_path / str(seed), seed, 0.2 + 0.2 * seed) for seed in (0, 1)]
    (element,) = json.loads(json.dumps(to_json(grouped(runs)), allow_nan=False))
    assert element["runs"][1] == {
        "run_dir": str(tmp_path / "1"), "name": "trial", "method": "fedavg", "seed": 1, **SUMMARY, "final_accuracy": 0.4
    }  # fmt: skip
    assert set(element["runs"][0]) | {"name", "label", "seeds", "runs", "mean", "std"} == set(element)
    assert element["final_accuracy"] == element["mean"]["final_accuracy"] == pytest.approx(0.3)
    assert (element["run_dir"], element["seed"], element["seeds"]) == (None, None, [0, 1])
    assert element["bytes_up"] == 1_000_000


def test_a_single_run_keeps_its_folder_and_seed(tmp_path: Path) -> None:
    (element,) = to_json(grouped([make_run(tmp_path / "a", seed=4)]))
    assert (element["run_dir"], element["seed"]) == (str(tmp_path / "a"), 4)


def test_the_table_fits_a_terminal(tmp_path: Path) -> None:
    """Mean 0.5 and deviation 0.1414 of 0.4 and 0.6, in percent; nothing is cut off at 80 columns."""
    runs = [scored(tmp_path / str(seed), seed, 0.4 + 0.2 * seed) for seed in (0, 1)]
    text = printed(grouped(runs))
    for expected in ("trial", "fedavg", "0,1", "50.0 ± 0.0", "50.0 ± 14.1", "30.0 ± 0.0", "1.0", "2.0", "10"):
        assert expected in text
    assert "…" not in text


def test_a_label_is_no_markup(tmp_path: Path) -> None:
    """A list in a label has square brackets, which rich would swallow."""
    runs = [make_run(tmp_path / f"{a}", f"[stream]\ntasks = 2\nsizes = [{a}, {b}]\n") for a, b in ((4, 6), (5, 5))]
    assert "[4, 6]" in printed(grouped(runs), width=120)


def on_data(run: Run, digest: str) -> Run:
    (run.path / "environment.json").write_text(json.dumps({"identity": {"data": digest}}))
    return run


def test_runs_of_one_seed_on_other_data_are_named(tmp_path: Path) -> None:
    runs = [on_data(scored(tmp_path / name, 0, 0.5), name * 32) for name in "ab"]
    assert differences(grouped(runs)) == ["trial: 2 runs with seed 0 count as one, although their data differ"]


def test_options_that_differ_within_one_method_are_named(tmp_path: Path) -> None:
    mfcl = '[method]\nname = "mfcl"\npreset = "small"\nw_ie = {}\n'
    runs = [make_run(tmp_path / name, mfcl.format(w), name=name) for name, w in (("one", "5.0"), ("two", "20.0"))]
    assert differences(grouped(runs)) == ["method.w_ie differs: 5 in one; 20 in two"]


def test_a_run_with_rounds_that_changed_nothing_is_said(tmp_path: Path) -> None:
    half = make_run(tmp_path / "half", summary={"rounds": 4, "short_rounds": 2})
    assert f"{half.path}: 2 of 4 rounds changed nothing" in differences(grouped([half]))


def test_runs_by_other_code_of_fedcil_are_said(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / str(seed), seed=seed) for seed in (0, 1)]
    for run, program in zip(runs, "ab", strict=True):
        (run.path / "environment.json").write_text(json.dumps({"program": program}))
    assert any("not all are by the same code of fedcil" in note for note in differences(grouped(runs)))


@pytest.mark.parametrize(("data", "said"), [("", 1), ("[data]\nsamples_per_class = 9\n", 0)])
def test_seeds_on_other_data_are_said(data: str, said: int, tmp_path: Path) -> None:
    """As under two data roots; but where the seed draws the samples, they are others by design."""
    runs = [on_data(scored(tmp_path / digest, seed, 0.5, data), digest) for seed, digest in enumerate("ab")]
    notes = differences(grouped(runs))
    assert sum("its seeds are on different data" in note for note in notes) == said
    assert not differences(grouped(runs[:1]))


def test_no_digit_is_cut_off(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the protocol of the paper takes, in the narrowest of terminals."""
    large = {"bytes_up": 448_771_200_000, "bytes_down": 653_771_200_000, "seconds": 34_123.0}
    runs = [make_run(tmp_path / str(seed), name="cifar100_mfcl", seed=seed, summary=large) for seed in range(3)]
    for columns in ("80", "40", "0"):
        monkeypatch.setenv("COLUMNS", columns)
        print_table(grouped(runs))
        rows = [line.split()[-3:] for line in capsys.readouterr().out.splitlines()]
        assert ["448771.2", "653771.2", "34123"] in rows


def test_namesakes_have_numbers_in_the_table_and_the_notes(tmp_path: Path) -> None:
    """A note does not repeat all that tells them apart."""
    texts = [f"[training]\nrounds = {rounds}\nepochs = {epochs}\n" for rounds, epochs in ((3, 1), (4, 2), (4, 3))]
    groups = grouped([make_run(tmp_path / str(place), text) for place, text in enumerate(texts)])
    assert differences(groups) == [
        "training.rounds differs: 3 in trial #1; 4 in trial #2, trial #3",
        "training.epochs differs: 1 in trial #1; 2 in trial #2; 3 in trial #3",
    ]
    assert list(to_table(groups).columns[1].cells)[1].plain == "trial #2 (training.rounds=4, training.epochs=2)"
