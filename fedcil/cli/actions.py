"""What the commands do: read, call, print. The work itself is in fedcil.api and fedcil.record."""

from __future__ import annotations

import json as jsonlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedcil.cli.guard import stoppable
from fedcil.errors import FedcilError, FolderBusy, InputError, NotResumable, ScenarioError, located

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
    wanted = _expand(scenarios, overrides, seeds)
    done: list[Run] = []
    with stoppable(max_seconds) as stop:
        options = Options(data_root, figures, stop, json)
        if len(wanted) == 1 and seeds is None:
            done.append(_run_one(wanted[0], output, options))
        else:
            identities = [_identity(each, data_root) for each in wanted]  # all are checked before the first one runs
            for each, identity in zip(wanted, identities, strict=True):
                done.append(_reuse(each, identity, output, options))
    print_runs(done, json=json)
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
    print_runs([finished], json=json)


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

    with located(scenario):
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


def schema(*, tables: bool) -> None:
    from fedcil.cli.reference import reference
    from fedcil.scenario import scenario_schema

    print(reference() if tables else jsonlib.dumps(scenario_schema(), indent=1))


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


@dataclass(frozen=True, slots=True)
class Wanted:
    """A scenario that was asked for, and by which name."""

    source: str
    scenario: Scenario


def _expand(names: Sequence[str], overrides: Sequence[str], seeds: str | None) -> list[Wanted]:
    from fedcil.scenario_file import load_scenario

    sets = [[*overrides, *seed] for seed in _seeds(seeds)]
    return [Wanted(name, load_scenario(name, over)) for name in names for over in sets]


def _identity(wanted: Wanted, data_root: Path | None) -> dict[str, Any]:
    """What would decide the run's result. Raises what opening the scenario on its data raises."""
    from fedcil.engines import load_engine
    from fedcil.experiment import open_experiment
    from fedcil.record.folder import identity

    with located(wanted.source):
        load_engine(wanted.scenario.engine.name)
        return identity(open_experiment(wanted.scenario, data_root))


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


def _reuse(wanted: Wanted, identity: Mapping[str, Any], output: Path, options: Options) -> Run:
    """A finished run of exactly this below ``output``, else an unfinished one continued, else a new one."""
    from fedcil.record.folder import revision

    commit = revision()
    earlier = sorted(_earlier_runs(wanted.scenario, identity, output), key=lambda run: run.revision != commit)
    for run in earlier:
        if run.finished:
            old = "" if run.revision == commit else " (by another commit of fedcil; delete it to have it made anew)"
            print(f"finished already: {run.path}{old}", file=sys.stderr)
            return run
    for run in earlier:
        try:
            old = "" if run.revision == commit else " (begun by another commit of fedcil)"
            print(f"continuing: {run.path}{old}", file=sys.stderr)
            return _continue(run, options)
        except (NotResumable, FolderBusy) as error:
            print(f"cannot be continued: {error}", file=sys.stderr)
    return _run_one(wanted, output, options)


def _earlier_runs(scenario: Scenario, identity: Mapping[str, Any], output: Path) -> list[Run]:
    """Runs of this scenario on these data that this version of fedcil and torch began."""
    from fedcil.record.folder import versions
    from fedcil.record.run import Run

    found = []
    for path in sorted(output.glob(f"{scenario.name}-{scenario.seed}-*")):
        run = Run(path)
        try:
            begun = run.finished or any((path / "checkpoints").glob("state-*.json"))
            if begun and run.identity == identity and run.versions == versions():
                found.append(run)
        except (FedcilError, OSError, LookupError):
            continue
    return found


def _run_one(wanted: Wanted, output: Path, options: Options) -> Run:
    from fedcil import api
    from fedcil.cli.display import display

    with located(wanted.source), display(quiet=options.quiet) as watcher:
        return api.run(
            wanted.scenario,
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


def _warn_of_failures(run: Run) -> None:
    """A run that came to its end may still have trained little."""
    short, failures = run.summary["short_rounds"], run.summary["client_failures"]
    if not short and not failures:
        return
    first = next((failure for line in run.kind("round") for failure in line["failures"]), None)
    reason = f", first: {first['stage']}: {first['reason']}" if first else ""
    print(
        f"warning: {run.path}: {short} of {run.summary['rounds']} rounds changed nothing (too few answers), "
        f"{failures} client failures{reason}",
        file=sys.stderr,
    )


def print_runs(done: Sequence[Run], *, json: bool) -> None:
    """One object for one run, a list for several; a table for people."""
    for run in done:
        _warn_of_failures(run)
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
