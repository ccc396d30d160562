"""(c) What an engine costs: a round with clients that do no step and send back the model that they got.

CPU seconds are those of all processes, for one client. fedcil's inline and Ray engines against Flower's stock
simulation with a client that returns the arrays of its message.
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from fedcil.engines import Setting
from fedcil.engines.inline import InlinePort
from fedcil.engines.workers import Share
from fedcil.experiment import Experiment, open_experiment
from fedcil.messages import Broadcast, Job, Request
from fedcil.port import Port, StopSignal
from fedcil.scenario_file import load_scenario
from scenarios.benchmarks.peers.session import Session, tree_cpu
from scenarios.benchmarks.timing import Case, Cost, Figure, against, in_turn, timed

CLASSES = 10
REPEAT_S = 1.0  # what a repeat should take
MOST_TURNS = 200  # rounds in a repeat
LIMIT_S = 20.0  # for the repeats of one row; the last one begun is finished


def experiment(clients: int, megabytes: int, engine: str, workers: int) -> Experiment:
    """Two images each, and no epoch."""
    scenario = {
        "data": {"name": "synthetic", "classes": CLASSES, "samples_per_class": max(1, 2 * clients // CLASSES)},
        "stream": {"tasks": 1},
        "partition": {"name": "iid"},
        "clients": {"count": clients, "per_round": clients},
        "model": {"name": "scenarios.benchmarks.nets:blank", "width": megabytes},
        "method": {"name": "fedavg"},
        "training": {"epochs": 0},
        "engine": {"name": engine, "workers": workers},
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
            from fedcil.engines.ray import Crew, RayPort, cluster, store_bytes

            share = Share(cpus=1, gpus=0.0)
            with cluster(StopSignal(), None, 2, 2, share, store_bytes(opened, 2)):
                over_ray = RayPort(setting, Crew(setting, share))
                yield over_ray
                over_ray.close()


def whole_round(opened: Experiment) -> Request:
    model = opened.first_state().server.model
    jobs = tuple(Job(client, client) for client in range(opened.scenario.clients.count))
    return Request(Broadcast(task=0, phase=0, round=0, tensors=model), jobs, len(jobs))


def rounds(request: Request, over: Port, turns: int) -> None:
    for _ in range(turns):
        one_round(request, over)


def one_round(request: Request, over: Port) -> None:
    outcome = over.run(request, None, lambda _: None)
    assert outcome.total is not None
    assert not outcome.failures
    outcome.total.mean()


def measure(
    engines: Sequence[str], clients: int, megabytes: int, repeats: int, log: Path, flower: Path | None
) -> dict[str, Figure]:
    """``engine_<engine>_<megabytes>mb_<clients>_vs_flower`` for each engine, all in turn; without Flower only what ours
    cost.
    """
    with ExitStack() as stack:
        cases: dict[str, Case] = {}
        for engine in engines:
            opened = experiment(clients, megabytes, engine, 1 if engine == "inline" else 2)
            over = stack.enter_context(port(engine, opened))
            cases[engine] = enough(partial(rounds, whole_round(opened), over), engine, clients)
        if flower:
            session = Session(flower, "flower_empty", Path(str(clients)), str(megabytes), "_", log)
            stack.callback(session.close)
            cases["flower"] = session.case(clients)
        costs = in_turn(cases, repeats, limit_s=LIMIT_S)
    theirs = costs.get("flower")
    return {f"engine_{name}_{megabytes}mb_{clients}_vs_flower": against(costs[name], theirs) for name in engines}


def enough(work: Callable[[int], None], engine: str, clients: int) -> Case:
    """A case of as many rounds as take a second: enough to be told from the ticks of CPU clocks, and no more."""
    work(1)  # the first round starts what is started once
    started = time.perf_counter()
    work(1)
    turns = max(1, min(MOST_TURNS, int(REPEAT_S / (time.perf_counter() - started))))
    return (timed if engine == "inline" else of_tree)(partial(work, turns), clients * turns)


def of_tree(work: Callable[[], object], units: int) -> Case:
    """Like ``timed``, with the CPU seconds of every process that descends from this one."""

    def case() -> Cost:
        gc.collect()
        wall, cpu = time.perf_counter(), tree_cpu()
        work()
        return Cost((tree_cpu() - cpu) / units, (time.perf_counter() - wall) / units)

    return case
