"""``fedcil deploy``: a scenario on real Flower servers. Options only; the roles are in fedcil/deploy/."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedcil.cli import roles
from fedcil.cli.guard import guarded
from fedcil.cli.options import DataRoot, Json, MaxSeconds, Sets

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
    output: Annotated[Path, typer.Option(help="Where run folders are made.")] = Path("runs"),
    figures: Annotated[bool, typer.Option(help="Draw the figures of the run folder.")] = True,
    max_seconds: MaxSeconds = None,
    json: Json = False,
) -> None:
    """SuperLink, server app and nodes as processes on loopback, with TLS and node keys; nothing is left running."""
    roles.local(
        target=scenario,
        nodes=nodes,
        overrides=overrides or [],
        data_root=data_root,
        output=output,
        figures=figures,
        max_seconds=max_seconds,
        json=json,
    )


@app.command()
@guarded
def pki(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where certificates and keys are, or will be.")],
    host: Annotated[list[str], typer.Option(help="A name or address by which the SuperLink is called.")],
    nodes: Annotated[int, typer.Option(min=0, max=10_000, help="How many nodes may join.")] = 8,
    days: Annotated[float, typer.Option(min=0.01, help="How long the SuperLink's certificate holds.")] = 365.0,
) -> None:
    """Make what is not there yet: authority, SuperLink's certificate, node keys. Renews what is about to expire."""
    roles.pki(folder=folder, hosts=host, nodes=nodes, days=days)


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
    roles.node(superlink=superlink, pki=pki, homes=homes, slots=slots, share=share, port=port)


@app.command()
@guarded
def supervise(
    scenario: Target,
    superlink: Address,
    pki: Keys,
    overrides: Sets = None,
    data_root: DataRoot = None,
    output: Annotated[Path, typer.Option(help="Where run folders are, as server app and supervisor see it.")] = Path(
        "runs"
    ),
    register: Annotated[int, typer.Option(min=0, help="Register the keys of so many nodes first.")] = 0,
    min_clients: Annotated[
        int, typer.Option(min=0, help="Begin when so many clients are served; 0: all of the scenario.")
    ] = 0,
    figures: Annotated[bool, typer.Option(help="Draw the figures of the run folder.")] = True,
    json: Json = False,
) -> None:
    """See a run to its end: submit it, watch it, submit it again when its server died. An unfinished run of the
    same scenario in --output is gone on with."""
    roles.supervise(
        target=scenario,
        address=superlink,
        pki=pki,
        overrides=overrides or [],
        data_root=data_root,
        output=output,
        register=register,
        min_clients=min_clients,
        figures=figures,
        json=json,
    )
