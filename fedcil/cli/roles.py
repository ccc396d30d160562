"""What the commands of ``fedcil deploy`` do: read, call, print. The work itself is in fedcil/deploy/."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedcil.cli.guard import stoppable
from fedcil.errors import InputError, NotResumable, ScenarioError, located

if TYPE_CHECKING:
    from fedcil.port import StopSignal
    from fedcil.record.run import Run
    from fedcil.scenario import Scenario


def local(
    *,
    target: str,
    nodes: int,
    overrides: Sequence[str],
    data_root: Path | None,
    output: Path,
    figures: bool,
    max_seconds: float | None,
    json: bool,
) -> None:
    from fedcil.deploy.local import deploy_local

    give_data_root(data_root)
    folder = run_folder(target, overrides, output, continue_unfinished=False)
    print(f"run folder: {folder} (logs: {folder / 'deployment' / 'logs'})", file=sys.stderr)

    def work(stop: StopSignal, progress: Callable[[], None]) -> Run:
        return deploy_local(folder, nodes, stop, say, progress)

    conclude(folder, work, max_seconds, figures=figures, json=json)


def supervise(
    *,
    target: str,
    address: str,
    pki: Path,
    overrides: Sequence[str],
    data_root: Path | None,
    output: Path,
    register: int,
    min_clients: int,
    figures: bool,
    json: bool,
) -> None:
    from fedcil.deploy.control import Control, enrol
    from fedcil.deploy.pki import Pki
    from fedcil.deploy.supervisor import Supervisor

    give_data_root(data_root)
    keys = Pki(pki)
    control = Control(address, keys.ca, Path.home() / ".fedcil" / "flower")
    folder = run_folder(target, overrides, output, continue_unfinished=True)
    print(f"run folder: {folder}", file=sys.stderr)

    def work(stop: StopSignal, progress: Callable[[], None]) -> Run:
        enrol(control, keys, register, stop)
        return Supervisor(control, folder, min_clients, say).run(stop, lambda: None, progress)

    conclude(folder, work, None, figures=figures, json=json)


def pki(*, folder: Path, hosts: Sequence[str], nodes: int, days: float) -> None:
    from fedcil.deploy.pki import make_pki

    made = make_pki(folder, hosts=hosts, nodes=nodes, days=days)
    print(f"certificates and keys: {made.folder} ({nodes} nodes may join)")


def node(*, superlink: str, pki: Path, homes: Path, slots: int, share: str, port: int) -> None:
    from fedcil.deploy.node import serve
    from fedcil.deploy.pki import Pki

    with stoppable(None, what="leaving") as stop:
        serve(Pki(pki), superlink, homes, slots, port, share, stop)


def run_folder(target: str, overrides: Sequence[str], output: Path, *, continue_unfinished: bool) -> Path:
    """A run folder that is there, or a new one with the scenario in it."""
    from fedcil.record.folder import METRICS, new_folder
    from fedcil.scenario_file import load_scenario, to_toml

    if (Path(target) / "scenario.toml").is_file():
        if overrides:
            raise InputError("a run that was begun keeps its scenario", where="--set", next="leave --set out")
        return begun_folder(Path(target))
    with located(target):
        scenario = load_scenario(target, overrides)
        check_deployable(scenario)
    found = unfinished(scenario, output) if continue_unfinished else None
    if found is not None:
        return found
    folder = new_folder(output, f"{scenario.name}-{scenario.seed}")
    (folder / METRICS).touch()
    (folder / "scenario.toml").write_text(to_toml(scenario))
    return folder


def begun_folder(folder: Path) -> Path:
    """A run that was begun, if servers can go on with it."""
    from fedcil.record.folder import CLIENT_STATES
    from fedcil.scenario_file import load_scenario

    with located(str(folder)):
        check_deployable(load_scenario(folder / "scenario.toml"))
    if (folder / CLIENT_STATES).is_dir():
        raise NotResumable(
            "what this run's clients keep lies in its folder, and nodes have their own",
            where=str(folder / CLIENT_STATES),
            next=f"`fedcil resume {folder}`",
        )
    return folder


def unfinished(scenario: Scenario, output: Path) -> Path | None:
    """The newest run of this scenario that has no end yet."""
    from fedcil.record.run import open_run

    for path in sorted(output.glob(f"{scenario.name}-{scenario.seed}-*"), reverse=True):
        run = open_run(path)
        if not run.finished and run.scenario.deciding() == scenario.deciding():
            return path
    return None


def check_deployable(scenario: Scenario) -> None:
    """What is wrong is said here, by the command, and not by a server somewhere. Loads the data."""
    from fedcil.experiment import open_experiment

    if scenario.server.deadline_s is None:
        raise ScenarioError(
            "real nodes can vanish without a word, so a round needs a deadline",
            where="server.deadline_s",
            allowed="seconds, above the longest time that a node's clients train",
            next="begin the run with --set server.deadline_s=120",
        )
    open_experiment(scenario)


def give_data_root(path: Path | None) -> None:
    """To the processes that this one starts."""
    if path is not None:
        os.environ["FEDCIL_DATA_ROOT"] = str(path.absolute())


def say(text: str) -> None:
    print(text, file=sys.stderr)


def conclude(
    folder: Path,
    work: Callable[[StopSignal, Callable[[], None]], Run],
    max_seconds: float | None,
    *,
    figures: bool,
    json: bool,
) -> None:
    """Work while showing what is recorded, then draw and print."""
    from fedcil.api import draw, in_folder
    from fedcil.cli.actions import print_runs
    from fedcil.cli.display import display
    from fedcil.errors import FedcilError
    from fedcil.record.folder import METRICS
    from fedcil.record.tail import Tail

    tail = Tail(folder / METRICS, from_end=True)
    try:
        with stoppable(max_seconds) as stop, display(quiet=json) as watcher:

            def progress() -> None:
                for line in tail.read():
                    watcher.recorded(line)

            run = work(stop, progress)
    except FedcilError as error:
        raise in_folder(error, folder) from None
    if figures:
        draw(run)
    print_runs([run], json=json)
