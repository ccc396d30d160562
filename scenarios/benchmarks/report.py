"""The figures as a table and as a picture, with the bars that they are held against."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from scenarios.benchmarks.bars import Bars

Rows = dict[str, dict[str, Any]]
REACHED, MISSED = "reached", "not reached"


def verdict(name: str, row: dict[str, Any], bars: Bars) -> str:
    """``reached`` or ``not reached`` with the bars, or nothing where there are none or nothing was measured."""
    fact, most = bars.facts.get(name, ("", None))
    limits = [  # (measured, bar, largest value that keeps it, unit)
        (row.get("ratio"), bars.most.get(name), "<=", 1.0, ""),
        (row.get("wall_ratio"), bars.most_wall.get(name), "<=", 1.0, " wall"),
        (row.get("ratio"), bars.least.get(name), ">=", 1.0, ""),
        (row.get("median_s"), bars.seconds.get(name), "<=", 1e3, " ms"),
        (row.get(fact), most, "<=", 1.0, f" {fact}"),
    ]
    checks = [
        (value <= bar if sign == "<=" else value >= bar, f"{sign} {scale * bar:.3g}{unit}")
        for value, bar, sign, scale, unit in limits
        if value is not None and bar is not None
    ]
    if not checks:
        return ""
    return f"{REACHED if all(good for good, _ in checks) else MISSED} " + ", ".join(text for _, text in checks)


def print_table(rows: Rows, bars: Bars) -> None:
    """Markdown, and how many bars were reached. ``ratio`` is ours / baseline in CPU seconds."""
    print("| name | ratio | wall ratio | our CPU s | spread | bar |\n|---|---|---|---|---|---|")
    verdicts = {name: verdict(name, row, bars) for name, row in rows.items()}
    for name, row in rows.items():
        if "ratio" in row:
            cells = [_number(row[key]) for key in ("ratio", "wall_ratio", "median_s", "spread")]
        else:
            cells = [", ".join(f"{key} {value:.4g}" for key, value in row.items()), "", "", ""]
        print(f"| {name} | {' | '.join(cells)} | {verdicts[name]} |")
    missed = [name for name, said in verdicts.items() if said.startswith(MISSED)]
    held = sum(said.startswith(REACHED) for said in verdicts.values())
    print(f"{held} of {held + len(missed)} bars reached" + (f"; not: {', '.join(missed)}" if missed else ""))


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3g}"


def draw(rows: Rows, bars: Bars, path: Path) -> None:
    """One bar per ratio; a tick where it should end at the latest."""
    from matplotlib.figure import Figure

    shown = {
        name: row["ratio"] for name, row in rows.items() if row.get("ratio") is not None and name not in bars.least
    }
    if not shown:
        return
    figure = Figure(figsize=(9, 1 + 0.25 * len(shown)), layout="constrained")
    axes = figure.subplots()
    places = range(len(shown))
    axes.barh(places, list(shown.values()), color="#4477aa")
    for place, name in zip(places, shown, strict=True):
        if name in bars.most:
            axes.plot([bars.most[name]] * 2, [place - 0.4, place + 0.4], color="#cc3311", linewidth=2)
    axes.axvline(1, color="#bbbbbb", linewidth=1)
    axes.set_yticks(list(places), list(shown), fontsize=7)
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.set_xlabel("CPU seconds, fedcil / baseline (smaller is better; red: the bar)")
    figure.savefig(path, dpi=110)
