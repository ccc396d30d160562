"""The commands: what they are told, and what they print. The work itself is in fedcil.api and fedcil.record."""

from __future__ import annotations

import json as jsonlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedcil import __version__
from fedcil.cli import deploy
from fedcil.cli.guard import guarded, stoppable
from fedcil.cli.options import RUNS, DataRoot, Figures, Json, MaxSeconds, Output, Sets
from fedcil.cli.runs import Options, continue_run, new_run, print_runs, print_table, reuse, wanted_runs
from fedcil.cli.side_by_side import finished_runs, stop_with_stdin
from fedcil.cli.streams import to_stderr
from fedcil.errors import InputError, located

if TYPE_CHECKING:
    from fedcil.record.run import Run


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"fedcil {__version__}")
        raise typer.Exit


app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Federated class-incremental learning, simulated exactly, fast and resumable.",
)

app.add_typer(deploy.app, name="deploy")

Version = Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print it and end.")]
Engine = Annotated[str | None, typer.Option(help="inline, ray or flower.")]
Runs = Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders, or folders of them.")]
Figure = Annotated[Path | None, typer.Option(help="Draw the comparison into this PNG.")]
ScenarioName = Annotated[str, typer.Argument(metavar="SCENARIO", help="A TOML file or a shipped name.")]

KINDS = ("methods", "datasets", "models", "scenarios", "runs")


@app.callback()
def root(version: Version = False) -> None:
    pass


@app.command()
@guarded
def run(
    scenarios: Annotated[
        list[str], typer.Argument(metavar="SCENARIO...", help="TOML files or shipped names (`fedcil list`).")
    ],
    overrides: Sets = None,
    seeds: Annotated[str | None, typer.Option(metavar="0,1,2", help="Run each scenario with these seeds.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs side by side, each on its share of the cores.")] = 1,
    data_root: DataRoot = None,
    engine: Engine = None,
    output: Output = RUNS,
    figures: Figures = True,
    figure: Figure = None,
    max_seconds: MaxSeconds = None,
    json: Json = False,
) -> None:
    """Run scenarios. With several (or --seeds), runs below --output that are finished already are skipped."""
    _check_picture(figure)
    with to_stderr(), stoppable(max_seconds) as stop:
        wanted = wanted_runs(scenarios, [*(overrides or []), *_engine_override(engine)], seeds)
        options = Options(data_root, figures, stop, json)
        if len(wanted) == 1 and seeds is None:
            done = [new_run(wanted[0], output, options)]
        else:
            done = finished_runs(wanted, jobs, output, options)
    if figure:
        _draw_comparison(done, figure)
    print_runs(done, json=json)


@app.command("one-of-several", hidden=True)
@guarded
def one_of_several(
    scenario: ScenarioName,
    label: Annotated[str, typer.Option(help="Before each line of progress; empty: say nothing.")],
    overrides: Sets = None,
    data_root: DataRoot = None,
    output: Output = RUNS,
    figures: Figures = True,
    json: Json = True,
) -> None:
    """One of the runs of `run --jobs`, which stops when its stdin is closed."""
    with to_stderr(), stoppable(None) as stop:
        stop_with_stdin(stop)
        (wanted,) = wanted_runs([scenario], overrides or [], None)
        options = Options(data_root, figures, stop, quiet=not label, label=label)
        path = str(reuse(wanted, wanted.identity(data_root), output, options).path)
    print(jsonlib.dumps({"run": path}) if json else path)


@app.command()
@guarded
def resume(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run that was stopped or killed.")],
    overrides: Sets = None,
    data_root: DataRoot = None,
    engine: Engine = None,
    figures: Figures = True,
    max_seconds: MaxSeconds = None,
    json: Json = False,
) -> None:
    """Continue a run; it ends with the same metrics as if it had never stopped."""
    from fedcil.record.run import open_run

    with to_stderr(), stoppable(max_seconds) as stop:
        options = Options(data_root, figures, stop, json, (*(overrides or []), *_engine_override(engine)))
        finished = continue_run(open_run(run), options)
    print_runs([finished], json=json)


@app.command()
@guarded
def compare(
    runs: Runs,
    figure: Figure = None,
    json: Json = False,
) -> None:
    """A table of runs; seeds of one scenario become mean and sample deviation."""
    from fedcil.record.compare import differences, grouped, to_json
    from fedcil.record.run import open_run

    _check_picture(figure)
    with to_stderr():
        opened = _finished([open_run(path) for path in _run_folders(runs)])
        groups = grouped(opened)
    if json:
        print(jsonlib.dumps(to_json(groups)))
    else:
        print_table(groups)
        for note in differences(groups):
            print(f"note: {note}")
    if figure:
        _draw_comparison(opened, figure)


