"""The pictures of one run, finished or not."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from numpy.typing import NDArray

from fedcil import metrics
from fedcil.metrics import Matrix
from fedcil.record.drawing import FAINT, GREY, INK, PALETTE, clean_axes, integer_ticks, plain_text, save_png
from fedcil.record.run import Run

NAMED_TASKS = 12  # more task names than that would overlap
ANNOTATED_TASKS = 20  # larger matrices have no room for numbers
SINGLE_CLIENTS = 60  # more clients are sorted by their main class, so that a pattern can be seen
MOST_COLUMNS = 250  # of a panel with that many clients
LONGEST_NAME = 16  # of a class
LONGEST_TITLE = 32  # of a scenario


def draw_figures(run: Run) -> list[Path]:
    """Draw what the run has records for into ``figures/`` of its folder, which has all of them or is not there."""
    folder, unfinished = run.path / "figures", run.path / ".figures"
    shutil.rmtree(unfinished, ignore_errors=True)
    drawn = run_figures(run)
    for name, figure in drawn.items():
        save_png(figure, unfinished / f"{name}.png")
    if drawn:
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.replace(folder)
    return [folder / f"{name}.png" for name in drawn]


def run_figures(run: Run) -> dict[str, Figure]:
    """The pictures of a run by name; those without records are left out."""
    drawn = {name: draw(run) for name, draw in DRAWINGS.items()}
    return {name: figure for name, figure in drawn.items() if figure is not None}


def accuracy_figure(run: Run) -> Figure | None:
    """Accuracy over rounds: on all classes seen so far, and on each task's own."""
    trace, _ = run.trace
    if not len(trace):
        return None
    places, ends = _places(run)
    figure = Figure(figsize=(8.5, 4.4), layout="constrained")
    axes = figure.subplots()
    pooled = 100 * np.array([_pooled(row, run.test_counts) for row in trace])
    style: dict[str, Any] = {"color": INK, "linewidth": 2.4, "marker": _marker(places), "markersize": 4}
    axes.plot(places, pooled, label="all classes seen", zorder=3, **style)
    _draw_tasks(axes, places, trace)
    _draw_borders(axes, ends, places[-1])
    axes.set(xlabel="round, counted over all tasks", ylabel="test accuracy (%)", ylim=(-2, 102))
    clean_axes(axes)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9)
    _title(axes, run, pad=22)
    return figure


def matrix_figure(run: Run) -> Figure | None:
    """The accuracy matrix: a row for each task that ended, a column for each task that was tested."""
    matrix = 100 * run.accuracy_matrix
    tasks = len(matrix)
    if not tasks:
        return None
    side = min(max(0.62 * tasks, 2.6), 7.5)
    figure = Figure(figsize=(side + 2.0, side + 1.0), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(matrix, vmin=0, vmax=100, cmap="cividis")
    if tasks <= ANNOTATED_TASKS:
        _write_cells(axes, matrix)
    _number(axes.xaxis, tasks)
    _number(axes.yaxis, tasks)
    axes.set(xlabel="tested on the classes of task", ylabel="after task")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, label="test accuracy (%)", shrink=0.85).outline.set_visible(False)
    _title(axes, run)
    return figure


def samples_figure(run: Run) -> Figure | None:
    """How many training samples each client has in each task: a dot for a client, a box for all of them."""
    if not (run.path / "partition.npz").is_file():
        return None
    counts = _sizes(run)
    places = np.arange(1, len(counts) + 1)
    figure = Figure(figsize=(min(max(0.8 * len(counts) + 2.0, 7.0), 12.0), 4.0), layout="constrained")
    axes = figure.subplots()
    _draw_boxes(axes, counts, places)
    for place, sizes in zip(places, counts, strict=True):
        dots: dict[str, Any] = {"s": 12, "color": PALETTE[0], "alpha": _alpha(len(sizes)), "linewidth": 0}
        axes.scatter(place + _spread(len(sizes)), sizes, zorder=4, **dots)
    _number(axes.xaxis, len(counts), first=1, notes=[_empty(sizes) for sizes in counts])
    top = 1.08 * max(max(sizes) for sizes in counts)
    shown = "" if run.scenario.population.name == "fixed" else " that has some"
    axes.set(xlabel="task", ylabel=f"training samples of a client{shown}", ylim=(-0.02 * top, top))
    integer_ticks(axes.yaxis)
    clean_axes(axes)
    _title(axes, run, f"{len(run.partition[0].counts())} clients (box: middle half, orange: median)")
    return figure


