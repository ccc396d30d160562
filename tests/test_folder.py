"""The run folder: one writer, whole lines, cut back on resume; refused where something changed."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fedcil
from fedcil import cpu
from fedcil.errors import FolderBusy, InputError, NotResumable, RunFailed, Stopped
from fedcil.experiment import Experiment, open_experiment
from fedcil.port import StopSignal
from fedcil.record.figures import partition_figure
from fedcil.record.folder import PACKAGES, RunFolder
from fedcil.record.run import open_run, ragged
from fedcil.scenario import Scenario
from fedcil.scenario_file import load_scenario
from fedcil.sources import revision
from fedcil.state import Cursor, RunState, ServerState
from fedcil.tensors import content_hash


def experiment(*overrides: str) -> Experiment:
    tables = {
        "name": "tiny",
        "method": {"name": "fedavg"},
        "data": {"name": "synthetic", "classes": 4, "samples_per_class": 6, "image_size": 4, "test_per_class": 1},
        "stream": {"tasks": 2},
        "partition": {"name": "iid"},
        "clients": {"count": 3, "per_round": 2},
        "model": {"width": 2},
    }
    return open_experiment(load_scenario(tables, overrides))


def state(number: int) -> RunState:
    return RunState(server=ServerState(model={"x": torch.full((2,), float(number))}), cursor=Cursor(0, 0, number))


@pytest.fixture
def zen_5(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run records of its CPU is that of this one, wherever the tests run."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(cpu, "bf16_instructions", lambda: ("AVX512_BF16",))
    monkeypatch.setattr(cpu, "_named", lambda: "AuthenticAMD family 26")


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[RunFolder]:
    made = RunFolder.create(tmp_path, experiment())
    yield made
    made.close()


def two_rounds(folder: RunFolder) -> bytes:
    """A checkpoint after the first round, a line of the second; returns metrics.jsonl as of the checkpoint."""
    folder.append({"kind": "round", "round": 0})
    folder.checkpoint(state(1))
    saved = (folder.path / "metrics.jsonl").read_bytes()
    folder.append({"kind": "round", "round": 1})
    folder.close()
    return saved


# What stands in it


def test_a_new_folder_holds_what_is_known_before_round_0(folder: RunFolder) -> None:
    opened = experiment()
    run = open_run(folder.path)
    assert run.scenario == opened.scenario
    assert run.lines == ()
    assert not run.finished
    assert [part.counts().tolist() for part in run.partition] == [part.counts().tolist() for part in opened.partition]
    assert run.label_counts is not None
    assert np.array_equal(run.label_counts, opened.label_counts())
    environment = json.loads((folder.path / "environment.json").read_text())
    assert environment["numeric_configuration"] == opened.numeric()
    assert environment["versions"].keys() == set(PACKAGES)
    assert environment["versions"]["torch"] == version("torch")
    assert environment["data"]["digest"] == opened.data.digest
    assert environment["class_order"] == ["blob 0", "blob 1", "blob 2", "blob 3"]


def test_counts_by_client_and_label_are_left_out_where_they_would_fill_a_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedcil.record.folder.MOST_COUNTS", math.prod(experiment().label_counts_shape) - 1)
    made = RunFolder.create(tmp_path, experiment())
    made.close()
    run = open_run(made.path)
    assert run.label_counts is None
    assert run.partition
    assert partition_figure(run) is None


def test_the_revision_is_that_of_our_own_checkout(tmp_path: Path) -> None:
    """Installed below somebody's own repository there is none; a changed file is said."""
    module = tmp_path / "folder.py"
    module.write_text("")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x"]

    def commit() -> str:
        subprocess.run([*git, "commit", "--quiet", "--allow-empty", "--message", "x"], check=True)
        return subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()

    subprocess.run([*git, "init", "--quiet"], check=True)
    assert revision(module) is None
    commit()
    assert revision(module) is None
    subprocess.run([*git, "add", module], check=True)
    head = commit()
    assert revision(module) == head
    module.write_text("changed")
    assert revision(module) == f"{head}-dirty"


def test_folders_of_the_same_second_have_different_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "strftime", lambda _: "20300101-000000")
    folders = [RunFolder.create(tmp_path / "deep" / "below", experiment()) for _ in range(3)]
    names = [made.path.name for made in folders]
    assert names == ["tiny-0-20300101-000000", "tiny-0-20300101-000000-1", "tiny-0-20300101-000000-2"]
    for made in folders:
        made.close()


