"""The commands and their options; what they do is elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedcil.cli import actions, deploy
from fedcil.cli.guard import guarded
from fedcil.cli.options import DataRoot, Json, MaxSeconds, Sets

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Federated class-incremental learning, simulated exactly, fast and resumable.",
)

app.add_typer(deploy.app, name="deploy")

Engine = Annotated[str | None, typer.Option(help="inline, ray or flower.")]
Runs = Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders.")]
Figure = Annotated[Path | None, typer.Option(help="Draw the comparison into this PNG.")]
ScenarioName = Annotated[str, typer.Argument(metavar="SCENARIO", help="A TOML file or a shipped name.")]


@app.command()
@guarded
def run(
    scenarios: Annotated[
        list[str], typer.Argument(metavar="SCENARIO...", help="TOML files or shipped names (`fedcil list`).")
    ],
    overrides: Sets = None,
    seeds: Annotated[str | None, typer.Option(metavar="0,1,2", help="Run each scenario with these seeds.")] = None,
    data_root: DataRoot = None,
    engine: Engine = None,
    output: Annotated[Path, typer.Option(help="Where run folders are made.")] = Path("runs"),
    figures: Annotated[bool, typer.Option(help="Draw the figures of the run folder.")] = True,
    figure: Figure = None,
    max_seconds: MaxSeconds = None,
    json: Json = False,
) -> None:
    """Run scenarios. With several (or --seeds), runs below --output that are finished already are skipped."""
    actions.run(
        scenarios=scenarios,
        overrides=overrides or [],
        seeds=seeds,
        data_root=data_root,
        engine=engine,
        output=output,
        figures=figures,
        figure=figure,
        max_seconds=max_seconds,
        json=json,
    )


@app.command()
@guarded
def resume(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run that was stopped or killed.")],
    overrides: Sets = None,
    data_root: DataRoot = None,
    engine: Engine = None,
    figures: Annotated[bool, typer.Option(help="Draw the figures of the run folder.")] = True,
    max_seconds: MaxSeconds = None,
    json: Json = False,
) -> None:
    """Continue a run; it ends with the same metrics as if it had never stopped."""
    actions.resume(
        path=run,
        overrides=overrides or [],
        data_root=data_root,
        engine=engine,
        figures=figures,
        max_seconds=max_seconds,
        json=json,
    )


@app.command()
@guarded
def compare(
    runs: Runs,
    figure: Figure = None,
    json: Json = False,
) -> None:
    """A table of runs; seeds of one scenario become mean and sample deviation."""
    actions.compare(runs=runs, figure=figure, json=json)


@app.command()
@guarded
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    output: Annotated[Path | None, typer.Option(help="The page to write; default: RUN/report.html.")] = None,
) -> None:
    """One self-contained HTML page with a run's figures and tables."""
    actions.report(path=run, output=output)


@app.command()
@guarded
def plan(
    scenario: ScenarioName,
    overrides: Sets = None,
    data_root: DataRoot = None,
    json: Json = False,
) -> None:
    """What a run would do: tasks, rounds, clients, parameters, bytes, memory. Trains nothing."""
    actions.plan(scenario=scenario, overrides=overrides or [], data_root=data_root, json=json)


@app.command("list")
@guarded
def list_(
    what: Annotated[str | None, typer.Argument(help="methods, datasets, models, scenarios or runs.")] = None,
    output: Annotated[Path, typer.Option(help="Where to look for runs.")] = Path("runs"),
    json: Json = False,
) -> None:
    """What there is: methods, data sets, models, scenarios, runs."""
    actions.list_things(what=what, output=output, json=json)


@app.command()
@guarded
def schema(
    tables: Annotated[
        bool, typer.Option("--tables", help="As Markdown tables, for people (docs/scenario.md).")
    ] = False,
) -> None:
    """Every key of a scenario file: a JSON schema, for editors."""
    actions.schema(tables=tables)
