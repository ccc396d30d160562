"""The pictures of a run and of a comparison: matplotlib's object API, no pyplot, nothing global."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from PIL import Image

from fedcil import metrics
from fedcil.errors import InputError
from fedcil.metrics import Matrix
from fedcil.record.compare import Group, by_seed
from fedcil.record.run import Run

DPI = 150
INK, GREY, FAINT = "#222222", "#777777", "#dddddd"
# Okabe and Ito's colours, which people with any kind of colour vision can tell apart.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", ":", "-.")
HATCHES = ("", "//", "..", "xx")
NAMED_TASKS = 12  # more task names than that would overlap
ANNOTATED_TASKS = 20  # larger matrices have no room for numbers
SINGLE_CLIENTS = 60  # more clients are sorted by their main class, so that a pattern can be seen
MOST_COLUMNS = 250  # of a panel with that many clients
LONGEST_NAME = 16


def draw_figures(run: Run) -> list[Path]:
    """Draw what the run has records for into ``figures/`` of its folder."""
    paths = []
    for name, figure in run_figures(run).items():
        paths.append(run.path / "figures" / f"{name}.png")
        save_png(figure, paths[-1])
    return paths


def run_figures(run: Run) -> dict[str, Figure]:
    """The pictures of a run by name; those without records are left out."""
    drawn = {name: draw(run) for name, draw in DRAWINGS.items()}
    return {name: figure for name, figure in drawn.items() if figure is not None}


def refuse_other_pictures(path: Path) -> None:
    if path.suffix.lower() != ".png":
        raise InputError("pictures are PNG files", where=str(path), allowed="a name that ends in .png")


def save_png(figure: Figure, path: Path) -> None:
    """Write a figure; folders above it are made. Raises InputError if that is not possible."""
    refuse_other_pictures(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png_bytes(figure))
    except OSError as error:
        raise InputError(
            f"cannot write a picture: {error.strerror}", where=str(path), next="give a path you may write to"
        ) from None


def png_bytes(figure: Figure) -> bytes:
    """A figure as a PNG at 150 dots per inch.

    256 colours are enough for it and make a third of the bytes; no date, so equal figures are equal files.
    """
    figure.set_dpi(DPI)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    image = Image.frombytes("RGBA", canvas.get_width_height(), bytes(canvas.buffer_rgba()))
    buffer = io.BytesIO()
    image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True, dpi=(DPI, DPI))
    return buffer.getvalue()


def accuracy_figure(run: Run) -> Figure | None:
    """Accuracy over rounds: on all classes seen so far, and on each task's own."""
    trace, _ = run.trace
    if not len(trace):
        return None
    places, ends = _places(run)
    figure = Figure(figsize=(8.5, 4.4), layout="constrained")
    axes = figure.subplots()
    pooled = 100 * np.array([_pooled(row, _test_counts(run)) for row in trace])
    style: dict[str, Any] = {"color": INK, "linewidth": 2.4, "marker": _marker(places), "markersize": 4}
    axes.plot(places, pooled, label="all classes seen", zorder=3, **style)
    _draw_tasks(axes, places, trace)
    _draw_borders(axes, ends, places[-1])
    axes.set(xlabel="round, counted over all tasks", ylabel="test accuracy (%)", ylim=(-2, 102))
    _clean(axes, grid="y")
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
    axes.set(xlabel="task", ylabel="training samples of a client", ylim=(-0.02 * top, top))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    _clean(axes, grid="y")
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


def compare_figure(groups: Sequence[Group]) -> Figure:
    """Accuracy after each task, a line per group, and the field's three numbers as bars."""
    figure = Figure(figsize=(11.0, 4.6 + 0.1 * len(groups)), layout="constrained")
    lines, bars = figure.subplots(1, 2, width_ratios=(1.15, 1.0))
    for place, group in enumerate(groups):
        _draw_curve(lines, group, place)
        _draw_bars(bars, group, place, len(groups))
    longest = max(len(group.runs[0].accuracy_matrix) for group in groups)
    lines.set(xlabel="after task", ylabel="accuracy on all classes seen so far (%)", ylim=(-2, 102))
    lines.set_xlim(0.7, longest + 0.3)
    lines.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    bars.set_xticks(range(3), ["average\nincremental\naccuracy", "final\naccuracy", "forgetting"])
    bars.set_ylabel("percent")
    bars.tick_params(axis="x", length=0)
    bars.axhline(0, color=INK, linewidth=0.8)
    _clean(lines, grid="y")
    _clean(bars, grid="y")
    wide = max(len(group.label) for group in groups) > 30
    figure.legend(*lines.get_legend_handles_labels(), loc="outside lower center", frameon=False, ncols=1 if wide else 3)
    if any(group.std for group in groups):
        bars.set_title("bands and whiskers: sample deviation over seeds", fontsize=9, color=GREY, loc="right")
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


def _test_counts(run: Run) -> list[int]:
    return run.test_counts if run.kind("task") else []


def _pooled(row: NDArray[np.float64], counts: Sequence[int]) -> float:
    """Accuracy on all classes seen; NaN while the size of the newest test set is not recorded yet."""
    seen = row[~np.isnan(row)]
    if len(seen) == 1:
        return float(seen[0])
    return float(np.average(seen, weights=counts[: len(seen)])) if len(seen) <= len(counts) else float("nan")


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
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


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
    axes.set_yticks(list(shown), [_plain(_shorten(names[i])) for i in shown], fontsize=7)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _shorten(name: str) -> str:
    half = LONGEST_NAME // 2
    return name if len(name) <= LONGEST_NAME else f"{name[: half - 1]}…{name[-half:]}"


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
        label=_plain(group.label),
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
            axes.text(centre, top + 1, f"{100 * mean:.1f}", ha="center", va="bottom", fontsize=8)


def _again(place: int, styles: Sequence[str]) -> str:
    """Colours begin again after the seventh group, then with another line or hatch."""
    return styles[place // len(PALETTE) % len(styles)]


def _clean(axes: Any, grid: str) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color=FAINT, linewidth=0.7)
    axes.set_axisbelow(True)


def _outline(axes: Any) -> None:
    axes.spines[:].set_color(FAINT)
    axes.tick_params(length=2)


def _title(axes: Any, run: Run, note: str = "", pad: float = 8) -> None:
    axes.set_title(_heading(run, note), loc="left", fontsize=11, pad=pad)


def _heading(run: Run, note: str = "") -> str:
    parts = [run.scenario.name, f"seed {run.scenario.seed}", *([note] if note else [])]
    return ", ".join(parts)


def _plain(text: str) -> str:
    """Text that matplotlib shall not read as a formula."""
    return text.replace("$", r"\$")


DRAWINGS: dict[str, Callable[[Run], Figure | None]] = {
    "accuracy": accuracy_figure,
    "matrix": matrix_figure,
    "samples_per_task": samples_figure,
    "partition": partition_figure,
}
