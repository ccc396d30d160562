"""On Ray's own cluster of several nodes: what comes, cannot start, or vanishes in the middle of a run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from played_card import played_card

from fedcil import api

pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]

SHORT = ["data.classes=4", "stream.tasks=1", "training.rounds=2", "training.epochs=1"]

# ``node``, ``cluster`` with one of them, and ``run(folder, *overrides)``; a refusal is printed.
CLUSTER = """
import json, os, sys, threading, time
os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
from pathlib import Path
import ray
from ray.cluster_utils import Cluster
from fedcil import api
from fedcil.engines import ray as engine, ray_crew
from fedcil.errors import FedcilError
from fedcil.port import StopSignal

stop = StopSignal()
node = {"num_cpus": 1, "object_store_memory": 100 << 20, "include_dashboard": False}
cluster = Cluster(initialize_head=True, head_node_args=node)

def run(folder, *overrides):
    settings = ["engine.name='ray'", f"engine.address='{cluster.address}'", *overrides]
    try:
        api.run("digits_fedavg", overrides=settings, output=folder, figures=False, stop=stop)
    except FedcilError as error:
        print(error)
    finally:
        ray.shutdown()
        cluster.shutdown()
"""

# Ray keeps answers above 100 kB on the node where they were made until the driver asks for them.
LOSE_ANSWERS = """
far = cluster.add_node(**node)
put, wait, asked = ray.put, ray.wait, False

def ask(value):
    global asked
    asked = True
    return put(value)

def lose_answers(references, **options):
    global far
    if far and asked:
        answered, _ = wait(references, num_returns=len(references), timeout=60, fetch_local=False)
        print("answers:", len(answered))
        cluster.remove_node(far)
        far = None
        time.sleep(1)
    return wait(references, **options)

ray.put, ray.wait = ask, lose_answers
run(sys.argv[1], "engine.workers=2", *sys.argv[2:])
"""

# Whoever starts while the file ``broken`` is there fails; a node joins, and meets it, after the first round.
BROKEN = """
broken = Path(sys.argv[2])

class Broken(ray_crew.ClientWorker):
    def __init__(self, *words):
        if broken.exists():
            raise FedcilError("no data here", where="this node", next="bring some")
        super().__init__(*words)

ray_crew.ClientWorker = Broken

def break_the_next_node(crew):
    if not broken.exists() and any(path.stat().st_size for path in Path(sys.argv[1]).glob("*/metrics.jsonl")):
        broken.touch()
        cluster.add_node(**node)
    return newcomers(crew)

def go_on_for_a_while(message, **_):
    print(message)
    print("lines then:", len(next(Path(sys.argv[1]).glob("*/metrics.jsonl")).read_text().splitlines()))
    threading.Timer(4.0, stop.set, (5,)).start()

newcomers, engine.Crew.newcomers = engine.Crew.newcomers, break_the_next_node
engine.warnings.warn = go_on_for_a_while
run(sys.argv[1], *sys.argv[3:])
"""

# In a program of one's own, as it attaches.
INTERRUPTED = """
def interrupted(**options):
    ray.init = init
    init(**options)
    raise KeyboardInterrupt

init, ray.init = ray.init, interrupted
settings = ["engine.name='ray'", f"engine.address='{cluster.address}'", "engine.workers=1", *sys.argv[2:]]
try:
    api.run("digits_fedavg", overrides=settings, output=sys.argv[1], figures=False)
except KeyboardInterrupt:
    print(ray.is_initialized(), *(path.name for path in Path(sys.argv[1]).glob("*/summary.json")))
run(sys.argv[1], "engine.workers=1", *sys.argv[2:])
"""

# After the first round.
HEADLESS = """
killed = False

def kill_the_head(crew):
    global killed
    if not killed and any(path.stat().st_size for path in Path(sys.argv[1]).glob("*/metrics.jsonl")):
        killed = True
        cluster.head_node.kill_gcs_server()
    return newcomers(crew)

newcomers, engine.Crew.newcomers = engine.Crew.newcomers, kill_the_head
run(sys.argv[1], *sys.argv[2:])
"""

# Somebody else has the CPU of the first node.
FULL = """
ray.init(address=cluster.address, logging_level="ERROR")

