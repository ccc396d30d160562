"""Several finished runs side by side: seeds of one scenario become a mean and a sample deviation."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedcil.errors import InputError
from fedcil.record.run import Run

if TYPE_CHECKING:
    from rich.table import Table

COMPARED = (
    "average_incremental_accuracy",
    "final_accuracy",
    "forgetting",
    "seconds",
    "bytes_up",
    "bytes_down",
    "short_rounds",
    "client_failures",
)
HEADINGS = (
    "average\nincr. acc.\n%",
    "final\naccuracy\n%",
    "forgetting\n\n%",
    "up\n\nMB",
    "down\n\nMB",
    "time\n\ns",
)
SPELLED_OUT = 3  # so many differing keys fit into a label

Values = dict[str, float | None]


@dataclass(frozen=True)
class Group:
    """Runs of one scenario that differ in seed, engine or folder only.

    ``mean`` and ``std`` are over seeds; several runs of one seed count as one, by their mean. ``std`` is None
    for one seed, and a metric is None where it is not defined (forgetting of one task).
    """

    name: str
    method: str
    label: str
    runs: tuple[Run, ...]
    mean: Values
    std: Values | None

    @property
    def seeds(self) -> list[int]:
        return list(by_seed(self.runs))


def grouped(runs: Sequence[Run]) -> list[Group]:
    """Group runs by their scenario, in the order in which scenarios first appear.

    Raises InputError for a run that is not finished.
    """
    families: dict[str, list[Run]] = {}
    for run in {run.path.resolve(): run for run in runs}.values():
        _refuse_unfinished(run)
        families.setdefault(repr(sorted(_settings(run).items())), []).append(run)
    labels = _labels([family[0] for family in families.values()])
    return [_group(family, label) for family, label in zip(families.values(), labels, strict=True)]


def by_seed(runs: Sequence[Run]) -> dict[int, list[Run]]:
    """The runs of each seed; more than one if a seed was run on several engines."""
    seeds: dict[int, list[Run]] = {}
    for run in runs:
        seeds.setdefault(run.scenario.seed, []).append(run)
    return seeds


def to_json(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """One element per group with the names of a run's summary; metrics at its top are means over seeds.

    ``run_dir`` and ``seed`` at the top are null where a group has several runs.
    """
    return [_element(group) for group in groups]


def to_table(groups: Sequence[Group]) -> Table:
    """The table that people read; accuracies and forgetting in percent."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)  # fits into 80 columns
    table.add_column("method", overflow="fold", min_width=6)
    table.add_column("scenario", overflow="fold", min_width=13)
    table.add_column("seeds", overflow="fold")
    for heading in HEADINGS:
        table.add_column(heading, justify="right", no_wrap=True)
    for group, handle in zip(groups, _handles(groups), strict=True):
        table.add_row(*map(Text, _cells(group, handle)))  # Text: a name is no markup
    return table


def run_entry(run: Run) -> dict[str, Any]:
    """A run's name, numbers and costs, and where its folder is now (not where it was made)."""
    scenario = run.scenario
    own = {"run_dir": str(run.path), "name": scenario.name, "method": scenario.method.name, "seed": scenario.seed}
    return own | {name: run.summary.get(name) for name in COMPARED}


def differences(groups: Sequence[Group]) -> list[str]:
    """What to know before comparing: settings that differ (a method's own if all are of one), and repeated seeds."""
    settings = [_settings(group.runs[0]) for group in groups]
    one_method = len({group.method for group in groups}) == 1
    keys = [key for key in _varying(settings) if key != "name" and (one_method or not key.startswith("method."))]
    notes = [_difference(key, _handles(groups), settings) for key in keys]
    engines = sorted({run.scenario.engine.name for group in groups for run in group.runs})
    if len(engines) > 1:
        notes.append(f"seconds are from several engines ({', '.join(engines)}): do not compare them")
    for group in groups:
        short = [run for run in group.runs if run.summary.get("short_rounds")]
        notes += [
            f"{run.path}: {run.summary['short_rounds']} of {run.summary['rounds']} rounds changed nothing"
            for run in short
        ]
    if len({run.program for group in groups for run in group.runs} - {None}) > 1:
        notes.append("not all are by the same code of fedcil (`program` and `revision` in environment.json)")
    return notes + [note for group in groups for note in (*_repeated(group), *_other_data(group))]


def _refuse_unfinished(run: Run) -> None:
    if not run.finished:
        raise InputError(
            "this run is not finished",
            where=str(run.path),
            allowed="finished runs only",
            next=f"finish it with `fedcil resume {run.path}`; `fedcil report {run.path}` shows what there is",
        )


def _settings(run: Run) -> dict[str, Any]:
    """The scenario as dotted keys, without what leaves a result as it is and without the seed; and a person's own
    modules, as digests.
    """
    files = {f"{module}.py": "+".join(each[:8] for each in said.split("+")) for module, said in run.own_code.items()}
    if file := run.scenario.availability.file:  # by what is in it
        files["availability.file"] = run.environment.get("identity", {}).get("availability", file)[:8]
    return {key: value for key, value in run.scenario.deciding().items() if key != "seed"} | files


