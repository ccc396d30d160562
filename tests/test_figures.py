"""Pictures are there, not empty, small, and drawn without touching matplotlib's global state."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from fedcil.errors import InputError
from fedcil.partition import TaskPartition, save_partition
from fedcil.record import drawing, figures
from fedcil.record.compare import grouped
from fedcil.record.comparison_figure import compare_figure
from fedcil.record.run import Run

SUMMARY = {
    "average_incremental_accuracy": 0.5,
    "final_accuracy": 0.4,
    "forgetting": 0.3,
    "seconds": 1.0,
    "bytes_up": 1,
    "bytes_down": 1,
}
NAMES = ("accuracy", "matrix", "samples_per_task", "partition")


def round_line(task: int, number: int, accuracy: Sequence[float] | None) -> dict[str, Any]:
    line: dict[str, Any] = {"kind": "round", "task": task, "round": number}
    return line | ({"accuracy": accuracy} if accuracy else {})


def make_lines(tasks: int, rounds: int) -> list[dict[str, Any]]:
    """Every round but a task's last is evaluated; task j has 0.9 - 0.1 per task since it was learned."""
    lines = []
    for task in range(tasks):
        row = [max(0.9 - 0.1 * (task - j), 0.0) for j in range(task + 1)]
        lines += [round_line(task, r, row if r + 1 < rounds else None) for r in range(rounds)]
        lines.append({"kind": "task", "task": task, "accuracy": row, "test_images": [10] * (task + 1)})
    return lines


def make_run(folder: Path, lines: Sequence[dict[str, Any]], seed: int = 0, head: str = "") -> Run:
    folder.mkdir(parents=True)
    text = f'name = "trial"\nseed = {seed}\n[method]\nname = "fedavg"\n{head}'
    (folder / "scenario.toml").write_text(text)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "summary.json").write_text(json.dumps(SUMMARY))
    return Run(folder)


def share(folder: Path, tasks: int, clients: int, classes: int) -> None:
    """A partition and its label counts; class names are hostile to matplotlib's formula parser."""
    counts = np.zeros((tasks, clients, tasks * classes), dtype=np.int32)
    rng = np.random.default_rng(0)
    for task in range(tasks):
        shape = (clients, classes)
        counts[task, :, task * classes : (task + 1) * classes] = rng.poisson(2.0, shape) * (rng.random(shape) < 0.5)
    sizes = counts.sum(axis=2)
    parts = [TaskPartition(np.zeros(own.sum(), dtype=np.int32), np.concatenate([[0], np.cumsum(own)])) for own in sizes]
    save_partition(folder / "partition.npz", parts)
    np.save(folder / "label_counts.npy", counts)
    names = [f"a $x^ class with a long name {i}" for i in range(counts.shape[2])]
    (folder / "environment.json").write_text(json.dumps({"class_order": names}))


def pixels(content: bytes) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(content)).convert("L"))


