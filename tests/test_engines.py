"""Every engine gets the same orders and gives the same answers, bit for bit, and leaves nothing running."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

import fedcil
from fedcil.engines import Setting
from fedcil.engines.workers import WorkerShare
from fedcil.errors import RunFailed
from fedcil.experiment import open_experiment
from fedcil.messages import Broadcast, Job, Report, Request
from fedcil.port import StopSignal
from fedcil.scenario_file import load_scenario
from fedcil.tensors import count_bytes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]

Left = Callable[[float], None]
METHODS = {
    "mfcl": "{name='mfcl', preset='small', steps=5, pool=64}",
    "feder": "{name='feder', memory=20}",
    "afcl": "{name='afcl', expansion=64}",
}
SMALL = ["data.classes=4", "stream.tasks=2", "training.rounds=2", "training.epochs=1"]
ENGINES = [("inline", 2), ("ray", 1), ("ray", 2), ("flower", 2)]


def start(method: str, engine: str, workers: int, cwd: Path, *more: str) -> list[str]:
    settings = [f"method={METHODS[method]}", f"engine.workers={workers}", *SMALL, *more]
    sets = [part for setting in settings for part in ("--set", setting)]
    return [sys.executable, "-m", "fedcil", "run", "digits_mfcl", *sets, "--engine", engine, "--no-figures"]


def run(method: str, engine: str, workers: int, cwd: Path, *more: str) -> list[dict[str, Any]]:
    command = [*start(method, engine, workers, cwd, *more), "--json"]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr
    return fedcil.load(cwd / json.loads(done.stdout)["run_dir"]).results


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the inline engine with one worker says, once per method."""
    return cache(lambda method: run(method, "inline", 1, tmp_path_factory.mktemp(method)))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("engine", "workers"), ENGINES)
def test_engines_agree_bit_for_bit_and_leave_nothing(
    method: str, engine: str, workers: int, reference: Any, nothing_left: Left, tmp_path: Path
) -> None:
    assert run(method, engine, workers, tmp_path) == reference(method)
    nothing_left(20.0)


CHURN = [  # members come and go in every round, some vanish in mid-round, some are late and folded in later
    "population={name='turnover', size=12, replaced_per_task=0.5, replaced_per_round=0.25}",
    "availability={name='markov', rounds_on=4, rounds_off=1}",
    "clients={count=60, per_round=4, over_sample=1.5, dropout=0.2}",
    "clock={name='lognormal', samples_per_s=50, down_bytes_per_s=1e5, up_bytes_per_s=1e5, late='fold'}",
    "training.rounds=6",
    "server.patience=99",
]


@pytest.mark.parametrize("method", ["mfcl", "feder"])
def test_clients_that_come_go_and_vanish_are_the_same_on_every_engine(method: str, tmp_path: Path) -> None:
    expected = run(method, "inline", 1, tmp_path, *CHURN)
    rounds = [line for line in expected if line["kind"] == "round"]
    assert any(failure["stage"] == "dropout" for line in rounds for failure in line["failures"])
    assert any(line["arrived"] for line in rounds)
    for engine in ("ray", "flower"):
        assert run(method, engine, 2, tmp_path, *CHURN) == expected


@pytest.mark.parametrize(
    "rule", ["server={fold='krum', byzantine=1}", "server={fold='trimmed_mean', byzantine=1, norm_limit=1.4}"]
)
def test_robust_folds_and_limits_agree_bit_for_bit(rule: str, reference: Any, tmp_path: Path) -> None:
    """Ray sends every contribution where it would send partial sums; Flower's meet the border."""
    expected = run("mfcl", "inline", 1, tmp_path, rule)
    for engine in ("ray", "flower"):
        assert run("mfcl", engine, 2, tmp_path, rule) == expected
    assert expected != reference("mfcl")
    assert any(line.get("status") == "ok" for line in expected)
    refused = [failure["stage"] for line in expected for failure in line.get("failures", ())]
    assert set(refused) == ({"border"} if "norm_limit" in rule else set())