def _sizes(run: Run) -> list[NDArray[np.int64]]:
    """Samples of each client in each task. Who is no member of a task is not a client without samples."""
    counts = [part.counts() for part in run.partition]
    return counts if run.scenario.population.name == "fixed" else [sizes[sizes > 0] for sizes in counts]


def partition_figure(run: Run) -> Figure | None:
    """How many samples of each class each client has, one panel per task."""
    counts = run.label_counts
    if counts is None:
        return None
    tasks, clients, classes_seen = counts.shape
    names = class_names(run, classes_seen)
    present = [np.flatnonzero(task.sum(axis=0)) for task in counts]
    figure, panels = _panels(tasks, max(map(len, present)))
    scale = PowerNorm(0.5, vmin=0, vmax=max(counts.max(), 1))  # so that one sample differs from none
    style: dict[str, Any] = {"norm": scale, "cmap": "Blues", "aspect": "auto", "interpolation": "nearest"}
    for task, (axes, classes) in enumerate(zip(panels, present, strict=True)):
        shown = _by_class(counts[task][:, classes])
        image = axes.imshow(shown, extent=(-0.5, clients - 0.5, len(classes) - 0.5, -0.5), **style)
        axes.set_title(f"task {task + 1}", loc="left", fontsize=9, pad=2)
        _name_classes(axes, [names[label] for label in classes])
        _outline(axes)
    bar = figure.colorbar(image, ax=list(panels), location="bottom", shrink=0.5, aspect=40, pad=0.02)
    bar.set_label("training samples of a client")
    bar.outline.set_visible(False)
    order = ", in each task sorted by their main class" if clients > SINGLE_CLIENTS else ""
    figure.suptitle(_heading(run, f"{clients} clients from left to right{order}"), fontsize=11)
    return figure


def class_names(run: Run, count: int) -> list[str]:
    """Names of the first classes of the stream; their numbers where the run knows no names."""
    names = run.environment.get("class_order", [])
    return [str(name) for name in (names if len(names) >= count else range(count))[:count]]


def _places(run: Run) -> tuple[list[int], list[int]]:
    """(rounds done at each row of ``Run.trace``, rounds done at the end of each task)."""
    done, places, ends = 0, [], []
    for line in run.lines:
        done += line["kind"] == "round"
        if line["kind"] == "task":
            ends.append(done)
        if line["kind"] == "task" or (line["kind"] == "round" and line.get("accuracy")):
            places.append(done)
    return places, ends


def _pooled(row: NDArray[np.float64], counts: Sequence[int]) -> float:
    """Accuracy on all classes seen; NaN while the size of the newest test set is not recorded yet."""
    seen = row[~np.isnan(row)]
    if len(seen) == 1:
        return float(seen[0])
    return metrics.pooled_accuracy(seen, counts[: len(seen)]) if len(seen) <= len(counts) else float("nan")


