"""fedcil from Python: ``run`` a scenario, ``resume`` a run, ``load`` what a run left behind."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedcil.engines import Setting, load_engine, serve
from fedcil.engines.memory import too_large
from fedcil.errors import FedcilError, NotResumable, located
from fedcil.experiment import Experiment, open_experiment
from fedcil.port import Port, StopSignal
from fedcil.record.folder import CLIENT_STATES, RunFolder, on_disk
from fedcil.record.identity import refuse_changes
from fedcil.record.run import Run, open_run
from fedcil.record.summary import finish
from fedcil.scenario import Scenario
from fedcil.scenario_file import load_scenario
from fedcil.state import RunState
from server.rounds import run_tasks
from server.session import Watcher, open_session

DEFAULT_OUTPUT = Path("runs")


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
    Raises ScenarioError, InputError, DataMissing, TooFewClients, or Stopped if ``stop`` is set; after the first round a
    checkpoint is always there.
    """
    source = ""
    if isinstance(scenario, Scenario):
        scenario = scenario.to_dict()
    else:
        source = str(scenario) if isinstance(scenario, str | Path) else "scenario"
    scenario = load_scenario(scenario, overrides)
    root = Path(data_root) if data_root else None
    with located(source):
        load_engine(scenario.engine.name)
        experiment = open_experiment(scenario, root, show_progress=watcher is not None)
        folder, state = RunFolder.create(Path(output), experiment), experiment.first_state()
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
    scenario = load_scenario(old.path / "scenario.toml", overrides)
    if old.finished:
        key, file, was = "availability.file", scenario.availability.file, old.scenario.availability.file
        made = old.identity.get("scenario") or old.scenario.deciding()
        refuse_changes(made | {key: was}, scenario.deciding() | {key: file}, old.path)
        if figures and not (old.path / "figures").is_dir():
            draw(old)
        return old
    root = Path(data_root) if data_root else None
    experiment = open_experiment(scenario, root, show_progress=watcher is not None)
    changed = [*old.changed_code(scenario), *(["fedcil"] if old.by_other_code else [])]  # before the folder is taken
    folder, state = RunFolder.reopen(old.path, experiment)
    if changed:
        warnings.warn(f"{', '.join(changed)} changed since this run began: its parts are by other code", stacklevel=2)
    if state.client_states and not (folder.path / CLIENT_STATES).is_dir() and not scenario.engine.address:
        folder.close()
        raise NotResumable(
            "what this run's clients keep is not in its folder: it lies with the nodes where they trained",
            where=str(folder.path),
            next=f"continue it there, as with `fedcil deploy local {folder.path}`",
        )
    return _carry_on(experiment, folder, state, root, figures, watcher, stop)


def load(path: str | Path) -> Run:
    """A run, finished or not, from its folder."""
    return open_run(Path(path))


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
    for note in too_large(experiment):
        warnings.warn(note, stacklevel=3)
    stop = stop or StopSignal()
    setting = Setting(experiment, data_root, folder.path / CLIENT_STATES, stop)

    def loop(port: Port) -> None:
        run_tasks(open_session(experiment, folder, port, watcher, stop), state)

    try:
        folder.checkpoint(state)  # from here on a run can be resumed, whatever the engine does
        serve(setting, loop)
        with on_disk(folder.path):
            finished = finish(folder)
            if figures:
                draw(finished)
    except FedcilError as error:
        raise in_folder(error, folder.path, "fedcil resume", data_root or experiment.scenario.data.root) from None
    finally:
        folder.close()
    return finished


def draw(finished: Run) -> None:
    from fedcil.record.figures import draw_figures

    draw_figures(finished)


def in_folder(error: FedcilError, path: Path, command: str, data_root: Path | str | None) -> FedcilError:
    """An error that ended a run says where the run is and how ``command`` goes on with it."""
    again = f"{command} {path}" + (f" --data-root {data_root}" if data_root else "")
    if not isinstance(error, NotResumable):
        error.where = f"{error.where}, {path}" if error.where not in ("", str(path)) else str(path)
        error.next = error.next.replace("fedcil resume RUN", again).replace("RUN", str(path)) or f"`{again}`"
    return error
