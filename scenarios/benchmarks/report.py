"""The figures as a table and as a picture, with the bars that they are held against."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from scenarios.benchmarks.bars import BARS, LEAST, SECONDS

Rows = dict[str, dict[str, Any]]


def verdict(name: str, row: dict[str, Any]) -> str:
    """``reached`` or ``not reached`` with the bars, or nothing where there are none."""
    checks = []
    if name in BARS and row.get("ratio") is not None:
        checks.append((row["ratio"] <= BARS[name], f"<= {BARS[name]:.2f}"))
    if name in LEAST and row.get("ratio") is not None:
        checks.append((row["ratio"] >= LEAST[name], f">= {LEAST[name]:.2f}"))
    if name in SECONDS:
        checks.append((row["median_s"] <= SECONDS[name], f"<= {1e3 * SECONDS[name]:.2f} ms"))
    if not checks:
        return ""
    return ("reached " if all(good for good, _ in checks) else "not reached ") + ", ".join(text for _, text in checks)


def print_table(rows: Rows) -> None:
    """Markdown. ``ratio`` is ours / baseline in CPU seconds."""
    print("| name | ratio | wall ratio | our CPU s | spread | bar |\n|---|---|---|---|---|---|")
    for name, row in rows.items():
        if "ratio" not in row:
            print(f"| {name} | " + ", ".join(f"{key} {value:.4g}" for key, value in row.items()) + " | | | | |")
            continue
        cells = [_number(row[key]) for key in ("ratio", "wall_ratio", "median_s", "spread")]
        print(f"| {name} | {' | '.join(cells)} | {verdict(name, row)} |")


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3g}"


def draw(rows: Rows, path: Path) -> None:
    """One bar per ratio; a tick where it should end at the latest."""
    from matplotlib.figure import Figure

    shown = {name: row["ratio"] for name, row in rows.items() if row.get("ratio") is not None and name not in LEAST}
    if not shown:
        return
    figure = Figure(figsize=(9, 1 + 0.25 * len(shown)), layout="constrained")
    axes = figure.subplots()
    places = range(len(shown))
    axes.barh(places, list(shown.values()), color="#4477aa")
    for place, name in zip(places, shown, strict=True):
        if name in BARS:
            axes.plot([BARS[name]] * 2, [place - 0.4, place + 0.4], color="#cc3311", linewidth=2)
    axes.axvline(1, color="#bbbbbb", linewidth=1)
    axes.set_yticks(list(places), list(shown), fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("CPU seconds, fedcil / baseline (smaller is better; red: the bar)")
    figure.savefig(path, dpi=110)
