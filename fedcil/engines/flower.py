"""Flower's stock simulation in this process: Flower nodes on Ray, messages in memory.

For interoperability: the same ServerApp loop and the same ClientApp as in a real deployment.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from typing import TypeVar

import flwr.simulation
from flwr.serverapp import Grid

from client import app as client_app
from fedcil.engines import Setting, ray_head
from fedcil.engines.ray import cluster, share_of_worker
from fedcil.engines.workers import worker_count
from fedcil.port import Port
from server.app import server_app
from server.grid import GridPort

T = TypeVar("T")
MOST_NODES = 100  # more clients than this share nodes


def serve(setting: Setting, loop: Callable[[Port], T]) -> T:
    scenario = setting.experiment.scenario
    nodes = min(scenario.clients.count, MOST_NODES)
    results: list[T] = []
    problems: list[BaseException] = []

    def inside(grid: Grid) -> None:
        """Flower would wrap what is raised here."""
        try:
            results.append(loop(GridPort(grid, setting.experiment, setting.states.parent.name, setting.stop)))
        except BaseException as problem:
            problems.append(problem)

    os.environ[client_app.HOME] = str(setting.states.parent.absolute())
    if setting.data_root is not None:
        os.environ[client_app.DATA_ROOT] = str(setting.data_root.absolute())
    logging.getLogger("flwr").setLevel(logging.ERROR)
    workers = worker_count(setting.experiment)
    share = share_of_worker(setting.experiment, workers)
    resources = {"num_cpus": share.cpus, "num_gpus": share.gpus}
    least = workers if scenario.engine.workers else 1
    with cluster(setting.stop, scenario.engine.address, workers, least, share):
        try:
            flwr.simulation.run_simulation(
                server_app(inside),
                client_app.app,
                num_supernodes=nodes,
                backend_config={"client_resources": resources},
            )
        except BaseException:
            time.sleep(2 * ray_head.LOOK_S)  # whatever Flower says after Ray's head has died, that is the reason
            setting.stop.check()
            raise
    if problems:
        raise problems[0]
    return results[0]
