"""Rounds of fedcil's own engines with clients that do no step and send back the model that they got."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from fedcil.allocator import keep_freed_memory
from fedcil.engines import Setting
from fedcil.engines.inline import InlinePort
from fedcil.engines.ray import RayPort
from fedcil.engines.ray_cluster import cluster, store_bytes
from fedcil.engines.ray_crew import Crew
from fedcil.engines.workers import WorkerShare
from fedcil.experiment import Experiment, open_experiment
from fedcil.messages import Broadcast, Job, Request
from fedcil.port import Port, StopSignal
from fedcil.scenario_file import load_scenario

CLASSES = 10
WORKERS = {"inline": 1, "ray": 2}
MOST = 1000  # clients of the experiment; a round asks some of them


def experiment(megabytes: int, engine: str) -> Experiment:
    """Two images each, and no epoch."""
    scenario = {
        "data": {"name": "synthetic", "classes": CLASSES, "samples_per_class": 2 * MOST // CLASSES},
        "stream": {"tasks": 1},
        "partition": {"name": "iid"},
        "clients": {"count": MOST, "per_round": MOST},
        "model": {"name": "scenarios.benchmarks.nets:blank", "width": megabytes},
        "method": {"name": "fedavg"},
        "training": {"epochs": 0},
        "engine": {"name": engine, "workers": WORKERS[engine]},
    }
    return open_experiment(load_scenario(scenario))


@contextmanager
def port(engine: str, opened: Experiment) -> Iterator[Port]:
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(opened, None, Path(folder), StopSignal())
        if engine == "inline":
            inline = InlinePort(setting)
            yield inline
            inline.close()
        else:
            workers, share = WORKERS[engine], WorkerShare(cpus=1, gpus=0.0)
            with cluster(setting.stop, None, workers, workers, share, store_bytes(opened, workers)):
                over_ray = RayPort(setting, Crew(setting, share))
                yield over_ray
                over_ray.close()


def one_round(broadcast: Broadcast, over: Port, clients: int) -> None:
    request = Request(broadcast, tuple(Job(client, client) for client in range(clients)), clients)
    outcome = over.run(request, None, lambda _: None)
    assert outcome.total is not None
    assert not outcome.failures
    outcome.total.mean()


@contextmanager
def rounds_of(engine: str, megabytes: int) -> Iterator[Callable[[int], None]]:
    """One round of so many clients at each call, in a process that keeps freed memory from now on, as that of
    ``fedcil run`` does.
    """
    keep_freed_memory()
    opened = experiment(megabytes, engine)
    broadcast = Broadcast(task=0, phase=0, round=0, tensors=opened.first_state().server.model)
    with port(engine, opened) as over:
        yield partial(one_round, broadcast, over)