def test_all_pictures_are_drawn_and_small(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", make_lines(3, 4))
    share(run.path, 3, 20, 2)
    paths = figures.draw_figures(run)
    assert paths == [tmp_path / "run" / "figures" / f"{name}.png" for name in NAMES]
    for content in (path.read_bytes() for path in paths):
        assert len(content) < 150_000
        assert pixels(content).std() > 5  # not one colour
        assert Image.open(io.BytesIO(content)).info["dpi"] == pytest.approx((150, 150), abs=0.1)


def test_pictures_are_all_there_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who dies, or has no room, while drawing draws them all again."""
    run = make_run(tmp_path / "run", make_lines(3, 4))
    share(run.path, 3, 20, 2)
    drawn: list[Path] = []

    def full(figure: Figure, path: Path) -> None:
        drawn.append(path)
        if len(drawn) == 2:
            raise InputError("no room", where=str(path))
        save(figure, path)

    save = figures.save_png
    monkeypatch.setattr(figures, "save_png", full)
    with pytest.raises(InputError):
        figures.draw_figures(run)
    assert not (run.path / "figures").exists()
    assert {path.name for path in figures.draw_figures(run)} == {f"{name}.png" for name in NAMES}
    assert {path.name for path in run.path.iterdir() if path.is_dir()} == {"figures"}


def test_who_has_no_samples_in_a_task_is_said_to_be_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", make_lines(3, 4))
    share(run.path, 3, 20, 2)
    with (run.path / "scenario.toml").open("a") as file:
        file.write("[population]\nname = 'turnover'\nsize = 5\n[clients]\ncount = 20\n")
    (axes,) = figures.run_figures(Run(run.path))["samples_per_task"].axes
    assert axes.get_ylabel() == "training samples of a client that has some"


def test_many_clients_and_tasks_stay_small(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", make_lines(10, 20))
    share(run.path, 10, 1000, 10)
    drawn = figures.run_figures(run)
    assert tuple(drawn) == NAMES
    assert all(len(drawing.png_bytes(figure)) < 150_000 for figure in drawn.values())


def test_only_what_is_recorded_is_drawn(tmp_path: Path) -> None:
    assert figures.draw_figures(make_run(tmp_path / "empty", [])) == []
    assert not (tmp_path / "empty" / "figures").exists()
    begun = make_run(tmp_path / "begun", [round_line(0, 0, [0.5]), round_line(0, 1, None)])
    assert list(figures.run_figures(begun)) == ["accuracy"]
    ended = make_run(tmp_path / "ended", make_lines(1, 1))
    assert list(figures.run_figures(ended)) == ["accuracy", "matrix"]


def test_equal_figures_are_equal_files(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", make_lines(2, 2))
    first, second = (drawing.png_bytes(figures.run_figures(run)["matrix"]) for _ in range(2))
    assert first == second


def test_accuracy_lines_stand_at_their_rounds(tmp_path: Path) -> None:
    """Two tasks of 3 rounds; the end of a task stands for its last round. Pooled: (10 x 0.8 + 30 x 0.4) / 40 = 0.5."""
    lines = [
        round_line(0, 0, [0.6]), round_line(0, 1, None), round_line(0, 2, None),
        {"kind": "task", "task": 0, "accuracy": [0.9], "test_images": [10]},
        round_line(1, 0, [0.8, 0.4]), round_line(1, 1, None), round_line(1, 2, None),
        {"kind": "task", "task": 1, "accuracy": [0.4, 0.8], "test_images": [10, 30]},
    ]  # fmt: skip
    figure = figures.accuracy_figure(make_run(tmp_path / "run", lines))
    drawn = {line.get_label(): line for line in axes_of(figure)[0].get_lines()}
    assert list(drawn["all classes seen"].get_xdata()) == [1, 3, 4, 6]
    assert list(drawn["all classes seen"].get_ydata()) == pytest.approx([60, 90, 50, 70])
    assert list(drawn["classes of task 2"].get_ydata())[2:] == pytest.approx([40, 80])
    assert [line.get_xdata()[0] for label, line in drawn.items() if label.startswith("_")] == [3.5]


def test_an_unfinished_task_has_no_pooled_accuracy_yet(tmp_path: Path) -> None:
    """The number of test images of the second task is recorded when it ends."""
    figure = figures.accuracy_figure(make_run(tmp_path / "run", [*make_lines(1, 2), round_line(1, 0, [0.5, 0.5])]))
    pooled = axes_of(figure)[0].get_lines()[0].get_ydata()
    assert np.isnan(pooled).tolist() == [False, False, True]


def test_many_clients_are_sorted_by_their_main_class() -> None:
    """100 clients, one class each in turn, some with nothing: classes from left to right, the empty ones last."""
    counts = np.zeros((100, 2), dtype=np.int32)
    counts[np.arange(90), np.arange(90) % 2] = 3
    shown = figures._by_class(counts)
    assert shown.shape == (2, 100)
    assert shown[0, :45].tolist() == shown[1, 45:90].tolist() == [3] * 45
    assert not shown[:, 90:].any()


def test_neighbours_are_averaged_when_there_are_more_clients_than_pixels() -> None:
    shown = figures._by_class(np.full((1000, 1), 7, dtype=np.int32))
    assert shown.shape == (1, 250)
    assert (shown == 7).all()


def test_compared_seeds_have_a_band(tmp_path: Path) -> None:
    """Seeds 0.8 and 0.6 after task 1: mean 0.7, sample deviation sqrt(0.02) = 0.1414."""
    ends = [{"kind": "task", "task": 0, "accuracy": [value], "test_images": [10]} for value in (0.8, 0.6)]
    runs = [make_run(tmp_path / f"{seed}", [end], seed) for seed, end in enumerate(ends)]
    axes = axes_of(compare_figure(grouped(runs)))[0]
    assert axes.get_lines()[0].get_ydata().tolist() == pytest.approx([70.0])
    heights = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == pytest.approx((70 - 14.142, 70 + 14.142), abs=1e-3)


def test_comparison_of_many_groups(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / f"{n}-{seed}", make_lines(4, 1), seed, head=f"[training]\nlr = 0.{n}\nlr_end = 0.01\n")
        for n in range(1, 10)
        for seed in (0, 1)
    ]
    figure = compare_figure(grouped(runs))
    bars = axes_of(figure)[1].patches
    assert len({(bar.get_facecolor(), bar.get_hatch()) for bar in bars}) == 9
    drawing.save_png(figure, tmp_path / "new" / "all.png")
    content = (tmp_path / "new" / "all.png").read_bytes()
    assert len(content) < 150_000
    assert pixels(content).std() > 5


def test_a_single_task_has_no_forgetting_bar(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", make_lines(1, 1))
    (run.path / "summary.json").write_text(json.dumps(SUMMARY | {"forgetting": None}))
    assert len(axes_of(compare_figure(grouped([run])))[1].patches) == 2


def test_a_picture_that_cannot_be_written_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write a picture"):
        drawing.save_png(Figure(), tmp_path / "file" / "a.png")
    with pytest.raises(InputError, match="PNG"):
        drawing.save_png(Figure(), tmp_path / "a.pdf")


def test_no_global_state_of_matplotlib() -> None:
    code = (
        "import matplotlib, sys; before = matplotlib.rcParams.copy();"
        "from fedcil.record import comparison_figure, drawing, figures; drawing.png_bytes(figures.Figure());"
        "assert 'matplotlib.pyplot' not in sys.modules; assert matplotlib.rcParams.copy() == before"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=Path(__file__).parent.parent)


def axes_of(figure: Figure | None) -> list[Any]:
    assert figure is not None
    return figure.axes


def test_who_is_no_member_of_a_task_is_not_drawn_as_empty(tmp_path: Path) -> None:
    """With a fixed population a client without samples is worth seeing; with turnover it is only not there."""
    for name, head in (("fixed", ""), ("turnover", "[population]\nname = 'turnover'\nsize = 6\n")):
        drawn = make_run(tmp_path / name, make_lines(3, 2), head=head)
        share(drawn.path, tasks=3, clients=30, classes=2)
        sizes = figures._sizes(drawn)
        assert [len(each) for each in sizes] != [30] * 3 or name == "fixed"
        assert any((each == 0).any() for each in sizes) == (name == "fixed")
        figure = figures.samples_figure(drawn)
        assert figure is not None
        texts = " ".join(label.get_text() for label in figure.axes[0].get_xticklabels())
        assert ("empty" in texts) == (name == "fixed")


def test_a_long_name_of_a_scenario_is_not_cut_off(tmp_path: Path) -> None:
    """No layout makes room for a title."""
    run = make_run(tmp_path / "run", make_lines(2, 2))
    long = (run.path / "scenario.toml").read_text().replace('"trial"', f'"{"long_name_" * 10}"')
    (run.path / "scenario.toml").write_text(long)
    share(run.path, 2, 100, 4)
    for draw in figures.DRAWINGS.values():
        figure = draw(Run(run.path))
        assert figure is not None
        figure.canvas.draw()
        titles = [axes._left_title for axes in figure.axes] + [figure._suptitle]
        boxes = [title.get_window_extent() for title in titles if title and title.get_text()]
        assert boxes
        assert all(box.x0 >= 0 and box.x1 <= figure.bbox.width for box in boxes)


def test_a_finished_run_without_its_last_task_is_damaged(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", make_lines(2, 2)[:-1], head="[stream]\ntasks = 2\n")
    (run.path / "summary.json").write_text(json.dumps(SUMMARY | {"rounds": 4}))
    with pytest.raises(InputError, match="1 of 2 tasks are in it"):
        Run(run.path).kind("task")


def test_nothing_is_known_of_test_images_before_the_first_task_has_ended(tmp_path: Path) -> None:
    assert make_run(tmp_path / "run", make_lines(1, 2)[:-1]).test_counts == []


def test_however_many_groups_are_compared_their_names_leave_room_for_the_axes(tmp_path: Path) -> None:
    heights = {}
    for many in (2, 24):
        runs = [
            make_run(tmp_path / f"{many}-{n}", make_lines(2, 1), head=f"[training]\nlr = 0.{n:02}\nlr_end = 0.001\n")
            for n in range(1, many + 1)
        ]
        groups = [replace(group, label=f"{group.label} {'of a long name ' * 2}") for group in grouped(runs)]
        figure = compare_figure(groups)
        figure.canvas.draw()
        lines, bars = figure.axes
        heights[many] = lines.get_window_extent().height
        numbers = [text.get_window_extent() for text in bars.texts]
        assert bool(numbers) == (many <= 4)
        assert all(number.y1 <= bars.get_window_extent().y1 for number in numbers)
    assert heights[24] > 0.85 * heights[2]


def all_of(run: Run) -> tuple[Any, ...]:
    return run.lines, run.summary, run.environment


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("metrics.jsonl", "{}\n", "does not say of what it is"),
        ("summary.json", '{"rounds": "x"}', "rounds is 'x', no int"),
        ("environment.json", '{"versions": null}', "versions is None, no dict"),
        ("environment.json", '{"class_order": 5}', "class_order is 5, no list"),
    ],
)
def test_a_file_of_another_form_is_an_input_error(name: str, content: str, says: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", make_lines(2, 2))
    (run.path / name).write_text(content)
    with pytest.raises(InputError, match=says) as caught:
        all_of(Run(run.path))
    assert name in caught.value.where


def test_counts_of_another_form_are_an_input_error(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", make_lines(2, 2))
    np.save(run.path / "label_counts.npy", np.zeros((2, 3), dtype=np.int32))
    with pytest.raises(InputError, match="not an array of counts"):
        assert run.label_counts is None
