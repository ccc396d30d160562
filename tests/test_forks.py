"""Inline workers that are processes: the bits of threads, nothing lost when one dies, nothing left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import psutil
import pytest

import fedcil
from fedcil import experiment
from fedcil.cli.forecast import forecast
from fedcil.engines import Setting, forks, inline, workers
from fedcil.engines.loaded_files import LoadedFiles
from fedcil.errors import ScenarioError
from fedcil.experiment import open_experiment
from fedcil.messages import Reply
from fedcil.port import StopSignal
from fedcil.scenario_file import load_scenario

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="worker processes need memfd_create, which is Linux's")

ROOT = Path(__file__).resolve().parent.parent


def test_only_small_networks_are_worth_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    free, yes, no = (
        load_scenario("digits_fedavg", [f"engine={{{text}}}"]) for text in ("", "processes=true", "processes=false")
    )
    ray = load_scenario("digits_fedavg", ["engine.name=ray"])
    small, large = 1 << 20, 45 << 20
    assert workers.in_processes(free, 2, small)
    assert not workers.in_processes(free, 2, large)
    assert not workers.in_processes(free, 1, small)
    assert not workers.in_processes(ray, 2, small)
    assert workers.in_processes(yes, 2, large)
    assert not workers.in_processes(no, 2, small)
    for module in (workers, experiment):
        monkeypatch.setattr(module, "PROCESSES_POSSIBLE", False)
    assert not workers.in_processes(free, 2, small)
    open_experiment(free)
    with pytest.raises(ScenarioError, match="on Linux only"):
        open_experiment(yes)


def test_a_round_with_a_deadline_has_no_processes() -> None:
    late = load_scenario("digits_fedavg", ["server.deadline_s=5"])
    assert not workers.in_processes(late, 2, 1 << 20)
    with pytest.raises(ScenarioError, match=r"engine\.processes = true and server\.deadline_s"):
        load_scenario("digits_fedavg", ["server.deadline_s=5", "engine.processes=true"])


def setting(tmp_path: Path) -> Setting:
    return Setting(open_experiment(load_scenario("digits_fedavg")), None, tmp_path, StopSignal())


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_nothing_stays_open_of_processes_that_cannot_be_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, before = [], open_files()
    create = os.memfd_create

    def create_some(name: str) -> int:
        if len(made) == 5:
            raise OSError(24, "Too many open files")
        made.append(create(name))
        return made[-1]

    monkeypatch.setattr(os, "memfd_create", create_some)
    with pytest.raises(OSError, match="Too many open files"):
        forks.Forks(setting(tmp_path), 4, LoadedFiles())
    assert len(made) == 5
    assert open_files() == before


def test_a_program_that_is_still_starting_is_not_waited_for(tmp_path: Path) -> None:
    before = open_files()
    started = forks.Forks(setting(tmp_path), 2, LoadedFiles())
    assert started.starting
    started.close()
    assert started._program.returncode == -signal.SIGKILL
    assert open_files() <= before


def test_a_source_that_changes_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "changing_source.py"
    file.write_text("ONE = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    import_module("changing_source")
    loaded = LoadedFiles()
    assert not loaded.changed()
    os.utime(file, ns=(1, 1))
    assert loaded.changed() == str(file)
    file.unlink()
    assert loaded.changed() == str(file)


def test_the_plan_tells_what_processes_would_take() -> None:
    def plan(*overrides: str) -> dict[str, Any]:
        return forecast(open_experiment(load_scenario("digits_fedavg", overrides)))

    one, two, threads = plan("engine.workers=1"), plan("engine.workers=2"), plan("engine={workers=2, processes=false}")
    assert [each["processes_memory_mb"] > 0 for each in (one, two, threads)] == [False, True, False]
    assert two["predicted_memory_mb"] == threads["predicted_memory_mb"]


METHODS = {
    "mfcl": ["method={name='mfcl', preset='small', steps=5, pool=64}"],
    "feder": ["method={name='feder', memory=20}"],
    "afcl": ["method={name='afcl', expansion=64}"],
    "krum": ["method={name='fedavg'}", "server.fold=krum", "server.byzantine=1"],
}
SMALL = ["data.classes=4", "stream.tasks=2", "training.rounds=2", "training.epochs=1"]


def run(folder: Path, *more: str) -> list[dict[str, Any]]:
    return fedcil.run("digits_mfcl", overrides=[*SMALL, *more], output=folder, figures=False).results


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_processes_give_the_bits_of_one_worker(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And they have trained: a thread alone would give the same."""
    asked: list[forks.Fork] = []
    family: set[psutil.Process] = set()
    answer = forks.Fork.answer

    def counted(self: forks.Fork, *arguments: Any) -> Reply:
        if not asked:
            family.update(psutil.Process().children(recursive=True))
        asked.append(self)
        return answer(self, *arguments)

    monkeypatch.setattr(forks.Fork, "answer", counted)
    here = [*METHODS[method], "clients.per_round=5"]
    expected = run(tmp_path / "one", *here, "engine.workers=1")
    assert not asked
    assert run(tmp_path / "three", *here, "engine={workers=3, processes=true}") == expected
    assert len(set(asked)) == 2
    assert len(family) == 3
    assert not any(psutil.pid_exists(process.pid) for process in family)