def _varying(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys that do not have the same value everywhere, in the order of the scenario."""
    keys = dict.fromkeys(key for each in settings for key in each)
    return [key for key in keys if len({repr(each.get(key)) for each in settings}) > 1]


def _labels(runs: Sequence[Run]) -> list[str]:
    """The name of each scenario, with what tells it from others of the same name."""
    named: dict[str, list[Mapping[str, Any]]] = {}
    for run in runs:
        named.setdefault(run.scenario.name, []).append(_settings(run))
    return [_label(_settings(run), named[run.scenario.name]) for run in runs]


def _label(own: Mapping[str, Any], namesakes: Sequence[Mapping[str, Any]]) -> str:
    keys = _varying(namesakes)
    if not keys:
        return str(own["name"])
    shown = keys if len(keys) <= SPELLED_OUT else _telling(keys, namesakes)
    parts = [f"{key}={_show(own.get(key))}" for key in shown]
    return f"{own['name']} ({', '.join(parts)}{', ...' if len(shown) < len(keys) else ''})"


def _telling(keys: Sequence[str], settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """As few of the keys as tell all settings apart."""
    chosen: list[str] = []
    apart = 1
    for key in keys:
        now = len({repr([each.get(name) for name in [*chosen, key]]) for each in settings})
        if now > apart:
            chosen.append(key)
            apart = now
    return chosen


def _show(value: Any) -> str:
    if value is None:
        return "unset"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _group(runs: Sequence[Run], label: str) -> Group:
    scenario = runs[0].scenario
    seeds = [_mean([run.summary for run in same]) for same in by_seed(runs).values()]
    return Group(
        name=scenario.name,
        method=scenario.method.name,
        label=label,
        runs=tuple(runs),
        mean=_mean(seeds),
        std=_over(seeds, statistics.stdev) if len(seeds) > 1 else None,
    )


def _mean(rows: Sequence[Mapping[str, Any]]) -> Values:
    return _over(rows, statistics.mean)


def _over(rows: Sequence[Mapping[str, Any]], statistic: Any) -> Values:
    """A statistic of each metric; None if a row has none, since the runs of a group have equal tasks."""
    columns = {name: [row.get(name) for row in rows] for name in COMPARED}
    return {name: None if None in column else statistic(column) for name, column in columns.items()}


def _element(group: Group) -> dict[str, Any]:
    runs = [run_entry(run) for run in group.runs]
    return {
        "name": group.name,
        "label": group.label,
        "run_dir": runs[0]["run_dir"] if len(runs) == 1 else None,
        "method": group.method,
        "seed": group.seeds[0] if len(group.seeds) == 1 else None,
        **group.mean,
        "seeds": group.seeds,
        "runs": runs,
        "mean": group.mean,
        "std": group.std,
    }


def _handles(groups: Sequence[Group]) -> list[str]:
    """A short name for each: the scenario's, with a number where several have it."""
    names = [group.name for group in groups]
    return [
        f"{name} #{names[:place].count(name) + 1}" if names.count(name) > 1 else name
        for place, name in enumerate(names)
    ]


def _cells(group: Group, handle: str) -> list[str]:
    seeds = ",".join(map(str, group.seeds))
    parts = (("average_incremental_accuracy", 100, 1), ("final_accuracy", 100, 1), ("forgetting", 100, 1))
    costs = (("bytes_up", 1e-6, 1), ("bytes_down", 1e-6, 1), ("seconds", 1, 0))
    return [
        group.method,
        handle + group.label.removeprefix(group.name),
        seeds,
        *(_cell(group, *part, deviation=True) for part in parts),
        *(_cell(group, *cost, deviation=False) for cost in costs),
    ]


def _cell(group: Group, name: str, factor: float, digits: int, *, deviation: bool) -> str:
    mean = group.mean[name]
    if mean is None:
        return "-"
    text = f"{mean * factor:.{digits}f}"
    std = group.std[name] if group.std and deviation else None
    return text if std is None else f"{text} ± {std * factor:.{digits}f}"


def _difference(key: str, handles: Sequence[str], settings: Sequence[Mapping[str, Any]]) -> str:
    """``key differs: value in name, name; value in name``."""
    holders: dict[str, list[str]] = {}
    for handle, each in zip(handles, settings, strict=True):
        holders.setdefault(_show(each.get(key)), []).append(handle)
    return f"{key} differs: " + "; ".join(f"{value} in {', '.join(who)}" for value, who in holders.items())


def _repeated(group: Group) -> list[str]:
    repeated = {seed: runs for seed, runs in by_seed(group.runs).items() if len(runs) > 1}
    return [
        f"{group.label}: {len(runs)} runs with seed {seed} count as one"
        + (", although their data differ" if len({_data(run) for run in runs}) > 1 else "")
        for seed, runs in repeated.items()
    ]


def _other_data(group: Group) -> list[str]:
    """Seeds on other data, where no draw of the seed explains it."""
    data = group.runs[0].scenario.data
    drawn = data.name == "synthetic" or data.samples_per_class is not None or data.validation
    if drawn or len({_data(runs[0]) for runs in by_seed(group.runs).values()}) == 1:
        return []
    return [f"{group.label}: its seeds are on different data (`identity` in environment.json)"]


def _data(run: Run) -> str:
    """Digest of the data; of another seed it may be another (``data.samples_per_class`` draws)."""
    return str(run.environment.get("identity", {}).get("data"))