@ray.remote(num_cpus=1)
class Somebody:
    def here(self):
        return True

else_there = Somebody.options(lifetime="detached", name="x", namespace="x").remote()
assert ray.get(else_there.here.remote())
ray.shutdown()
"""

# The only node with room goes after the first round; another comes when its absence is said.
ALONE = """
far = cluster.add_node(**node)

def lose_the_node(crew):
    global far
    if far and any(path.stat().st_size for path in Path(sys.argv[1]).glob("*/metrics.jsonl")):
        cluster.remove_node(far)
        far, engine.START_S = None, 3.0
    return newcomers(crew)

def bring_another(message, **_):
    print(message)
    engine.START_S = 100.0
    cluster.add_node(**node)

newcomers, engine.Crew.newcomers = engine.Crew.newcomers, lose_the_node
engine.warnings.warn = bring_another
"""

RUN = """
run(sys.argv[1], *sys.argv[2:])
"""

# Somebody holds one of the two CPUs that fedcil would take.
HALF = (
    """
cluster.add_node(**node)
cluster.wait_for_nodes()
engine.MORE_S = 2.0
engine.warnings.warn = lambda message, **_: print(message)
"""
    + RUN
)

# One node more, with a GPU: Ray counts those that it is told of. Here and in the workers it is played.
SHARES = """
import pytest
from played_card import played_card

MEMORY = 4 << 30
cluster.add_node(**node | {"num_cpus": 3, "num_gpus": 1})
cluster.wait_for_nodes()
told = Path(sys.argv[2])

class Played(ray_crew.ClientWorker):
    def __init__(self, *words):
        self.play = played_card(pytest.MonkeyPatch(), MEMORY)  # for as long as the process lasts
        self.card = self.play.__enter__()
        super().__init__(*words)

    def run(self, *words):
        reply = super().run(*words)
        here = ray.get_runtime_context()
        where = {"node": here.get_node_id(), "gpus": [str(gpu) for gpu in ray.get_gpu_ids()]}
        done = {"replays": self.card.replays, "races": self.card.races}
        (told / str(os.getpid())).write_text(json.dumps(where | here.get_assigned_resources() | done))
        return reply

ray_crew.ClientWorker = Played
engine.warnings.warn = lambda message, **_: print(message)
with played_card(pytest.MonkeyPatch(), MEMORY):
    run(sys.argv[1], *sys.argv[3:])
"""

# Started by fedcil itself: how nice the process and a worker are.
NICENESS = """
import os
import ray
from fedcil.engines.ray_cluster import cluster
from fedcil.engines.workers import WorkerShare
from fedcil.port import StopSignal

def niceness():
    return os.getpriority(os.PRIO_PROCESS, 0)

with cluster(StopSignal(), None, 1, 1, WorkerShare(1, 0.0)):
    print(niceness(), ray.get(ray.remote(niceness).remote()))
