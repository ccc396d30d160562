"""Runs as the commands make them: which are wanted, which are there already, and what is said of them."""

from __future__ import annotations

import json as jsonlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedcil.errors import FolderBusy, NotResumable, RunFailed, ScenarioError, located

if TYPE_CHECKING:
    from fedcil.port import StopSignal
    from fedcil.record.compare import Group
    from fedcil.record.run import Run
    from fedcil.scenario import Scenario

WIDEST = 10_000  # columns


@dataclass(frozen=True, slots=True)
class Wanted:
    """A scenario that was asked for, by which name and with which overrides."""

    source: str
    scenario: Scenario
    overrides: tuple[str, ...]

    def identity(self, data_root: Path | None) -> dict[str, Any]:
        """What would decide the run's result. Raises what opening the scenario on its data raises."""
        from fedcil.engines import load_engine
        from fedcil.experiment import open_experiment
        from fedcil.record.identity import run_identity

        with located(self.source):
            load_engine(self.scenario.engine.name)
            return run_identity(open_experiment(self.scenario, data_root))


@dataclass(frozen=True, slots=True)
class Options:
    """How a run is made; nothing here changes its result."""

    data_root: Path | None
    figures: bool
    stop: StopSignal
    quiet: bool
    overrides: tuple[str, ...] = ()
    label: str = ""  # before each line of its progress


def wanted_runs(names: Sequence[str], overrides: Sequence[str], seeds: str | None) -> list[Wanted]:
    from fedcil.scenario_file import load_scenario

    if seeds is not None and any(text.partition("=")[0].strip() == "seed" for text in overrides):
        raise ScenarioError("seeds are given twice", where="--seeds, --set seed=...", next="leave one of them out")
    sets = [(*overrides, *seed) for seed in _seeds(seeds)]
    return [Wanted(name, load_scenario(name, over), over) for name in dict.fromkeys(names) for over in sets]


def _seeds(text: str | None) -> list[list[str]]:
    if text is None:
        return [[]]
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise ScenarioError(f"--seeds {text!r} is no list of numbers", where="--seeds", allowed="0,1,2")
    return [[f"seed={part}"] for part in dict.fromkeys(parts)]


def reuse(wanted: Wanted, identity: Mapping[str, Any], output: Path, options: Options) -> Run:
    """A finished run of exactly this below ``output``, else an unfinished one continued, else a new one."""
    if finished := finished_already(wanted, identity, output, options):
        return finished
    for run in _earlier(wanted, identity, output):
        try:
            old = " (begun by other code of fedcil)" if run.by_other_code else ""
            print(f"continuing: {run.path}{old}", file=sys.stderr)
            return continue_run(run, options)
        except (NotResumable, FolderBusy) as error:
            print(f"cannot be continued: {error}", file=sys.stderr)
    return new_run(wanted, output, options)


def finished_already(wanted: Wanted, identity: Mapping[str, Any], output: Path, options: Options) -> Run | None:
    """A finished run of exactly this below ``output``."""
    for run in _earlier(wanted, identity, output):
        if run.finished:
            old = " (by other code of fedcil; delete it to have it made anew)" if run.by_other_code else ""
            print(f"finished already: {run.path}{old}", file=sys.stderr)
            return continue_run(run, options)  # draws what it has no pictures of
    return None


def _earlier(wanted: Wanted, identity: Mapping[str, Any], output: Path) -> list[Run]:
    """Those by the present code of fedcil first."""
    from fedcil.record.run import earlier_runs

    found = earlier_runs(wanted.scenario, output, lambda run: _begun_alike(run, wanted, identity))
    return sorted(found, key=lambda run: run.by_other_code)


def _begun_alike(run: Run, wanted: Wanted, identity: Mapping[str, Any]) -> bool:
    """A run of the same scenario on the same data, by the same own code, fedcil and torch."""
    from fedcil.record.folder import has_checkpoint, versions

    begun = run.finished or has_checkpoint(run.path)
    same = run.identity == identity and not run.changed_code(wanted.scenario)
    return begun and same and run.versions == versions()


def new_run(wanted: Wanted, output: Path, options: Options) -> Run:
    from fedcil import api
    from fedcil.cli.display import display

    with located(wanted.source), display(quiet=options.quiet, label=options.label) as watcher:
        return api.run(
            wanted.scenario,
            output=output,
            data_root=options.data_root,
            figures=options.figures,
            watcher=watcher,
            stop=options.stop,
        )


def continue_run(unfinished: Run, options: Options) -> Run:
    from fedcil import api
    from fedcil.cli.display import display

    with display(quiet=options.quiet, label=options.label) as watcher:
        return api.resume(
            unfinished.path,
            overrides=options.overrides,
            data_root=options.data_root,
            figures=options.figures,
            watcher=watcher,
            stop=options.stop,
        )


def print_table(groups: Sequence[Group]) -> None:
    """As wide as its numbers need it, however narrow the terminal is: a number that is cut off is another number."""
    from rich.console import Console
    from rich.measure import Measurement

    from fedcil.record.compare import to_table

    console, table = Console(), to_table(groups)
    needed = Measurement.get(console, console.options.update(width=WIDEST), table).minimum
    Console(width=max(console.width, needed)).print(table, crop=False)


def print_runs(done: Sequence[Run], *, json: bool) -> None:
    """One object for one run, a list for several; a table for people. RunFailed, or where it is JSON the exit code of
    that, if the numbers of a run are none.
    """
    from fedcil.record.compare import grouped, run_entry

    for run in done:
        _warn_of_failures(run)
    idle = [run for run in done if run.summary["short_rounds"] == run.summary["rounds"]]
    if json:
        rows = [run_entry(run) | ({"error": untrained([run]).as_dict()} if run in idle else {}) for run in done]
        print(jsonlib.dumps(rows[0] if len(rows) == 1 else rows))
        if idle:
            print(f"error: {untrained(idle)}", file=sys.stderr)
            sys.exit(untrained(idle).exit_code)
        return
    print_table(grouped(done))
    for run in done:
        print(f"run folder: {run.path}")
        if (run.path / "figures").is_dir():
            print(f"  pictures: {', '.join(p.name for p in sorted((run.path / 'figures').glob('*.png')))}")
    if idle:
        raise untrained(idle)


def untrained(runs: Sequence[Run]) -> RunFailed:
    """Numbers of a model that nobody has trained are no result."""
    return RunFailed(
        "no round changed the model: its accuracies are those of a model that nobody has trained",
        where=", ".join(str(run.path) for run in runs),
        next=f"`fedcil report {runs[0].path}` shows who failed in each round, and why",
    )


def _warn_of_failures(run: Run) -> None:
    """A run that came to its end may still have trained little."""
    short, failures = run.summary["short_rounds"], run.summary["client_failures"]
    if not short and not failures:
        return
    first = next((failure for line in run.kind("round") for failure in line["failures"]), None)
    parts = [f"{short} of {run.summary['rounds']} rounds changed nothing (too few answers)"] if short else []
    parts += [f"{failures} client failures"] if failures else []
    parts += [f"first: {first['stage']}: {first['reason']}"] if first else []
    print(f"warning: {run.path}: {', '.join(parts)}", file=sys.stderr)