def test_a_line_is_on_disk_when_append_returns(folder: RunFolder) -> None:
    folder.append({"kind": "round", "text": "line\u2028separator\n"})
    (line,) = open_run(folder.path).lines
    assert line["text"] == "line\u2028separator\n"
    assert (folder.path / "metrics.jsonl").read_bytes().count(b"\n") == 1


def test_a_number_that_is_not_finite_is_no_line(folder: RunFolder) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        folder.append({"loss": float("nan")})
    assert (folder.path / "metrics.jsonl").read_bytes() == b""


# Unwritable


def unwritable(output: Path) -> InputError:
    with pytest.raises(InputError, match="cannot make a run folder") as caught:
        RunFolder.create(output, experiment())
    assert caught.value.exit_code == 2
    assert str(output) in caught.value.where
    assert "--output" in caught.value.next
    return caught.value


def test_an_output_that_cannot_be_written_is_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_text("")
    link.symlink_to(tmp_path / "nowhere")
    unwritable(file)
    unwritable(file / "below")
    unwritable(link)
    unwritable(tmp_path / ("x" * 300))

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", denied)
    assert "Permission denied" in unwritable(tmp_path / "denied").what


def test_a_run_folder_that_cannot_be_written_is_bad_input_and_not_locked(folder: RunFolder) -> None:
    two_rounds(folder)
    metrics = folder.path / "metrics.jsonl"
    metrics.rename(folder.path / "kept")
    metrics.mkdir()
    with pytest.raises(InputError, match="cannot write to this run folder"):
        RunFolder(folder.path, {})
    metrics.rmdir()
    (folder.path / "kept").rename(metrics)
    RunFolder(folder.path, {}).close()


def test_a_full_disk_ends_the_run_with_a_message_and_frees_the_folder(tmp_path: Path) -> None:
    """Every write to /dev/full fails as on a full disk, also the one when the file is closed."""
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    made = RunFolder(tmp_path, {})
    with pytest.raises(RunFailed, match="No space left on device") as caught:
        made.append({"kind": "round"})
    assert caught.value.where == str(tmp_path)
    assert caught.value.next == "make room, then start the run again"  # nothing was saved that could go on
    made.close()
    RunFolder(tmp_path, {}).close()