@pytest.mark.slow
def test_a_long_run_starts_processes_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inline, "PAY_AFTER_S", 0.0)
    started = []

    class Watched(forks.Forks):
        def newcomers(self) -> list[forks.Fork]:
            end = time.monotonic() + 20
            while time.monotonic() < end and not (found := super().newcomers()) and self.starting:
                time.sleep(0.02)
            started.extend(found)
            return found

    monkeypatch.setattr(inline, "Forks", Watched)
    expected = run(tmp_path / "one", "engine.workers=1")
    assert run(tmp_path / "two", "engine.workers=2") == expected
    assert len(started) == 1


PROBLEMS = {
    "its program has ended": "raise SystemExit",
    "numeric.torch is 0": "import torch; torch.__version__ = '0'; " + forks.PROGRAM,
}


@pytest.mark.slow
@pytest.mark.parametrize("problem", PROBLEMS)
def test_a_process_that_cannot_be_used_is_not(problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run(tmp_path / "one", "engine.workers=1")
    monkeypatch.setattr(forks, "PROGRAM", PROBLEMS[problem])
    with pytest.warns(UserWarning, match=f"a thread trains instead: .*{problem}"):
        assert run(tmp_path / "two", "engine={workers=2, processes=true}") == expected
    assert not psutil.Process().children()


@pytest.mark.slow
def test_processes_of_a_changed_program_are_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LoadedFiles, "changed", lambda _: "method.py")
    expected = run(tmp_path / "one", "engine.workers=1")
    with pytest.warns(UserWarning, match=r"a thread trains instead: method\.py has changed since the run began"):
        assert run(tmp_path / "two", "engine={workers=2, processes=true}") == expected


SPEAKING = """
import torch
from fedcil.methods.base import Method
from fedcil.methods.settings import MethodSettings

class Speaking(MethodSettings):
    def build(self):
        return Method(loss=loss)

def loss(model, prepared, batch, draws):
    print("a step")
    return torch.nn.functional.cross_entropy(model(batch.images), batch.labels)
"""


@pytest.mark.slow
def test_what_a_method_prints_is_not_lost(tmp_path: Path) -> None:
    """Workers are killed in the end."""
    (tmp_path / "speaking.py").write_text(SPEAKING)
    buffered = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    buffered["PYTHONPATH"] = os.pathsep.join([str(tmp_path), str(ROOT)])

    def steps(engine: str) -> int:
        sets = [*SMALL, "method={name='speaking:Speaking'}", f"engine={{{engine}}}"]
        words = [part for text in sets for part in ("--set", text)]
        command = [sys.executable, "-m", "fedcil", "run", "digits_fedavg", *words, "--no-figures"]
        done = subprocess.run(command, cwd=tmp_path, env=buffered, capture_output=True, text=True, check=True)
        assert "a step" not in done.stdout, "that is the results'"
        return done.stderr.count("a step")

    assert steps("workers=3, processes=true") == steps("workers=1") > 0


@pytest.mark.slow
def test_a_program_that_cannot_be_started_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(12, "Cannot allocate memory")

    expected = run(tmp_path / "one", "engine.workers=1")
    monkeypatch.setattr(forks, "start_program", refuse)
    with pytest.warns(UserWarning, match="no worker processes, threads train the clients: .*Cannot allocate memory"):
        assert run(tmp_path / "two", "engine={workers=2, processes=true}") == expected


def start(folder: Path) -> subprocess.Popen[str]:
    sets = [*SMALL, "training.rounds=30", "engine={workers=3, processes=true}"]
    words = [part for text in sets for part in ("--set", text)]
    command = [sys.executable, "-m", "fedcil", "run", "digits_mfcl", *words, "--no-figures", "--output", str(folder)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def worker_processes(process: subprocess.Popen[str], folder: Path) -> list[psutil.Process]:
    """Those below the program, as soon as there are two and some rounds are recorded."""
    end = time.monotonic() + 60
    while time.monotonic() < end and process.poll() is None:
        found: list[psutil.Process] = []
        with contextlib.suppress(psutil.Error):  # some other child may end just now
            found = [worker for program in psutil.Process(process.pid).children() for worker in program.children()]
        rounds = sum(path.read_bytes().count(b'"kind": "round"') for path in folder.glob("*/metrics.jsonl"))
        if len(found) == 2 and rounds > 3:
            return found
        time.sleep(0.02)
    raise AssertionError(f"no worker processes: {process.communicate()}")


@pytest.mark.slow
def test_a_process_that_is_killed_takes_nothing_along(tmp_path: Path) -> None:
    with start(tmp_path / "two") as process:
        worker_processes(process, tmp_path / "two")[0].kill()
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "a worker process has died" in errors
    (folder,) = (tmp_path / "two").iterdir()
    assert fedcil.load(folder).results == run(tmp_path / "one", "training.rounds=30", "engine.workers=1")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_processes_end_with_the_run(number: signal.Signals, tmp_path: Path) -> None:
    with start(tmp_path) as process:
        found = worker_processes(process, tmp_path)
        family = [found[0].parent(), *found]
        process.send_signal(number)
        process.communicate(timeout=20)
    _, alive = psutil.wait_procs(family, timeout=5)
    assert not alive


def test_a_path_that_is_no_text_does_not_end_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's import passes over it, and so do worker processes."""
    monkeypatch.setattr(sys, "path", [*sys.path, tmp_path])
    sets = ["stream.tasks=1", "training.rounds=2", "engine={workers=2, processes=true}"]
    run = fedcil.run("digits_fedavg", overrides=sets, output=tmp_path, figures=False)
    assert len(run.kind("round")) == 2
