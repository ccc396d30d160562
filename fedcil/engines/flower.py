"""Flower's stock simulation in this process: Flower nodes on Ray, messages in memory.

For interoperability: the same ServerApp loop and the same ClientApp as in a real deployment.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator

import flwr.simulation
import psutil
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from client import app as client_app
from fedcil.data.places import ROOT_VARIABLE
from fedcil.engines import Setting, ray_head
from fedcil.engines.ray_cluster import cluster, share_of_worker
from fedcil.engines.workers import worker_count
from fedcil.errors import RunFailed
from fedcil.port import Port
from server.grid import GridPort

END_S = 10.0  # how long clients may take to end when the run is over: Flower would wait for one that hangs without end
MOST_NODES = 100  # more clients than this share nodes


def serve(setting: Setting, loop: Callable[[Port], None]) -> None:
    scenario = setting.experiment.scenario
    nodes = min(scenario.clients.count, MOST_NODES)
    ended: list[BaseException | None] = []
    over = threading.Event()
    last = threading.Thread(target=end_clients, args=(over,), name="last clients", daemon=True)

    def main(grid: Grid, _: Context) -> None:
        try:
            loop(GridPort(grid, setting.experiment, setting.states.parent.name, setting.stop))
            ended.append(None)
        except BaseException as problem:  # Flower would wrap it
            ended.append(problem)
        finally:
            last.start()

    server = ServerApp()
    server.main()(main)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    workers = worker_count(setting.experiment)
    share = share_of_worker(setting.experiment, workers)
    resources = {"num_cpus": share.cpus, "num_gpus": share.gpus}
    least = workers if scenario.engine.workers else 1
    with told(setting), cluster(setting.stop, scenario.engine.address, workers, least, share):
        try:
            flwr.simulation.run_simulation(
                server,
                client_app.app,
                num_supernodes=nodes,
                backend_config={"client_resources": resources},
            )
        except BaseException:
            time.sleep(2 * ray_head.LOOK_S)  # whatever Flower says after Ray's head has died, that is the reason
            setting.stop.check()
            raise
        finally:
            over.set()
    if not ended:
        raise RunFailed("Flower's simulation has ended without the run", where="engine", next="`fedcil resume RUN`")
    if ended[0]:
        raise ended[0]


def end_clients(over: threading.Event) -> None:
    """Of a Ray that was started here; of another's nobody knows which workers are this run's."""
    while not over.wait(END_S):
        hanging = [child for child in psutil.Process().children(recursive=True) if at_a_client(child)]
        if hanging:
            logging.getLogger("flwr").setLevel(logging.CRITICAL + 1)  # it would tell of each
        for worker in hanging:
            with contextlib.suppress(psutil.Error):
                worker.kill()
        if hanging:
            warnings.warn("clients that hang in a step are ended, since the run is over", stacklevel=1)


def at_a_client(process: psutil.Process) -> bool:
    """By its title."""
    try:
        return "".join(process.cmdline()).startswith("ray::ClientAppActor.run")
    except psutil.Error:  # it has ended
        return False


@contextlib.contextmanager
def told(setting: Setting) -> Iterator[None]:
    """Nodes learn from the environment where to keep things and where the data are; afterwards it is as before."""
    words = {client_app.HOME: setting.states.parent}
    if setting.data_root is not None:
        words[ROOT_VARIABLE] = setting.data_root
    before = {name: os.environ.get(name) for name in words}
    os.environ.update({name: str(path.absolute()) for name, path in words.items()})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