@app.command()
@guarded
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    output: Annotated[Path | None, typer.Option(help="The page to write; default: RUN/report.html.")] = None,
) -> None:
    """One self-contained HTML page with a run's figures and tables."""
    from fedcil.record.report import write_report
    from fedcil.record.run import open_run

    with to_stderr():
        written = write_report(open_run(run), output)
    print(written)


@app.command()
@guarded
def plan(
    scenario: ScenarioName,
    overrides: Sets = None,
    data_root: DataRoot = None,
    json: Json = False,
) -> None:
    """What a run would do: tasks, rounds, clients, parameters, bytes, memory. Trains nothing."""
    from fedcil.cli.forecast import forecast, print_forecast
    from fedcil.experiment import open_experiment
    from fedcil.scenario_file import load_scenario

    with to_stderr(), located(scenario):
        experiment = open_experiment(load_scenario(scenario, overrides or []), data_root, show_progress=not json)
        facts = forecast(experiment)
    if json:
        print(jsonlib.dumps(facts))
    else:
        print_forecast(facts)


@app.command("list")
@guarded
def list_(
    what: Annotated[str | None, typer.Argument(help="methods, datasets, models, scenarios or runs.")] = None,
    output: Annotated[Path, typer.Option(help="Where to look for runs.")] = RUNS,
    json: Json = False,
) -> None:
    """What there is: methods, data sets, models, scenarios, runs."""
    if what is not None and what not in KINDS:
        raise InputError(f"nothing is called {what!r}", where="fedcil list", allowed=", ".join(KINDS))
    from fedcil.record.run import Run

    things = {kind: _list_kind(kind, output) for kind in ([what] if what else KINDS)}
    if json:
        print(jsonlib.dumps(things[what] if what else things))
        return
    for kind, names in things.items():
        print(f"{kind}: " + (", ".join(names) if kind != "runs" else ""))
        for name in names if kind == "runs" else []:
            print(f"  {name}{_state(Run(Path(name)))}")


@app.command()
@guarded
def schema(
    tables: Annotated[
        bool, typer.Option("--tables", help="As Markdown tables, for people (docs/scenario.md).")
    ] = False,
) -> None:
    """Every key of a scenario file: a JSON schema, for editors."""
    from fedcil.cli.reference import reference
    from fedcil.scenario import scenario_schema

    print(reference() if tables else jsonlib.dumps(scenario_schema(), indent=1))


def _run_folders(paths: Sequence[Path]) -> list[Path]:
    """A folder of runs stands for them; a file that a wildcard brought along is passed over, if there is more."""
    folders = [path for path in paths if not path.is_file()] or paths
    within = {path: [file.parent for file in sorted(path.glob("*/scenario.toml"))] for path in folders}
    return [run for path in folders for run in (within[path] or [path])]


def _finished(runs: Sequence[Run]) -> list[Run]:
    """Those that are, if any is; what is left out is said."""
    finished = [run for run in runs if run.finished]
    for run in runs:
        if finished and not run.finished:
            print(f"left out, since it is not finished: {run.path}", file=sys.stderr)
    return finished or list(runs)


def _engine_override(engine: str | None) -> list[str]:
    return [] if engine is None else [f"engine.name={engine}"]


def _check_picture(path: Path | None) -> None:
    """Before anything is computed for it."""
    if path is not None:
        from fedcil.record.drawing import refuse_other_pictures

        refuse_other_pictures(path)


def _draw_comparison(runs: Sequence[Run], path: Path) -> None:
    from fedcil.record.compare import grouped
    from fedcil.record.comparison_figure import compare_figure
    from fedcil.record.drawing import save_png

    save_png(compare_figure(grouped(runs)), path)
    print(f"comparison: {path}", file=sys.stderr)


def _list_kind(kind: str, output: Path) -> list[str]:
    from fedcil.methods import METHODS
    from fedcil.scenario_file import shipped_scenarios
    from fedcil.tables import DATASETS, MODELS

    if kind == "runs":
        return [str(path.parent) for path in sorted(output.glob("*/scenario.toml"))]
    if kind == "scenarios":
        return shipped_scenarios()
    return list({"methods": METHODS, "datasets": DATASETS, "models": MODELS}[kind])


def _state(run: Run) -> str:
    """What stands behind it in a list of runs, which one damaged folder does not end."""
    try:
        return "" if run.finished else " (not finished)"
    except InputError:
        return " (damaged)"
