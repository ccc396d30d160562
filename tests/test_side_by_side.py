"""`fedcil run --jobs`: several runs at a time, each with the result that it has alone."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from test_cli import call

import fedcil
from fedcil.cli import side_by_side
from fedcil.cli.runs import Options
from fedcil.errors import Stopped
from fedcil.port import StopSignal

TINY = str(Path(__file__).with_name("tiny.toml"))
WORDS = ("run", TINY, "--no-figures")
LONG = ("--set=training.rounds=2000", "--set=server.checkpoint_every=1999")

# Data that say how many cores the process that opens them may use, and where it looks.
OWN = """
import joblib, numpy as np
from fedcil.data import Dataset, Split, digest_of

def load(section, root):
    print("cores:", joblib.cpu_count(), root.name)
    split = Split(np.zeros((40, 8, 8, 1), np.uint8), np.arange(40) % 4)
    return Dataset(name="own", train=split, test=split, mean=(0.5,), std=(0.5,), class_names=tuple("abcd"),
                   digest=digest_of(split, split))
"""


def results(folder: Path) -> dict[int, list[dict[str, object]]]:
    """By seed."""
    runs = [fedcil.load(path) for path in (folder / "runs").iterdir()]
    return {run.scenario.seed: run.results for run in runs}


def test_the_same_metrics_as_one_after_another(tmp_path: Path) -> None:
    said = {}
    for jobs in ("1", "2"):
        (folder := tmp_path / jobs).mkdir()
        said[jobs] = call(*WORDS, "--seeds=2,0,1", f"--jobs={jobs}", "--json", cwd=folder)
    assert results(tmp_path / "1") == results(tmp_path / "2")
    one, two = (json.loads(each.stdout) for each in said.values())
    assert [each["seed"] for each in two] == [each["seed"] for each in one] == [2, 0, 1]
    assert [each["final_accuracy"] for each in two] == [each["final_accuracy"] for each in one]
    assert said["2"].stderr == ""
    assert not list(tmp_path.glob("*/runs/*/figures"))


def test_each_has_its_share_of_the_cores_and_the_data_and_says_which_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "2")
    (tmp_path / "own.py").write_text(OWN)
    done = call(*WORDS, "--set=data={name='own:load'}", "--data-root=here", "--seeds=0,1", "--jobs=2", cwd=tmp_path)
    assert done.stderr.count("cores: 1 here\n") >= 2
    for seed in (0, 1):
        assert f"tiny seed {seed}: task 2 done" in done.stderr


def test_finished_runs_are_not_started_and_unfinished_ones_go_on(tmp_path: Path) -> None:
    first = json.loads(call(*WORDS, "--seeds=0", "--json", cwd=tmp_path).stdout)["run_dir"]
    call(*WORDS, "--set=seed=1", "--max-seconds=0", cwd=tmp_path, expect=5)
    again = call(*WORDS, "--seeds=0,1", "--jobs=2", cwd=tmp_path)
    assert f"finished already: {first}" in again.stderr
    assert "continuing: runs/tiny-1-" in again.stderr
    assert "tiny seed 0" not in again.stderr
    assert len(results(tmp_path)) == len(list(tmp_path.glob("runs/*"))) == 2


def test_what_ends_one_of_them_is_said_once_the_others_are_done(tmp_path: Path) -> None:
    lonely = tmp_path / "lonely.toml"
    text = Path(TINY).read_text().replace('"tiny"', '"lonely"')
    alone = "\n[server]\nquorum = 1\npatience = 2\n\n[availability]\nname = 'bernoulli'\nprobability = 0.0\n"
    lonely.write_text(text + alone)
    done = call("run", str(lonely), TINY, "--jobs=2", "--no-figures", "--json", cwd=tmp_path, expect=4)
    assert json.loads(done.stdout)["error"]["kind"] == "too_few_clients"
    assert "runs/lonely-0-" in json.loads(done.stdout)["error"]["next"]
    (run,) = tmp_path.glob("runs/tiny-0-*")
    assert fedcil.load(run).finished


def begun(folder: Path, *more: str) -> subprocess.Popen[str]:
    """Two runs side by side that have recorded a round each; a third waits."""
    command = [sys.executable, "-m", "fedcil", *WORDS, *LONG, "--seeds=0,1,2", "--jobs=2", *more]
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # tests may run under nohup
    process = subprocess.Popen(command, cwd=folder, stdout=-1, stderr=-1, text=True)
    signal.signal(signal.SIGHUP, before)
    until = time.monotonic() + 60
    while sum(path.stat().st_size > 0 for path in folder.glob("runs/*/metrics.jsonl")) < 2:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.05)
    return process


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_stops_all_with_checkpoints(
    number: int, code: int, tmp_path: Path, nothing_left: Callable[[float], None]
) -> None:
    process = begun(tmp_path)
    process.send_signal(number)
    time.sleep(0.05)
    process.send_signal(number)  # as `timeout` does, which tells the process and then its group
    _, said = process.communicate(timeout=60)
    assert process.returncode == code, said
    assert said.endswith("next: the same command goes on with all runs that are not finished\n")
    assert "Traceback" not in said
    nothing_left(1.0)
    assert len(list(tmp_path.glob("runs/*"))) == 2
    for run in tmp_path.glob("runs/*"):
        newest = max(run.glob("checkpoints/*.json"), key=lambda path: path.stat().st_mtime)
        assert newest.name != "state-0.json"


def test_nothing_outlives_it(tmp_path: Path, nothing_left: Callable[[float], None]) -> None:
    process = begun(tmp_path)
    process.kill()
    process.communicate(timeout=60)
    nothing_left(20.0)


def test_a_run_that_is_killed_is_said(tmp_path: Path) -> None:
    process = begun(tmp_path, "--seeds=0,1")
    for child in psutil.Process(process.pid).children():
        child.kill()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "the run's process ended with -9" in said
    assert "where: tiny seed 0" in said


def test_jobs_that_are_none(tmp_path: Path) -> None:
    assert "--jobs" in call(*WORDS, "--jobs=0", cwd=tmp_path, expect=2).stderr


def test_a_stop_that_finds_all_of_them_done_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    stop = StopSignal()

    class Over:
        """A run that is over at once, while somebody asks all of them to stop."""

        over = True

        def __init__(self, wanted: str, *_: object) -> None:
            self.folder = Path(wanted)

        def result(self) -> Path:
            stop.set(130)
            return self.folder

        def stop(self) -> None: ...

    monkeypatch.setattr(side_by_side, "Part", Over)
    options = Options(None, figures=False, stop=stop, quiet=True)
    assert side_by_side.side_by_side(["a", "b"], 2, Path(), options) == [Path("a"), Path("b")]
    stop.event.clear()
    with pytest.raises(Stopped):  # the third was not begun
        side_by_side.side_by_side(["a", "b", "c"], 2, Path(), options)