def test_a_checkpoint_that_cannot_be_written_ends_the_run_with_the_last_one_intact(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.checkpoint(state(1))

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(RunFailed, match="No space left on device") as caught:
            folder.checkpoint(state(2))
        assert "`fedcil resume RUN`" in caught.value.next
        with pytest.raises(RunFailed, match="No space left on device"):
            folder.write("summary.json", "{}")
    assert folder.checkpoints.load().state.cursor.round == 1
    assert not (folder.path / "summary.json").exists()


# One writer


def test_a_second_writer_is_refused_at_once(folder: RunFolder) -> None:
    started = time.perf_counter()
    with pytest.raises(FolderBusy) as caught:
        RunFolder(folder.path, {})
    assert time.perf_counter() - started < 1.0
    assert caught.value.where == str(folder.path)
    assert caught.value.exit_code == 3
    folder.close()
    RunFolder(folder.path, {}).close()


def test_a_killed_writer_leaves_no_lock(folder: RunFolder) -> None:
    two_rounds(folder)
    program = "import sys, time; from pathlib import Path; from fedcil.record.folder import RunFolder\n"
    program += "folder = RunFolder(Path(sys.argv[1]), {}); print('held', flush=True); time.sleep(60)"
    command = [sys.executable, "-c", program, str(folder.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parent.parent) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(FolderBusy):
            RunFolder.reopen(folder.path, experiment())
        other.kill()
    again, found = RunFolder.reopen(folder.path, experiment())
    again.close()
    assert found.cursor.round == 1


# Resume


def test_metrics_are_cut_back_to_the_checkpoint_and_the_tail_is_kept(folder: RunFolder) -> None:
    saved = two_rounds(folder)
    with (folder.path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"half": ')
    again, found = RunFolder.reopen(folder.path, experiment())
    assert content_hash(found.server.model) == content_hash(state(1).server.model)
    assert (folder.path / "metrics.jsonl").read_bytes() == saved
    (tail,) = folder.path.glob("metrics.cut-*.jsonl")
    assert tail.read_bytes() == b'{"kind": "round", "round": 1}\n{"half": '
    again.append({"kind": "round", "round": "again"})
    again.checkpoint(state(2))
    assert again.checkpoints.load().metrics_length == (folder.path / "metrics.jsonl").stat().st_size
    again.close()
    assert [line["round"] for line in open_run(folder.path).lines] == [0, "again"]


def test_metrics_that_end_with_the_checkpoint_are_left_alone(folder: RunFolder) -> None:
    folder.append({"kind": "round", "round": 0})
    folder.checkpoint(state(1))
    folder.close()
    RunFolder.reopen(folder.path, experiment())[0].close()
    assert list(folder.path.glob("metrics.cut-*")) == []
    assert len(open_run(folder.path).lines) == 1


def test_metrics_shorter_than_the_checkpoint_are_refused(folder: RunFolder) -> None:
    saved = two_rounds(folder)
    metrics = folder.path / "metrics.jsonl"
    for content in (saved[:-1], b""):
        metrics.write_bytes(content)
        with pytest.raises(NotResumable, match="shorter than its checkpoint"):
            RunFolder.reopen(folder.path, experiment())
        assert metrics.read_bytes() == content


def test_the_two_checkpoints_are_of_two_rounds_after_a_resume_too(
    tmp_path: Path, stopped_run: Callable[..., Path]
) -> None:
    """A resumed run that saved its first state once more would drop the only other one."""
    folder = stopped_run(experiment().scenario, 3, tmp_path)
    stop = StopSignal()
    stop.set(130)
    with pytest.raises(Stopped):
        fedcil.resume(folder, figures=False, stop=stop)
    one, two = (json.loads(path.read_text()) for path in sorted((folder / "checkpoints").glob("state-*.json")))
    assert one["cursor"]["round"] + 1 == two["cursor"]["round"]


@pytest.mark.parametrize("harm", [Path.unlink, lambda path: path.write_bytes(b"{")])
def test_a_run_goes_on_without_its_environment(folder: RunFolder, harm: Callable[[Path], object]) -> None:
    """What it says is for people; the checkpoint knows what decides."""
    folder.checkpoint(state(1))
    folder.close()
    harm(folder.path / "environment.json")
    again, found = RunFolder.reopen(folder.path, experiment())
    again.close()
    assert found.cursor == Cursor(0, 0, 1)


def test_a_resume_that_cannot_read_the_environment_leaves_the_run_free(
    tmp_path: Path, stopped_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is asked for a run's own modules."""
    folder = stopped_run(experiment().scenario, 3, tmp_path)
    path = folder / "environment.json"
    monkeypatch.setattr(Scenario, "own_code", lambda _: {"mine": "0" * 16})
    path.write_bytes(b"{")
    with pytest.raises(InputError, match="not JSON") as caught:
        fedcil.resume(folder, figures=False)
    assert "delete it" in caught.value.next
    path.unlink()
    assert fedcil.resume(folder, figures=False).finished


def test_a_finished_run_without_environment_or_summary_is_what_it_was(tmp_path: Path) -> None:
    run = fedcil.run(experiment().scenario, output=tmp_path, figures=False)
    (run.path / "environment.json").unlink()
    assert fedcil.resume(run.path, figures=False).summary == run.summary
    with pytest.raises(NotResumable, match=r"seed was 0, now 1"):
        fedcil.resume(run.path, overrides=["seed=1"], figures=False)
    again = open_run(run.path)
    assert (again.identity, again.versions) == ({}, {})
    (run.path / "summary.json").unlink()
    assert fedcil.resume(run.path, figures=False).summary.keys() == run.summary.keys()
    np.testing.assert_array_equal(open_run(run.path).accuracy_matrix, run.accuracy_matrix)


def test_a_state_that_was_saved_is_not_saved_again(folder: RunFolder) -> None:
    """Its metrics length is that of the first time: what was written after it is repeated."""
    one = state(1)
    folder.checkpoint(one)
    folder.append({"kind": "task"})
    folder.checkpoint(one)
    assert folder.checkpoints.load().metrics_length == 0
    folder.close()
    again, found = RunFolder.reopen(folder.path, experiment())
    again.append({"kind": "task"})
    again.checkpoint(found)
    assert again.checkpoints.load().metrics_length == 0
    again.close()


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        (["seed=1"], ["scenario.seed"]),
        (["training.lr=0.2", "training.lr_end=0.01"], ["scenario.training.lr"]),
        (["server.patience=3"], ["scenario.server.patience"]),
        (["data.samples_per_class=9"], ["data", "scenario.data.samples_per_class"]),
        (
            ["training.threads=2", "training.precision=bf16"],
            [
                "numeric.bf16_instructions",
                "numeric.precision",
                "numeric.small_maps",
                "numeric.threads",
                "scenario.training.precision",
                "scenario.training.threads",
            ],
        ),
    ],
)
@pytest.mark.usefixtures("zen_5")
def test_what_was_made_differently_is_refused_with_the_differences(
    folder: RunFolder, overrides: list[str], names: list[str]
) -> None:
    two_rounds(folder)
    with pytest.raises(NotResumable, match="made differently") as caught:
        RunFolder.reopen(folder.path, experiment(*overrides))
    changes = caught.value.what.partition("differently: ")[2].split("; ")
    assert [change.partition(" was ")[0] for change in changes] == names
    assert all(", now " in change for change in changes)
    RunFolder(folder.path, {}).close()  # a refused resume holds no lock


def test_other_data_of_the_same_form_are_refused(folder: RunFolder) -> None:
    two_rounds(folder)
    opened = experiment()
    other = replace(opened, data=replace(opened.data, digest="other"))
    with pytest.raises(NotResumable, match=f"data was {opened.data.digest}, now other"):
        RunFolder.reopen(folder.path, other)


@pytest.mark.parametrize(
    "override", ["engine.name=ray", "engine.workers=2", "server.checkpoint_every=5", "data.root=x"]
)
def test_engine_root_and_checkpoints_may_change(folder: RunFolder, override: str) -> None:
    two_rounds(folder)
    again, found = RunFolder.reopen(folder.path, experiment(override))
    again.close()
    assert found.cursor.round == 1


# Reading


def test_a_half_written_last_line_is_not_read(folder: RunFolder) -> None:
    metrics = folder.path / "metrics.jsonl"
    whole = b'{"kind": "round", "round": 0}\n'
    for tail in (b"", b"{", b'{"kind": "round", "round": 1}', b"\xff\xfe", b"\0" * 9):
        metrics.write_bytes(whole + tail)
        assert [line["round"] for line in open_run(folder.path).kind("round")] == [0]


@pytest.mark.parametrize("line", [b"{", b"\0\0\0", b"3", b"\xff", b"[" * 100_000], ids=range(5))
def test_a_damaged_whole_line_is_named(folder: RunFolder, line: bytes) -> None:
    (folder.path / "metrics.jsonl").write_bytes(b'{"kind": "round"}\n' + line + b"\n")
    with pytest.raises(InputError, match=r"not JSON|not a JSON object") as caught:
        len(open_run(folder.path).lines)
    assert caught.value.where.endswith("metrics.jsonl:2")


def test_a_damaged_summary_is_named(folder: RunFolder) -> None:
    (folder.path / "summary.json").write_text("{")
    with pytest.raises(InputError, match="not JSON") as caught:
        _ = open_run(folder.path).finished
    assert caught.value.where.endswith("summary.json")
    assert f"`fedcil resume {folder.path}` writes it anew" in caught.value.next


@pytest.mark.parametrize("missing", ["scenario.toml", "metrics.jsonl"])
def test_a_folder_without_scenario_or_metrics_is_no_run(folder: RunFolder, missing: str) -> None:
    (folder.path / missing).unlink()
    with pytest.raises(InputError, match="not a run folder") as caught:
        open_run(folder.path)
    assert caught.value.where == str(folder.path)


def test_the_trace_has_every_evaluation_and_knows_where_tasks_end(folder: RunFolder) -> None:
    lines: list[dict[str, Any]] = [
        {"kind": "round", "accuracy": [0.5]},
        {"kind": "round"},
        {"kind": "task", "accuracy": [0.75], "test_images": [2]},
        {"kind": "boundary"},
        {"kind": "round", "accuracy": [0.25, 0.5]},
        {"kind": "task", "accuracy": [0.125, 1.0], "test_images": [2, 2]},
    ]
    for line in lines:
        folder.append(line)
    run = open_run(folder.path)
    trace, ends = run.trace
    nan = float("nan")
    np.testing.assert_array_equal(trace, [[0.5, nan], [0.75, nan], [0.25, 0.5], [0.125, 1.0]])
    assert ends == [1, 3]
    np.testing.assert_array_equal(run.accuracy_matrix, [[0.75, nan], [0.125, 1.0]])
    assert run.test_counts == [2, 2]
    assert ragged([]).shape == (0, 0)
