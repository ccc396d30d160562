"""The server side as a Flower ServerApp: the same round loop, over Flower's Grid.

``flwr run .`` starts it with the keys of ``[tool.flwr.app.config]``: ``scenario`` (a path or a shipped name),
``set`` (overrides, separated by semicolons), ``output`` and ``data-root``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedcil.experiment import open_experiment
from fedcil.port import StopSignal
from fedcil.record.folder import RunFolder
from fedcil.record.summary import finish
from fedcil.scenario_file import load_scenario
from server.grid import GridPort
from server.rounds import open_session, run_tasks

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """One run over the nodes that are there."""
    config = context.run_config
    overrides = [text for text in str(config["set"]).split(";") if text]
    scenario = load_scenario(str(config["scenario"]), overrides)
    data_root = str(config["data-root"]) or os.environ.get("FEDCIL_DATA_ROOT")
    experiment = open_experiment(scenario, Path(data_root) if data_root else None)
    folder = RunFolder.create(Path(str(config["output"])).absolute(), experiment)
    try:
        port = GridPort(grid, experiment, folder.path.name, StopSignal())
        run_tasks(open_session(experiment, folder, port), experiment.first_state())
        print(f"run folder: {finish(folder).path}")
    finally:
        folder.close()


def server_app(run: Callable[[Grid], None]) -> ServerApp:
    """A ServerApp that calls ``run`` with its grid: for a simulation in this process."""
    inside = ServerApp()

    @inside.main()
    def main_of_simulation(grid: Grid, _: Context) -> None:
        run(grid)

    return inside