@pytest.mark.parametrize("engine", ["ray", "flower"])
def test_a_stopped_engine_leaves_nothing_and_resumes_on_another(
    engine: str, reference: Any, nothing_left: Left, tmp_path: Path
) -> None:
    """--max-seconds is Ctrl-C without a race: the signal is set when the run has hardly begun."""
    command = [*start("mfcl", engine, 2, tmp_path), "--max-seconds=25"]
    stopped = [*command[:-1], "--max-seconds=0"]
    done = subprocess.run(stopped, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 5, done.stderr
    nothing_left(20.0)
    (folder,) = (tmp_path / "runs").iterdir()
    command = [sys.executable, "-m", "fedcil", "resume", str(folder), "--engine", "inline", "--no-figures"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=200, stdout=subprocess.DEVNULL)
    assert fedcil.load(folder).results == reference("mfcl")


def test_ray_says_when_it_has_too_little(tmp_path: Path) -> None:
    """Without the check Ray would wait for a GPU for ever."""
    command = [*start("afcl", "ray", 1, tmp_path, "engine.gpus_per_worker=64"), "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 2, done.stderr
    assert "do not fit" in json.loads(done.stdout)["error"]["what"]


EXITING = """
import sys
from torch.nn.functional import cross_entropy
from fedcil.methods.base import Method
from fedcil.methods.settings import MethodSettings

class Exiting(MethodSettings):
    def build(self):
        return Method(loss=loss)

def loss(model, prepared, batch, draws):
    if batch.labels.sum() % 4 == 0:
        sys.exit("this client leaves")
    return cross_entropy(model(batch.images), batch.labels)
"""


def test_a_client_that_exits_is_the_same_failure_on_every_engine(tmp_path: Path) -> None:
    """Most workers train in the main thread of their process, which an exit would end."""
    (tmp_path / "exiting.py").write_text(EXITING)
    sets = [*SMALL, "method={name='exiting:Exiting'}", "clients={count=8, per_round=5}", "engine.workers=2"]
    words = [part for text in sets for part in ("--set", text)]

    def by(engine: str) -> list[dict[str, Any]]:
        command = [sys.executable, "-m", "fedcil", "run", "digits_fedavg", *words, "--engine", engine, "--no-figures"]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
        done = subprocess.run(
            [*command, "--json"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return fedcil.load(tmp_path / json.loads(done.stdout)["run_dir"]).results

    expected = by("inline")
    reasons = {failure["reason"] for line in expected for failure in line.get("failures", [])}
    assert reasons == {"SystemExit: this client leaves (exiting.py:13)"}
    assert any(line.get("answered") for line in expected)
    assert by("ray") == by("flower") == expected


def test_a_killed_ray_worker_changes_nothing(tmp_path: Path) -> None:
    """Its jobs go to another worker; no result is counted twice."""
    longer = ("training.rounds=6", "training.epochs=10")
    expected = run("mfcl", "inline", 2, tmp_path, *longer)
    output = tmp_path / "out"
    command = [*start("mfcl", "ray", 2, tmp_path, *longer), "--output", str(output)]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL) as process:
        kill_a_worker(process, output)
        assert process.wait(timeout=200) == 0
    (folder,) = output.iterdir()
    assert fedcil.load(folder).results == expected


def test_a_node_comes_and_goes_in_a_run_and_changes_nothing(nothing_left: Left, tmp_path: Path) -> None:
    """Ray's own cluster of several nodes on one machine: the newcomer's worker gets jobs, and loses them again."""
    script = Path(__file__).parent.parent / "scenarios" / "scalability" / "nodes.py"
    command = [sys.executable, str(script), "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search("same metrics as inline: yes, over [1-9]", done.stdout)
    nothing_left(20.0)


def test_the_longest_jobs_come_first_once_their_cost_is_known() -> None:
    from fedcil.engines.costs import Costs

    costs = Costs()
    jobs = [Job(client, client) for client in range(4)]
    assert costs.of(jobs) == 0.0
    costs.learn([Report(client=0, samples=1, seconds=3.0), Report(client=1, samples=1, seconds=1.0)])
    assert costs.of(jobs[:2]) == 4.0
    assert costs.of(jobs[2:]) == 4.0  # unknown ones count as the mean
    costs.learn([Report(client=1, samples=1, seconds=5.0)])
    assert costs.of([jobs[1]]) == 5.0
    assert costs.of(jobs[2:]) == 8.0


def test_who_did_harm_is_known_until_it_answers() -> None:
    from fedcil.engines.costs import Costs

    costs = Costs()
    jobs = [Job(client, client) for client in range(3)]
    costs.missed([1])
    costs.killed(2)
    assert [costs.harmful([job]) for job in jobs] == [False, True, True]
    assert [costs.deadly([job]) for job in jobs] == [False, False, True]
    costs.learn([Report(client=0, samples=1, seconds=1.0)])
    assert costs.harmful(jobs)
    costs.learn([Report(client=client, samples=1, seconds=1.0) for client in (1, 2)])
    assert not costs.harmful(jobs)
    assert not costs.deadly(jobs)


def test_jobs_are_passed_on_in_numbers_that_are_worth_it() -> None:
    from fedcil.engines.costs import Costs

    costs = Costs()
    jobs = [Job(client, client) for client in range(10)]
    assert costs.jobs_worth(1.0, jobs) == 1
    costs.learn([Report(client=client, samples=1, seconds=0.5) for client in range(4)])
    assert costs.jobs_worth(1.0, jobs) == 2
    assert costs.jobs_worth(0.4, jobs) == 1
    assert costs.jobs_worth(60.0, jobs) == 10


@pytest.mark.parametrize(
    ("seconds", "sizes"),
    [(None, [2, 2, 1, 1, 1, 1, 1, 1]), (0.0005, [10]), (0.0015, [4, 4, 2]), (1.0, [2, 2, 1, 1, 1, 1, 1, 1])],
)
def test_a_round_that_costs_less_than_passing_it_on_stays_together(seconds: float | None, sizes: list[int]) -> None:
    """Ten clients on two workers, by what each of them took."""
    from fedcil.engines.costs import Costs
    from fedcil.engines.ray import RayPort

    port: Any = RayPort.__new__(RayPort)
    port._costs, port._crew, port._at_once = Costs(), SimpleNamespace(workers=[1, 2]), 1
    if seconds:
        port._costs.learn([Report(client=client, samples=1, seconds=seconds) for client in range(10)])
    jobs = tuple(Job(client, client) for client in range(10))
    request = Request(Broadcast(task=0, phase=0, round=0, tensors={}), jobs, len(jobs))
    assert [len(part.jobs) for part in port._cut(request)] == sizes


def test_a_robust_fold_has_room_for_the_models_of_a_whole_round() -> None:
    """FedAvg on digits with 5 of 20 clients a round: 10 more models instead of one worker's 6 partial sums."""
    from fedcil.engines.ray_cluster import store_bytes

    mean = open_experiment(load_scenario("digits_fedavg"))
    robust = open_experiment(load_scenario("digits_fedavg", ["server.fold='median'"]))
    model = count_bytes(mean.first_state().server.model)
    assert store_bytes(robust, 1) - store_bytes(mean, 1) == (2 * 5 - 2 * 3) * model


def test_statistics_of_everybody_have_room_too() -> None:
    """AFCL on digits: all 20 clients are asked, and what they send is larger than the model."""
    from fedcil.engines.ray_cluster import STORE_BYTES, store_bytes

    afcl = open_experiment(load_scenario("digits_fedavg", ["method={name='afcl'}"]))
    task, model = afcl.stream.tasks[0], afcl.first_state().server.model
    (phase,) = afcl.phases(task)
    statistics = count_bytes(afcl.sent(phase, task, model))
    assert statistics > count_bytes(model)
    assert store_bytes(afcl, 2) == STORE_BYTES + 2 * count_bytes(model) + 2 * 2 * 5 * statistics


def test_a_worker_that_is_not_as_the_server_is_refused_with_the_difference(tmp_path: Path) -> None:
    from fedcil.engines.ray_crew import Crew

    crew = Crew.__new__(Crew)
    crew.identity = {"data": "a", "numeric.torch": "2.14"}
    crew.refuse_stranger({"data": "a", "numeric.torch": "2.14"})
    with pytest.raises(RunFailed, match=r"numeric.torch is 2.9 there, 2.14 here"):
        crew.refuse_stranger({"data": "a", "numeric.torch": "2.9"})


@pytest.mark.parametrize("error", [ConnectionError("nobody answers"), RuntimeError("Version mismatch: Ray: 2.9.0")])
def test_a_cluster_that_cannot_be_used_ends_the_run_with_the_reason(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray raises a bare RuntimeError if the cluster has another Ray or Python."""
    from fedcil.engines import ray_cluster

    def refuse(**_: object) -> None:
        raise error

    monkeypatch.setattr(ray_cluster.ray, "init", refuse)
    with (
        pytest.raises(RunFailed, match=f"no Ray cluster that can be used: {error}"),
        ray_cluster.cluster(StopSignal(), "auto", 1, 1, WorkerShare(1, 0.0)),
    ):
        raise AssertionError("nothing to run on")


def test_an_address_where_nobody_listens_is_not_tried_for_minutes() -> None:
    from fedcil.engines import ray_cluster

    with socket.socket() as taken:  # but nobody listens
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with (
            pytest.raises(RunFailed, match=f"no Ray cluster that can be used: nobody answers at {address}"),
            ray_cluster.cluster(StopSignal(), address, 1, 1, WorkerShare(1, 0.0)),
        ):
            raise AssertionError("nothing to run on")


@pytest.mark.parametrize("before", [None, "elsewhere"])
def test_a_flower_simulation_leaves_the_environment_as_it_was(
    before: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever calls it in a notebook goes on with the same data root."""
    from fedcil.engines.flower import told

    monkeypatch.delenv("FEDCIL_DATA_ROOT", raising=False)
    if before:
        monkeypatch.setenv("FEDCIL_DATA_ROOT", before)
    outside = dict(os.environ)
    experiment = open_experiment(load_scenario("digits_fedavg"))
    setting = Setting(experiment, Path("data"), tmp_path / "run" / "states", StopSignal())
    with told(setting):
        assert os.environ["FEDCIL_DATA_ROOT"] == str(Path("data").absolute())
        assert os.environ["FEDCIL_CLIENT_HOME"] == str(tmp_path / "run")
    assert dict(os.environ) == outside


def test_a_flower_simulation_that_never_calls_the_run_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedcil.engines import flower

    monkeypatch.setattr(flower, "cluster", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(flower.flwr.simulation, "run_simulation", lambda *_, **__: None)
    setting = Setting(open_experiment(load_scenario("digits_fedavg")), None, tmp_path / "states", StopSignal())
    with pytest.raises(RunFailed, match="ended without the run"):
        flower.serve(setting, lambda _: None)


def kill_a_worker(process: subprocess.Popen[bytes], output: Path) -> None:
    """A Ray actor of this run, as soon as a round is recorded."""
    for _ in range(1800):
        assert process.poll() is None, "the run ended too early"
        if any(path.stat().st_size for path in output.glob("*/metrics.jsonl")):
            break
        time.sleep(0.05)
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            program = " ".join(child.cmdline()[:2])  # Ray names a process only where the environment lets it
            if program.startswith("ray::ClientWorker") or program.endswith("default_worker.py"):
                child.kill()
                return
    raise AssertionError("no Ray worker was found")
