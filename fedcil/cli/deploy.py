"""``fedcil deploy``: a scenario on real Flower servers. The roles themselves are in fedcil/deploy/."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedcil.cli.guard import guarded, stoppable
from fedcil.cli.options import RUNS, DataRoot, Figures, Json, MaxSeconds, Output, Sets
from fedcil.cli.run_folders import run_folder
from fedcil.cli.runs import print_runs
from fedcil.cli.streams import to_stderr
from fedcil.errors import FedcilError, InputError

if TYPE_CHECKING:
    from fedcil.port import StopSignal
    from fedcil.record.run import Run

app = typer.Typer(
    no_args_is_help=True,
    help="The same scenario on real Flower servers: all roles here (`local`), or one of them (docs/deployment.md).",
)

Address = Annotated[str, typer.Option(metavar="HOST:PORT", help="Where the SuperLink is.")]
Keys = Annotated[Path, typer.Option("--pki", help="The folder with certificates and keys.")]
Target = Annotated[
    str, typer.Argument(metavar="SCENARIO|RUN", help="A TOML file, a shipped name, or a run folder to go on with.")
]


@app.command()
@guarded
def local(
    scenario: Target,
    nodes: Annotated[
        int, typer.Option(min=1, max=64, help="SuperNodes to start; client i is served by node i mod N.")
    ] = 3,
    overrides: Sets = None,
    data_root: DataRoot = None,
    output: Output = RUNS,
    figures: Figures = True,
    max_seconds: MaxSeconds = None,
    json: Json = False,
) -> None:
    """SuperLink, server app and nodes as processes on loopback, with TLS and node keys; nothing is left running."""
    from fedcil.deploy.local import deploy_local

    give_data_root(data_root)
    with to_stderr():
        folder = run_folder(scenario, overrides or [], output, nodes)
    print(f"run folder: {folder} (logs: {folder / 'deployment' / 'logs'})", file=sys.stderr)

    def work(stop: StopSignal, progress: Callable[[], None]) -> Run:
        return deploy_local(folder, nodes, stop, say, progress)

    conclude(folder, work, "fedcil deploy local", data_root, max_seconds, figures=figures, json=json)


@app.command()
@guarded
def pki(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where certificates and keys are, or will be.")],
    host: Annotated[list[str], typer.Option(help="A name or address by which the SuperLink is called.")],
    nodes: Annotated[int, typer.Option(min=0, max=10_000, help="How many nodes may join.")] = 8,
    days: Annotated[float, typer.Option(min=0.01, help="How long the SuperLink's certificate holds.")] = 365.0,
) -> None:
    """Make what is not there yet: authority, SuperLink's certificate, node keys. Renews what is about to expire."""
    from fedcil.deploy.pki import make_pki

    made = make_pki(folder, hosts=host, nodes=nodes, days=days)
    print(f"certificates and keys: {made.folder} ({nodes} nodes may join)")


@app.command()
@guarded
def node(
    superlink: Address,
    pki: Keys,
    homes: Annotated[Path, typer.Option(help="Folder with a home for each node; this one takes a free one.")],
    slots: Annotated[int, typer.Option(min=1, help="How many homes and keys there are.")] = 8,
    share: Annotated[
        str, typer.Option(help='clients=N | client-ids="0-9,12" | partition-id=I num-partitions=N')
    ] = "clients=1",
    port: Annotated[int, typer.Option(help="For the node's own two processes, on loopback.")] = 9094,
) -> None:
    """Be a node: a SuperNode and its client apps, under the first identity that is free."""
    from fedcil.deploy.node import serve
    from fedcil.deploy.pki import Pki

    with stoppable(None, what="leaving") as stop:
        serve(Pki(pki), superlink, homes, slots, port, share, stop)


@app.command()
@guarded
def supervise(
    scenario: Target,
    superlink: Address,
    pki: Keys,
    overrides: Sets = None,
    data_root: DataRoot = None,
    output: Annotated[Path, typer.Option(help="Where run folders are, as server app and supervisor see it.")] = RUNS,
    register: Annotated[int, typer.Option(min=0, help="Register the keys of so many nodes first.")] = 0,
    min_clients: Annotated[
        int, typer.Option(min=0, help="Begin when so many clients are served; 0: all of the scenario.")
    ] = 0,
    figures: Figures = True,
    json: Json = False,
) -> None:
    """See a run to its end: submit it, watch it, submit it again when its server died. An unfinished run of the
    same scenario in --output is gone on with."""
    from fedcil.data.places import expanded
    from fedcil.deploy.control import Control, enrol
    from fedcil.deploy.pki import Pki
    from fedcil.deploy.supervisor import Supervisor

    give_data_root(data_root)
    keys = Pki(pki)
    control = Control(superlink, keys.ca, expanded("~/.fedcil/flower", "$HOME"))
    with to_stderr():
        folder = run_folder(scenario, overrides or [], output, None)
    print(f"run folder: {folder}", file=sys.stderr)

    def work(stop: StopSignal, progress: Callable[[], None]) -> Run:
        enrol(control, keys, register, stop)
        return Supervisor(control, folder, min_clients, say).run(stop, lambda: None, progress)

    command = f"fedcil deploy supervise --superlink {superlink} --pki {pki}"
    conclude(folder, work, command, data_root, None, figures=figures, json=json)


def give_data_root(path: Path | None) -> None:
    """To the processes that this one starts."""
    from fedcil.data.places import ROOT_VARIABLE

    if path is not None:
        os.environ[ROOT_VARIABLE] = str(path.absolute())


def say(text: str) -> None:
    print(text, file=sys.stderr)


def conclude(
    folder: Path,
    work: Callable[[StopSignal, Callable[[], None]], Run],
    command: str,
    data_root: Path | None,
    max_seconds: float | None,
    *,
    figures: bool,
    json: bool,
) -> None:
    """Work while showing what is recorded, if the run is not finished, then draw and print. ``command`` goes on with
    it.
    """
    from fedcil.api import draw, in_folder
    from fedcil.cli.display import display
    from fedcil.record.folder import METRICS, SUBMISSION
    from fedcil.record.run import Run
    from fedcil.record.tail import Tail

    tail = Tail(folder / METRICS)
    try:
        with stoppable(max_seconds) as stop, display(quiet=json) as watcher:

            def progress() -> None:
                for line in tail.read():
                    watcher.recorded(line)

            run = Run(folder)
            if not run.finished:  # as it may be: who saw it to its end may have died as he drew
                run = work(stop, progress)
    except FedcilError as error:
        raise in_folder(error, folder, command, data_root) from None
    if figures:
        try:
            draw(run)
        except InputError as error:  # the run is finished: who starts this again at a failure would have another one
            say(f"warning: {error}")
    print_runs([run], json=json)
    (folder / SUBMISSION).unlink(missing_ok=True)  # from here on the same command means another run
