"""What a command does with runs that are there already: reused, continued, left out; and own data and partitions."""

from __future__ import annotations

import json
from pathlib import Path

from test_cli import SMALL, call

OWN = """
import numpy as np
from fedcil.data import Dataset, Split, digest_of

def load(section, root):
    shade = int((root / "shade").read_text())
    train = Split(np.full((40, 8, 8, 1), shade, np.uint8), np.arange(40) % 4)
    test = Split(train.images[:8], np.arange(8) % 4 if (root / "whole").exists() else np.arange(8) % 2)
    return Dataset(name="own", train=train, test=test, mean=(0.5,), std=(0.5,), class_names=tuple("abcd"),
                   digest=digest_of(train, test))

def share(labels, clients, section, rng):
    raise LookupError("no such client")
"""
OWN_DATA = [*SMALL[3:], "--set=data={name='own:load'}"]


def own_data(folder: Path, shade: int, *, whole: bool = True) -> str:
    """``--data-root`` of a folder that the loader of ``OWN`` reads."""
    folder.mkdir()
    (folder / "shade").write_text(str(shade))
    if whole:
        (folder / "whole").touch()
    return f"--data-root={folder}"


def test_a_finished_run_on_other_data_is_not_reused(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    dark, light = own_data(tmp_path / "dark", 1), own_data(tmp_path / "light", 200)
    words = ["run", "digits_fedavg", *OWN_DATA, "--seeds=0"]
    first = call(*words, dark, cwd=tmp_path)
    again = call(*words, dark, cwd=tmp_path)
    other = call(*words, light, cwd=tmp_path)
    assert "finished already" not in first.stderr
    assert "finished already" in again.stderr
    assert "finished already" not in other.stderr


def test_runs_that_are_not_finished_are_left_out_of_a_comparison(tmp_path: Path) -> None:
    done = json.loads(call("run", "digits_fedavg", *SMALL, "--json", cwd=tmp_path).stdout)["run_dir"]
    call("run", "digits_fedavg", *SMALL, "--set=name=half", "--max-seconds=0", cwd=tmp_path, expect=5)
    (half,) = (path.relative_to(tmp_path) for path in tmp_path.glob("runs/half-*"))
    found = call("compare", str(half), done, "--json", cwd=tmp_path)
    assert [element["run_dir"] for element in json.loads(found.stdout)] == [done]
    assert found.stderr == f"left out, since it is not finished: {half}\n"
    assert "is not finished" in call("compare", str(half), cwd=tmp_path, expect=2).stderr
    listed = call("list", "runs", cwd=tmp_path).stdout.splitlines()
    assert listed[1:] == [f"  {done}", f"  {half} (not finished)"]


def test_seeds_that_are_given_twice(tmp_path: Path) -> None:
    refused = call("run", "digits_fedavg", "--seeds=0,1", "--set=seed=3", cwd=tmp_path, expect=2)
    assert "seeds are given twice" in refused.stderr
    call("run", "digits_fedavg", *SMALL, "--seeds=0,0", cwd=tmp_path)
    assert len(list(tmp_path.glob("runs/*"))) == 1


def test_a_finished_run_by_other_code_is_reused_and_named_as_that(tmp_path: Path) -> None:
    words = ["run", "digits_fedavg", *SMALL[3:], "--seeds=0"]
    call(*words, cwd=tmp_path)
    (path,) = (tmp_path / "runs").glob("*/environment.json")
    assert "other code" not in call(*words, cwd=tmp_path).stderr
    path.write_text(json.dumps(json.loads(path.read_text()) | {"program": "0" * 16}))
    again = call(*words, cwd=tmp_path).stderr
    assert "finished already" in again
    assert "by other code of fedcil; delete it" in again
    path.unlink()  # whether it is alike is not known now
    assert "finished already" not in call(*words, cwd=tmp_path).stderr


def test_a_run_that_goes_on_by_other_code_of_fedcil_says_so_and_is_by_both(tmp_path: Path) -> None:
    call("run", "digits_fedavg", *SMALL, "--max-seconds=0", cwd=tmp_path, expect=5)
    (path,) = (tmp_path / "runs").glob("*/environment.json")
    ours = json.loads(path.read_text())["program"]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"program": "0" * 16}))
    said = call("resume", str(path.parent), cwd=tmp_path).stderr
    assert "fedcil changed since this run began" in said
    assert json.loads(path.read_text())["program"] == f"{'0' * 16}+{ours}"


def test_pictures_that_a_finished_run_lacks_are_drawn(tmp_path: Path) -> None:
    words = ["run", "digits_fedavg", *[word for word in SMALL if word != "--no-figures"], "--seeds=0"]
    call(*words, "--no-figures", cwd=tmp_path)
    assert "pictures: accuracy.png" in call(*words, cwd=tmp_path).stdout


def test_a_task_without_test_images_is_refused_before_it_trains(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    root = own_data(tmp_path / "half", 1, whole=False)
    done = call("run", "digits_fedavg", *OWN_DATA, root, "--json", cwd=tmp_path, expect=2)
    assert "task 2 has no test images (classes c, d)" in json.loads(done.stdout)["error"]["what"]


def test_an_own_partition_that_raises_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    done = call("run", "digits_fedavg", *SMALL, "--set=partition.name=own:share", cwd=tmp_path, expect=2)
    assert "own:share raised LookupError" in done.stderr
    assert "own.py:13" in done.stderr


def test_what_is_found_late_names_the_file_and_nothing_has_run(tmp_path: Path) -> None:
    """Seven classes of ten cannot be cut into three tasks: only the data say how many there are."""
    file = tmp_path / "mine.toml"
    file.write_text("[stream]\ntasks = 3\n[method]\nname = 'fedavg'\n")
    done = call("run", "digits_fedavg", str(file), "--set=training.rounds=1", "--json", cwd=tmp_path, expect=2)
    assert str(file) in json.loads(done.stdout)["error"]["where"]
    assert not (tmp_path / "runs").exists()


def test_a_finished_run_is_not_resumed_as_something_else(tmp_path: Path) -> None:
    done = call("run", "digits_fedavg", *SMALL, "--json", cwd=tmp_path)
    folder = json.loads(done.stdout)["run_dir"]
    call("resume", folder, "--engine=nope", cwd=tmp_path, expect=2)
    changed = call("resume", folder, "--set=training.lr=0.2", cwd=tmp_path, expect=3)
    assert "training.lr was 0.1, now 0.2" in changed.stderr
    call("resume", folder, "--set=engine.workers=1", cwd=tmp_path)


def test_a_run_whose_clients_all_diverged_says_so(tmp_path: Path) -> None:
    done = call(
        "run", "digits_fedavg", *SMALL, "--set=training.lr=1e30", "--set=training.lr_end=0.01", "--json", cwd=tmp_path
    )
    assert "of 4 rounds changed nothing" in done.stderr
    assert "lower training.lr" in done.stderr