"""


def on_a_cluster(script: str, *words: str | Path) -> str:
    """What the script prints."""
    command = [sys.executable, "-c", CLUSTER + script, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_answer_that_is_lost_with_its_node_is_made_again(tmp_path: Path) -> None:
    large = [*SHORT, "model.width=64"]
    expected = api.run("digits_fedavg", overrides=large, output=tmp_path / "inline", figures=False)
    assert "answers: 2" in on_a_cluster(LOSE_ANSWERS, tmp_path / "ray", *large)
    (folder,) = (tmp_path / "ray").iterdir()
    assert api.load(folder).results == expected.results


def test_workers_that_cannot_start_end_the_run_with_their_reason(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.touch()
    said = on_a_cluster(BROKEN, tmp_path / "ray", broken, *SHORT)
    assert "a Ray worker could not start: fedcil.errors.FedcilError: no data here\n" in said
    assert "`fedcil resume" in said


def test_a_node_that_joins_and_cannot_train_is_said_and_done_without(tmp_path: Path) -> None:
    """Nor is it tried again and again."""
    said = on_a_cluster(BROKEN, tmp_path / "ray", tmp_path / "broken", *SHORT, "training.rounds=10000").splitlines()
    assert said[0] == (
        "the run goes on without one of its workers: "
        "a Ray worker could not start: fedcil.errors.FedcilError: no data here"
    )
    assert said[2] == "the run was stopped"
    (folder,) = (tmp_path / "ray").iterdir()
    assert len(api.load(folder).lines) > int(said[1].removeprefix("lines then: "))


def test_the_death_of_a_cluster_that_was_there_before_is_said(tmp_path: Path) -> None:
    """Ray ends the process from C++, here after 3 instead of 60 seconds."""
    command = [sys.executable, "-c", CLUSTER + HEADLESS, str(tmp_path / "ray"), *SHORT, "training.rounds=10000"]
    soon = os.environ | {"RAY_gcs_rpc_server_reconnect_timeout_s": "3"}
    done = subprocess.run(command, env=soon, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode != 0
    assert "error: this process was ended from outside: killed, or by Ray, whose head died\n" in done.stderr
    (folder,) = (tmp_path / "ray").iterdir()
    assert len(api.load(folder).lines) > 0


def test_ctrl_c_as_a_run_attaches_leaves_the_program_free_to_attach_again(tmp_path: Path) -> None:
    assert on_a_cluster(INTERRUPTED, tmp_path / "ray", *SHORT) == "False\n"
    assert any(api.load(folder).finished for folder in (tmp_path / "ray").iterdir())


def test_a_cluster_without_room_is_not_waited_for_in_silence(tmp_path: Path) -> None:
    said = on_a_cluster(FULL + "engine.START_S = 3.0" + RUN, tmp_path / "ray", *SHORT)
    assert "no Ray worker has started in 3 s: 0 of 1 CPUs are free" in said


def test_one_worker_is_enough_to_begin_with(tmp_path: Path) -> None:
    started = time.monotonic()
    said = on_a_cluster(FULL + HALF, tmp_path / "ray", *SHORT)
    assert time.monotonic() - started < 100  # START_S is longer
    assert said == (
        "1 of 2 Ray workers are there (0 of 2 CPUs are free): the run begins, and others join when they are ready\n"
    )
    (folder,) = (tmp_path / "ray").iterdir()
    assert api.load(folder).finished


def test_a_run_whose_last_node_goes_says_so_and_goes_on_with_the_next(tmp_path: Path) -> None:
    longer = [*SHORT, "training.rounds=6"]
    expected = api.run("digits_fedavg", overrides=longer, output=tmp_path / "inline", figures=False)
    said = on_a_cluster(FULL + ALONE + RUN, tmp_path / "ray", "engine.workers=1", *longer)
    assert said == (
        "no Ray worker has been there for 3 s (0 of 1 CPUs are free): the run waits for one; Ctrl-C saves it\n"
    )
    (folder,) = (tmp_path / "ray").iterdir()
    assert api.load(folder).results == expected.results


def test_workers_share_a_gpu_and_stay_where_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two, with halves by what a worker needs, on the one node with a GPU, although there are CPUs for four."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    told = tmp_path / "told"
    told.mkdir()
    mfcl = "method={name='mfcl', preset='small', steps=5, pool=64}"
    words = ["device='cuda'", mfcl, "data.classes=4", "stream.tasks=2", "training.rounds=2", "training.epochs=1"]
    with played_card(monkeypatch) as card:
        expected = api.run("digits_fedavg", overrides=words, output=tmp_path / "inline", figures=False)
    assert not on_a_cluster(SHARES, tmp_path / "ray", told, "engine.workers=2", *words)
    workers = [json.loads(path.read_text()) for path in told.iterdir()]
    assert len(workers) == 2
    assert len({worker.pop("node") for worker in workers}) == 1
    assert sum(worker.pop("replays") for worker in workers) == card.replays - 5  # which are the boundary's
    assert workers == [{"gpus": ["0"], "CPU": 1.0, "GPU": 0.5, "races": []}] * 2
    (folder,) = (tmp_path / "ray").iterdir()
    assert api.load(folder).results == expected.results


def test_workers_are_as_nice_as_the_run() -> None:
    """With Ray's own default they starve as soon as anybody else uses the machine."""
    command = ["nice", "-n", "3", sys.executable, "-c", NICENESS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True)
    run, worker = done.stdout.split()
    assert worker == run