def _draw_tasks(axes: Any, places: Sequence[int], trace: Matrix) -> None:
    """A line per task; of many tasks as many as have room in the legend."""
    tasks = trace.shape[1]
    colours = mpl.colormaps["viridis"](np.linspace(0.0, 0.9, tasks))
    for task in range(0, tasks, -(-tasks // NAMED_TASKS)):
        axes.plot(
            places,
            100 * trace[:, task],
            color=colours[task],
            linewidth=1.2,
            marker=_marker(places),
            markersize=3,
            label=f"classes of task {task + 1}",
        )


def _draw_borders(axes: Any, ends: Sequence[int], last: int) -> None:
    """A line where a task ends and the next one begins, and the tasks' names above."""
    edges = [0, *ends] if not ends or ends[-1] == last else [0, *ends, last]
    step = -(-(len(edges) - 1) // NAMED_TASKS)
    for task, (left, right) in enumerate(pairwise(edges)):
        if task:
            axes.axvline(left + 0.5, color=GREY, linewidth=0.8, linestyle=":", zorder=0)
        if task % step == 0:
            axes.annotate(
                f"task {task + 1}",
                ((left + right + 1) / 2, 1.01),
                xycoords=("data", "axes fraction"),
                ha="center",
                va="bottom",
                fontsize=9,
                color=GREY,
            )
    axes.set_xlim(0.5, last + 0.5)
    integer_ticks(axes.xaxis)


def _marker(places: Sequence[int]) -> str | None:
    """Few evaluations are shown as points, many would run together."""
    return "o" if len(places) <= 30 else None


def _write_cells(axes: Any, matrix: Matrix) -> None:
    size = 10 if len(matrix) <= 12 else 7
    for (row, column), value in np.ndenumerate(matrix):
        if not np.isnan(value):
            colour = "white" if value < 55 else "black"
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", color=colour, fontsize=size)


def _number(axis: Any, count: int, first: int = 0, notes: Sequence[str] = ()) -> None:
    """Ticks 1, 2, ... at first, first + 1, ...; not all of them where there are many."""
    step = -(-count // 20)
    shown = range(0, count, step)
    axis.set_ticks([first + i for i in shown], [f"{i + 1}{notes[i] if notes else ''}" for i in shown])


def _draw_boxes(axes: Any, counts: Sequence[NDArray[np.int64]], places: NDArray[np.int64]) -> None:
    line = {"color": GREY, "linewidth": 1.2}
    median = {"color": PALETTE[1], "linewidth": 2.0}
    lines = {"boxprops": line, "whiskerprops": line, "capprops": line, "medianprops": median}
    axes.boxplot(counts, positions=places, widths=0.6, showfliers=False, manage_ticks=False, **lines)


def _empty(sizes: NDArray[np.int64]) -> str:
    nobody = int((sizes == 0).sum())
    return f"\n{nobody} empty" if nobody else ""


def _spread(count: int) -> NDArray[np.float64]:
    """Sideways shifts (count,) that look random and are not: multiples of the golden ratio."""
    return 0.4 * ((np.arange(count, dtype=np.float64) * 0.6180339887) % 1.0 - 0.5)


def _alpha(count: int) -> float:
    return float(np.clip(30 / count, 0.15, 0.7))


def _panels(tasks: int, classes: int) -> tuple[Figure, list[Any]]:
    """A figure with one flat panel per task; many tasks take more columns."""
    columns = 1 if tasks <= 6 else 2 if tasks <= 24 else 3
    rows = -(-tasks // columns)
    height = min(max(0.2 * classes, 0.4), 1.2) + 0.3
    figure = Figure(figsize=(9.0, rows * height + 1.4), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, squeeze=False).ravel()
    for axes in panels[tasks:]:
        axes.set_visible(False)
    return figure, list(panels[:tasks])


def _by_class(counts: NDArray[np.int32]) -> NDArray[Any]:
    """(classes, clients) of one task; many clients stand in the order of their main class.

    More than there are pixels for become the means of neighbours, those without samples come last.
    """
    clients = len(counts)
    if clients <= SINGLE_CLIENTS:
        return counts.T
    main = np.where(counts.any(axis=1), counts.argmax(axis=1), counts.shape[1])
    ordered = counts[np.lexsort((-counts.max(axis=1), main))]
    starts = np.linspace(0, clients, min(clients, MOST_COLUMNS), endpoint=False).astype(np.int64)
    sizes = np.diff(starts, append=clients)
    return (np.add.reduceat(ordered, starts, axis=0) / sizes[:, None]).T


def _name_classes(axes: Any, names: Sequence[str]) -> None:
    """All names where there is room for them, else the first and the last."""
    shown = range(len(names)) if len(names) <= 6 else (0, len(names) - 1)
    axes.set_yticks(list(shown), [plain_text(_shorten(names[i], LONGEST_NAME)) for i in shown], fontsize=7)
    integer_ticks(axes.xaxis)


def _shorten(name: str, most: int) -> str:
    half = most // 2
    return name if len(name) <= most else f"{name[: half - 1]}…{name[-half:]}"


def _outline(axes: Any) -> None:
    axes.spines[:].set_color(FAINT)
    axes.tick_params(length=2)


def _title(axes: Any, run: Run, note: str = "", pad: float = 8) -> None:
    axes.set_title(_heading(run, note), loc="left", fontsize=11, pad=pad)


def _heading(run: Run, note: str = "") -> str:
    """No layout makes room for a title that is too long."""
    return f"{_shorten(run.scenario.name, LONGEST_TITLE)}, seed {run.scenario.seed}" + (f"\n{note}" if note else "")


DRAWINGS: dict[str, Callable[[Run], Figure | None]] = {
    "accuracy": accuracy_figure,
    "matrix": matrix_figure,
    "samples_per_task": samples_figure,
    "partition": partition_figure,
}
