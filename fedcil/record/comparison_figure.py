"""The picture of a comparison: accuracy after each task, and the field's three numbers, of several groups of runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from fedcil import metrics
from fedcil.record.compare import Group, by_seed
from fedcil.record.drawing import GREY, INK, PALETTE, clean_axes, integer_ticks, plain_text
from fedcil.record.run import Run

DASHES = ("-", "--", ":", "-.")
HATCHES = ("", "//", "..", "xx")


def compare_figure(groups: Sequence[Group]) -> Figure:
    """Accuracy after each task, a line per group, and the field's three numbers as bars."""
    columns = 1 if max(len(group.label) for group in groups) > 30 else 3  # of the legend, below the axes
    height = 4.4 + 0.22 * math.ceil(len(groups) / columns)
    figure = Figure(figsize=(11.0, height), layout="constrained")
    lines, bars = figure.subplots(1, 2, width_ratios=(1.15, 1.0))
    for place, group in enumerate(groups):
        _draw_curve(lines, group, place)
        _draw_bars(bars, group, place, len(groups))
    longest = max(len(group.runs[0].accuracy_matrix) for group in groups)
    lines.set(xlabel="after task", ylabel="accuracy on all classes seen so far (%)", ylim=(-2, 102))
    lines.set_xlim(0.7, longest + 0.3)
    integer_ticks(lines.xaxis)
    bars.set_xticks(range(3), ["average\nincremental\naccuracy", "final\naccuracy", "forgetting"])
    bars.set_ylabel("percent")
    bars.tick_params(axis="x", length=0)
    bars.margins(y=0.1)  # for the numbers above them
    bars.axhline(0, color=INK, linewidth=0.8)
    clean_axes(lines)
    clean_axes(bars)
    figure.legend(*lines.get_legend_handles_labels(), loc="outside lower center", frameon=False, ncols=columns)
    if any(group.std for group in groups):
        bars.set_title("bands and whiskers: sample deviation over seeds", fontsize=9, color=GREY, loc="right")
    return figure


def _draw_curve(axes: Any, group: Group, place: int) -> None:
    seeds = by_seed(group.runs).values()
    curves = 100 * np.array([np.mean([_curve(run) for run in runs], axis=0) for runs in seeds])
    tasks = np.arange(1, curves.shape[1] + 1)
    colour, mean = PALETTE[place % len(PALETTE)], curves.mean(axis=0)
    axes.plot(
        tasks,
        mean,
        color=colour,
        linestyle=_again(place, DASHES),
        linewidth=2.0,
        marker="o",
        markersize=5,
        label=plain_text(group.label),
    )
    if len(curves) > 1:
        std = curves.std(axis=0, ddof=1)
        axes.fill_between(tasks, mean - std, mean + std, color=colour, alpha=0.18, linewidth=0)


def _curve(run: Run) -> list[float]:
    a, n = run.accuracy_matrix, run.test_counts
    return [metrics.accuracy_after(a, n, t) for t in range(len(a))]


def _draw_bars(axes: Any, group: Group, place: int, groups: int) -> None:
    width = 0.8 / groups
    for bar, name in enumerate(("average_incremental_accuracy", "final_accuracy", "forgetting")):
        mean = group.mean[name]
        if mean is None:
            continue
        std = (group.std[name] if group.std else None) or 0.0
        centre = bar + (place - (groups - 1) / 2) * width
        colour, hatch = PALETTE[place % len(PALETTE)], _again(place, HATCHES)
        axes.bar(centre, 100 * mean, 0.92 * width, color=colour, hatch=hatch, edgecolor="white", linewidth=0)
        if std:
            axes.errorbar(centre, 100 * mean, 100 * std, color=INK, linewidth=1.2, capsize=3)
        if groups <= 4:
            top = 100 * (max(mean, 0.0) + std)
            beside: dict[str, Any] = {"xytext": (0, 2), "textcoords": "offset points", "ha": "center", "va": "bottom"}
            axes.annotate(f"{100 * mean:.1f}", (centre, top), fontsize=8, **beside)


def _again(place: int, styles: Sequence[str]) -> str:
    """Colours begin again after the seventh group, then with another line or hatch."""
    return styles[place // len(PALETTE) % len(styles)]
