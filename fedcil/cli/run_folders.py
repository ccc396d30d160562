"""The run folder that real servers are to work in: a new one, or one that was begun."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedcil.errors import InputError, NotResumable, ScenarioError, located

if TYPE_CHECKING:
    from fedcil.scenario import Scenario


def run_folder(target: str, overrides: Sequence[str], output: Path, nodes: int | None) -> Path:
    """A run folder that is there, or a new one with the scenario in it, for so many nodes here. None: nodes and server
    are elsewhere, and an unfinished run is gone on with.
    """
    from fedcil.files import write_atomic
    from fedcil.record.folder import METRICS, new_folder
    from fedcil.scenario_file import load_scenario, to_toml

    if (Path(target) / "scenario.toml").is_file():
        if overrides:
            raise InputError("a run that was begun keeps its scenario", where="--set", next="leave --set out")
        return begun_folder(Path(target), nodes)
    with located(target):
        scenario = load_scenario(target, overrides)
        check_deployable(scenario, nodes)
    found = unfinished(scenario, output) if nodes is None else None
    if found is not None:
        return found
    folder = new_folder(output, f"{scenario.name}-{scenario.seed}")
    (folder / METRICS).touch()
    write_atomic(folder / "scenario.toml", to_toml(scenario).encode())
    return folder


def begun_folder(folder: Path, nodes: int | None) -> Path:
    """A run that was begun, if servers can go on with it."""
    from fedcil.record.folder import CLIENT_STATES
    from fedcil.scenario_file import load_scenario

    with located(str(folder)):
        check_deployable(load_scenario(folder / "scenario.toml"), nodes)
    if (folder / CLIENT_STATES).is_dir():
        raise NotResumable(
            "what this run's clients keep lies in its folder, and nodes have their own",
            where=str(folder / CLIENT_STATES),
            next=f"`fedcil resume {folder}`",
        )
    return folder


def unfinished(scenario: Scenario, output: Path) -> Path | None:
    """The newest run of this scenario that has no end yet, or whose supervisor died before it had shown the end."""
    from fedcil.record.folder import SUBMISSION
    from fedcil.record.run import Run, earlier_runs

    def fits(run: Run) -> bool:
        same = run.scenario.deciding() == scenario.deciding() and run.scenario.availability == scenario.availability
        return same and (not run.finished or (run.path / SUBMISSION).exists())

    found = earlier_runs(scenario, output, fits)
    return found[-1].path if found else None


def check_deployable(scenario: Scenario, nodes: int | None) -> None:
    """What is wrong is said here, by the command, and not by a server somewhere; of device and precision only if the
    ``nodes`` are here. Loads the data.
    """
    from fedcil.experiment import open_experiment
    from fedcil.record.identity import run_identity

    if scenario.server.deadline_s is None:
        raise ScenarioError(
            "real nodes can vanish without a word, so a round needs a deadline",
            where="server.deadline_s",
            allowed="seconds, above the longest time that a node's clients train",
            next="begin the run with --set server.deadline_s=120",
        )
    if nodes is None:
        exact = scenario.training.model_copy(update={"precision": "fp32"})
        scenario = scenario.model_copy(update={"device": "cpu", "training": exact})
    elif nodes > scenario.clients.count:
        raise ScenarioError(
            f"{nodes} nodes for {scenario.clients.count} clients: some would have none",
            where="--nodes, clients.count",
            allowed=f"1 to {scenario.clients.count} nodes",
            next="lower --nodes",
        )
    run_identity(open_experiment(scenario))
