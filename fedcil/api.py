"""fedcil from Python: ``run`` a scenario, ``resume`` a run, ``load`` what a run left behind."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedcil.compute import apply_precision
from fedcil.engines import Setting, serve
from fedcil.errors import FedcilError, NotResumable
from fedcil.experiment import Experiment, open_experiment
from fedcil.models.network import initialise, snapshot
from fedcil.port import Port, StopSignal
from fedcil.record.folder import RunFolder
from fedcil.record.run import Run, open_run
from fedcil.record.summary import matrix_csv, summarise, summary_csv
from fedcil.scenario import Scenario, load_scenario
from fedcil.state import RunState, ServerState
from server.evaluation import Evaluator
from server.rounds import Session, Watcher, run_tasks

DEFAULT_OUTPUT = Path("runs")


class Nobody:
    """The watcher of a run that nobody looks at."""

    def recorded(self, line: Mapping[str, Any]) -> None:
        pass

    def client_done(self, client: int) -> None:
        pass

    def boundary_step(self, step: int, steps: int, terms: Mapping[str, float]) -> None:
        pass


def run(
    scenario: Scenario | str | Path | Mapping[str, Any],
    *,
    overrides: Sequence[str] = (),
    output: str | Path = DEFAULT_OUTPUT,
    data_root: str | Path | None = None,
    figures: bool = True,
    watcher: Watcher | None = None,
    stop: StopSignal | None = None,
) -> Run:
    """Run a scenario to its end and return the run.

    ``scenario`` is a value, a path, a shipped name or a mapping; ``overrides`` are ``"training.rounds=20"``.
    Raises ScenarioError, DataMissing, TooFewClients, or Stopped if ``stop`` is set; after the first round a
    checkpoint is always there.
    """
    if not isinstance(scenario, Scenario):
        scenario = load_scenario(scenario, overrides)
    root = Path(data_root) if data_root else None
    experiment = open_experiment(scenario, root, show_progress=watcher is not None)
    folder = RunFolder.create(Path(output), experiment)
    state = RunState(server=ServerState(model=first_model(experiment)))
    return _carry_on(experiment, folder, state, root, figures, watcher, stop)


def resume(
    path: str | Path,
    *,
    overrides: Sequence[str] = (),
    data_root: str | Path | None = None,
    figures: bool = True,
    watcher: Watcher | None = None,
    stop: StopSignal | None = None,
) -> Run:
    """Continue a run that was stopped or killed; it ends with the metrics of an uninterrupted one.

    A finished run is returned as it is. Raises NotResumable if the scenario, the data or the numeric
    configuration changed, FolderBusy if another process is at it.
    """
    old = open_run(Path(path))
    if old.finished:
        return old
    scenario = load_scenario(old.path / "scenario.toml", overrides)
    root = Path(data_root) if data_root else None
    experiment = open_experiment(scenario, root, show_progress=watcher is not None)
    folder, state = RunFolder.reopen(old.path, experiment)
    return _carry_on(experiment, folder, state, root, figures, watcher, stop)


def load(path: str | Path) -> Run:
    """A run, finished or not, from its folder."""
    return open_run(Path(path))


def first_model(experiment: Experiment) -> dict[str, Any]:
    """The model before round 0, with a head for the first task; drawn on the CPU whatever the device."""
    compute = experiment.compute
    network = compute.architecture.build(experiment.stream.tasks[0].seen)
    initialise(network, experiment.key.at("model").torch())
    return {name: tensor.to(compute.device) for name, tensor in snapshot(network).items()}


def _carry_on(
    experiment: Experiment,
    folder: RunFolder,
    state: RunState,
    data_root: Path | None,
    figures: bool,
    watcher: Watcher | None,
    stop: StopSignal | None,
) -> Run:
    """Serve the round loop from ``state`` to the end and write what a finished run has."""
    stop = stop or StopSignal()
    apply_precision(experiment.compute.precision)
    setting = Setting(experiment, data_root, folder.path / "client_states", stop)
    evaluator = Evaluator(experiment)

    def loop(port: Port) -> RunState:
        return run_tasks(Session(experiment, port, folder, watcher or Nobody(), stop, evaluator), state)

    try:
        folder.checkpoint(state, experiment)
        serve(setting, loop)
        finished = Run(folder.path)
        write_results(folder, finished)
        if figures:
            from fedcil.record.figures import draw_figures

            draw_figures(finished)
    except FedcilError as error:
        raise _in_folder(error, folder.path) from None
    finally:
        folder.close()
    return Run(folder.path)


def write_results(folder: RunFolder, finished: Run) -> None:
    """The tables of a finished run; summary.json last, since it says that the run is finished."""
    summary = summarise(finished)
    folder.write("accuracy_matrix.csv", matrix_csv(finished.accuracy_matrix))
    folder.write("summary.csv", summary_csv(summary))
    folder.write("summary.json", json.dumps(summary, indent=1))


def _in_folder(error: FedcilError, path: Path) -> FedcilError:
    """An error that ended a run says where the run is and how to go on with it."""
    if not isinstance(error, NotResumable):
        error.where = f"{error.where}, {path}" if error.where else str(path)
        error.next = error.next.replace("RUN", str(path)) or f"`fedcil resume {path}`"
    return error
