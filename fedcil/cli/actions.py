"""What the commands do: read, call, print. The work itself is in fedcil.api and fedcil.record."""

from __future__ import annotations

import json as jsonlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedcil.cli.guard import stoppable
from fedcil.errors import FedcilError, FolderBusy, InputError, NotResumable, ScenarioError

if TYPE_CHECKING:
    from fedcil.port import StopSignal
    from fedcil.record.run import Run
    from fedcil.scenario import Scenario

PRINTED = (
    "run_dir",
    "method",
    "seed",
    "average_incremental_accuracy",
    "final_accuracy",
    "forgetting",
    "seconds",
    "bytes_up",
    "bytes_down",
)
KINDS = ("methods", "datasets", "models", "scenarios", "runs")


def run(
    *,
    scenarios: Sequence[str],
    overrides: Sequence[str],
    seeds: str | None,
    data_root: Path | None,
    engine: str | None,
    output: Path,
    figures: bool,
    figure: Path | None,
    max_seconds: float | None,
    json: bool,
) -> None:
    overrides = [*overrides, *_engine_override(engine)]
    wanted = _expand(scenarios, overrides, seeds)  # every scenario is checked before the first one runs
    sweep = len(wanted) > 1 or seeds is not None
    done: list[Run] = []
    with stoppable(max_seconds) as stop:
        for scenario in wanted:
            options = Options(data_root, figures, stop, json)
            done.append(_reuse(scenario, output, options) if sweep else _run_one(scenario, output, options))
    _print_runs(done, json=json)
    if figure:
        _draw_comparison(done, figure)


def resume(
    *,
    path: Path,
    overrides: Sequence[str],
    data_root: Path | None,
    engine: str | None,
    figures: bool,
    max_seconds: float | None,
    json: bool,
) -> None:
    from fedcil.record.run import open_run

    with stoppable(max_seconds) as stop:
        options = Options(data_root, figures, stop, json, (*overrides, *_engine_override(engine)))
        finished = _continue(open_run(path), options)
    _print_runs([finished], json=json)


def compare(*, runs: Sequence[Path], figure: Path | None, json: bool) -> None:
    from fedcil.record.compare import compare as group
    from fedcil.record.compare import differences, to_json, to_table
    from fedcil.record.run import open_run

    opened = [open_run(path) for path in runs]
    groups = group(opened)
    if json:
        print(jsonlib.dumps(to_json(groups)))
    else:
        from rich.console import Console

        Console().print(to_table(groups))
        for note in differences(groups):
            print(f"note: {note}")
    if figure:
        _draw_comparison(opened, figure)


def _draw_comparison(runs: Sequence[Run], path: Path) -> None:
    from fedcil.record.compare import compare as group
    from fedcil.record.figures import compare_figure, save_png

    save_png(compare_figure(group(runs)), path)
    print(f"comparison: {path}", file=sys.stderr)


def report(*, path: Path, output: Path | None) -> None:
    from fedcil.record.report import write_report
    from fedcil.record.run import open_run

    print(write_report(open_run(path), output))


def plan(*, scenario: str, overrides: Sequence[str], data_root: Path | None, json: bool) -> None:
    from fedcil.cli.forecast import forecast, print_forecast
    from fedcil.experiment import open_experiment
    from fedcil.scenario_file import load_scenario

    experiment = open_experiment(load_scenario(scenario, overrides), data_root, show_progress=not json)
    facts = forecast(experiment)
    if json:
        print(jsonlib.dumps(facts))
    else:
        print_forecast(facts)


def list_things(*, what: str | None, output: Path, json: bool) -> None:
    if what is not None and what not in KINDS:
        raise InputError(f"nothing is called {what!r}", where="fedcil list", allowed=", ".join(KINDS))
    things = {kind: _list_kind(kind, output) for kind in ([what] if what else KINDS)}
    if json:
        print(jsonlib.dumps(things[what] if what else things))
        return
    for kind, names in things.items():
        print(f"{kind}: " + (", ".join(names) if kind != "runs" else ""))
        for name in names if kind == "runs" else []:
            print(f"  {name}")


