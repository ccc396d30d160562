"""The server side as a Flower ServerApp: the same round loop, over Flower's Grid.

``flwr run .`` starts it with the keys of ``[tool.flwr.app.config]``: ``scenario`` (a path or a shipped name),
``set`` (overrides, separated by semicolons), ``output`` and ``data-root``. A deployment gives a run folder instead
(``folder``), which has a scenario in it and may have a checkpoint to go on from.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedcil.allocator import keep_freed_memory
from fedcil.dotted import search_working_folder
from fedcil.errors import FedcilError, FolderBusy
from fedcil.experiment import Experiment, open_experiment
from fedcil.files import write_atomic
from fedcil.port import StopSignal
from fedcil.record.folder import PROBLEM, RunFolder
from fedcil.record.summary import finish
from fedcil.scenario_file import load_scenario
from fedcil.state import RunState
from server.grid import GridPort
from server.rounds import run_tasks
from server.session import open_session

BUSY_S = 60.0

search_working_folder()
app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """One run over the nodes that are there."""
    config = context.run_config
    if config.get("folder"):
        continue_folder(grid, Path(str(config["folder"])), int(config["min-clients"]))
        return
    overrides = [text for text in str(config["set"]).split(";") if text]
    scenario = load_scenario(str(config["scenario"]), overrides)
    experiment = open_experiment(scenario, Path(str(config["data-root"])) if config["data-root"] else None)
    folder = RunFolder.create(Path(str(config["output"])).absolute(), experiment)
    serve(grid, experiment, folder, experiment.first_state(), 0)


def continue_folder(grid: Grid, path: Path, min_clients: int) -> None:
    """The run in a folder, begun or continued; what ends it is written there for the one who watches."""
    try:
        experiment = open_experiment(load_scenario(path / "scenario.toml"))
        folder, state = enter(path, experiment)
        serve(grid, experiment, folder, state, min_clients)
    except FolderBusy:
        raise  # another server app is at it; its own end is what counts
    except FedcilError as error:
        write_atomic(path / PROBLEM, json.dumps(error.as_dict() | {"exit_code": error.exit_code}).encode())
        raise


def enter(path: Path, experiment: Experiment) -> tuple[RunFolder, RunState]:
    """The folder, once the server app before this one has let go of it; one that was stopped needs a moment."""
    until = time.monotonic() + BUSY_S
    while True:
        try:
            return RunFolder.enter(path, experiment)
        except FolderBusy:
            if time.monotonic() > until:
                raise
            time.sleep(1.0)


def serve(grid: Grid, experiment: Experiment, folder: RunFolder, state: RunState, min_clients: int) -> None:
    """Take the run in ``folder`` from ``state`` to its end, over nodes that serve ``min_clients`` (0: all) at first."""
    keep_freed_memory()
    try:
        port = GridPort(grid, experiment, folder.path.name, StopSignal(), state.nodes, min_clients)
        run_tasks(open_session(experiment, folder, port), state)
        print(f"run folder: {finish(folder).path}")
    finally:
        folder.close()