def schema() -> None:
    from fedcil.scenario import scenario_schema

    print(jsonlib.dumps(scenario_schema(), indent=1))


def _list_kind(kind: str, output: Path) -> list[str]:
    from fedcil.methods import METHODS
    from fedcil.scenario import DATASETS, MODELS
    from fedcil.scenario_file import shipped_scenarios

    match kind:
        case "methods":
            return list(METHODS)
        case "datasets":
            return list(DATASETS)
        case "models":
            return list(MODELS)
        case "scenarios":
            return shipped_scenarios()
    return [str(path.parent) for path in sorted(output.glob("*/scenario.toml"))]


def _engine_override(engine: str | None) -> list[str]:
    return [f"engine.name={engine}"] if engine else []


def _expand(names: Sequence[str], overrides: Sequence[str], seeds: str | None) -> list[Scenario]:
    from fedcil.scenario_file import load_scenario

    sets = [[*overrides, *seed] for seed in _seeds(seeds)]
    return [load_scenario(name, over) for name in names for over in sets]


def _seeds(text: str | None) -> list[list[str]]:
    if text is None:
        return [[]]
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise ScenarioError(f"--seeds {text!r} is no list of numbers", where="--seeds", allowed="0,1,2")
    return [[f"seed={part}"] for part in parts]


@dataclass(frozen=True, slots=True)
class Options:
    """How a run is made; nothing here changes its result."""

    data_root: Path | None
    figures: bool
    stop: StopSignal
    quiet: bool
    overrides: tuple[str, ...] = ()


def _reuse(scenario: Scenario, output: Path, options: Options) -> Run:
    """A finished run of exactly this scenario below ``output``, else an unfinished one continued, else a new one."""
    earlier = _earlier_runs(scenario, output)
    for run in earlier:
        if run.finished:
            print(f"finished already: {run.path}", file=sys.stderr)
            return run
    for run in earlier:
        try:
            print(f"continuing: {run.path}", file=sys.stderr)
            return _continue(run, options)
        except (NotResumable, FolderBusy) as error:
            print(f"cannot be continued: {error}", file=sys.stderr)
    return _run_one(scenario, output, options)


def _earlier_runs(scenario: Scenario, output: Path) -> list[Run]:
    """Runs of this scenario that this version of fedcil and torch began."""
    from fedcil.record.folder import versions
    from fedcil.record.run import Run

    found = []
    for path in sorted(output.glob(f"{scenario.name}-{scenario.seed}-*")):
        run = Run(path)
        try:
            begun = run.finished or any((path / "checkpoints").glob("state-*.json"))
            if begun and run.scenario.digest() == scenario.digest() and run.versions == versions():
                found.append(run)
        except (FedcilError, OSError, ValueError):
            continue
    return found


def _run_one(scenario: Scenario, output: Path, options: Options) -> Run:
    from fedcil import api
    from fedcil.cli.display import display

    with display(quiet=options.quiet) as watcher:
        return api.run(
            scenario,
            output=output,
            data_root=options.data_root,
            figures=options.figures,
            watcher=watcher,
            stop=options.stop,
        )


def _continue(unfinished: Run, options: Options) -> Run:
    from fedcil import api
    from fedcil.cli.display import display

    with display(quiet=options.quiet) as watcher:
        return api.resume(
            unfinished.path,
            overrides=options.overrides,
            data_root=options.data_root,
            figures=options.figures,
            watcher=watcher,
            stop=options.stop,
        )


def _print_runs(done: Sequence[Run], *, json: bool) -> None:
    """One object for one run, a list for several; a table for people."""
    if json:
        rows = [{name: run.summary[name] for name in PRINTED} for run in done]
        print(jsonlib.dumps(rows[0] if len(rows) == 1 else rows))
        return
    from rich.console import Console

    from fedcil.record.compare import compare as group
    from fedcil.record.compare import to_table

    Console().print(to_table(group(done)))
    for run in done:
        print(f"run folder: {run.path}")
        if (run.path / "figures").is_dir():
            print(f"  pictures: {', '.join(p.name for p in sorted((run.path / 'figures').glob('*.png')))}")
